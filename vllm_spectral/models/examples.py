"""Well-known models by the fields of their ``config.json`` that concern attention, and the table made of them."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from vllm_spectral.models.decoder import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, POSITIONS, QUERY_HEADS, Decoder
from vllm_spectral.models.known import READ_TYPES, RUN_TYPES, SUPPORTED_HEAD_DIMS
from vllm_spectral.models.rules import RULES, UNKNOWN
from vllm_spectral.models.support import KEY_BIAS_NOTE, Support, Verdict, assess

RUN = frozenset(RUN_TYPES.values())
"""Models that were served from spectral pages, not only judged."""


def _decoder(
    kind: str, layers: int, heads: int, kv_heads: int, hidden: int, positions: int, **rest: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "max_position_embeddings": positions,
        **rest,
    }


_NO_WINDOW = {"use_sliding_window": False}
_EVERY_FOURTH = ["sliding_attention"] * 3 + ["full_attention"]
_ALTERNATING = ["sliding_attention", "full_attention"]

EXAMPLES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M-Instruct": _decoder("llama", 30, 9, 3, 576, 8192),
    "Llama-3.1-8B": _decoder("llama", 32, 32, 8, 4096, 131072),
    "Llama-3.1-70B": _decoder("llama", 80, 64, 8, 8192, 131072),
    "Llama-3.2-1B": _decoder("llama", 16, 32, 8, 2048, 131072, head_dim=64),
    "SmolLM3-3B": _decoder("smollm3", 36, 16, 4, 2048, 65536, layer_types=["full_attention"] * 36, **_NO_WINDOW),
    "Qwen2.5-0.5B": _decoder("qwen2", 24, 14, 2, 896, 32768, sliding_window=32768, **_NO_WINDOW),
    "Qwen2.5-7B": _decoder("qwen2", 28, 28, 4, 3584, 131072, sliding_window=131072, **_NO_WINDOW),
    "Qwen2.5-7B-Instruct-1M": _decoder(
        "qwen2", 28, 28, 4, 3584, 1010000, dual_chunk_attention_config={"chunk_size": 262144}, **_NO_WINDOW
    ),
    "Qwen2.5-VL-7B": _decoder("qwen2_5_vl", 28, 28, 4, 3584, 128000, sliding_window=32768, **_NO_WINDOW),
    "Qwen3-8B": _decoder("qwen3", 36, 32, 8, 4096, 40960, head_dim=128, sliding_window=None, **_NO_WINDOW),
    "Qwen3-Next-80B-A3B": _decoder(
        "qwen3_next", 48, 16, 2, 2048, 262144, head_dim=256, full_attention_interval=4, linear_num_key_heads=16
    ),
    "Mistral-7B-v0.1": _decoder("mistral", 32, 32, 8, 4096, 32768, sliding_window=4096),
    "Mistral-7B-v0.3": _decoder("mistral", 32, 32, 8, 4096, 32768, sliding_window=None),
    "Ministral-8B": _decoder("mistral", 36, 32, 8, 4096, 32768, head_dim=128, sliding_window=32768),
    "Mixtral-8x7B": _decoder("mixtral", 32, 32, 8, 4096, 32768, sliding_window=None),
    "Phi-2": _decoder("phi", 32, 32, 32, 2560, 2048, partial_rotary_factor=0.4),
    "Phi-3-mini-4k": _decoder("phi3", 32, 32, 32, 3072, 4096, sliding_window=2047),
    "Phi-4": _decoder("phi3", 40, 40, 10, 5120, 16384, sliding_window=None),
    "Phi-4-mini": _decoder("phi3", 32, 24, 8, 3072, 131072, sliding_window=262144, partial_rotary_factor=0.75),
    "Gemma-2B": _decoder("gemma", 18, 8, 1, 2048, 8192, head_dim=256),
    "Gemma-2-9B": _decoder(
        "gemma2", 42, 16, 8, 3584, 8192, head_dim=256, sliding_window=4096, attn_logit_softcapping=50.0
    ),
    "Gemma-3-1B": _decoder("gemma3_text", 26, 4, 1, 1152, 32768, head_dim=256, sliding_window=512, sliding_window_pattern=6),
    "Gemma-3-4B": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34, "hidden_size": 2560, "sliding_window": 1024},
    },
    "Gemma-3n-E4B": {
        "model_type": "gemma3n",
        "text_config": _decoder(
            "gemma3n_text", 35, 8, 2, 2048, 32768, head_dim=256, sliding_window=512, num_kv_shared_layers=15
        ),
    },
    "Gemma-4-12B": {
        "model_type": "gemma4_unified",
        "text_config": _decoder(
            "gemma4_unified_text", 48, 16, 8, 3840, 262144, head_dim=256, global_head_dim=512, num_global_key_value_heads=1,
            sliding_window=1024,
        ),
    },
    "gpt-oss-20b": _decoder(
        "gpt_oss", 24, 64, 8, 2880, 131072, head_dim=64, sliding_window=128, layer_types=_ALTERNATING * 12
    ),
    "DeepSeek-V2-Lite": _decoder(
        "deepseek_v2", 27, 16, 16, 2048, 163840, kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=128
    ),
    "DeepSeek-V3": _decoder(
        "deepseek_v3", 61, 128, 128, 7168, 163840, kv_lora_rank=512, qk_rope_head_dim=64, v_head_dim=128
    ),
    "MiniCPM3-4B": _decoder("minicpm3", 62, 40, 40, 2560, 32768, kv_lora_rank=256, qk_rope_head_dim=32),
    "OLMo-2-7B": _decoder("olmo2", 32, 32, 32, 4096, 4096),
    "OLMo-3-7B": _decoder(
        "olmo3", 32, 32, 32, 4096, 65536, sliding_window=4096, layer_types=_EVERY_FOURTH * 8
    ),
    "GPT-2": {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
    "Pythia-1.4B": {
        "model_type": "gpt_neox", "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 2048,
        "max_position_embeddings": 2048, "rotary_pct": 0.25,
    },
    "StableLM-2-1.6B": _decoder(
        "stablelm", 24, 32, 32, 2048, 4096, partial_rotary_factor=0.25, use_qkv_bias=True
    ),
    "GLM-4-9B-chat": _decoder(
        "glm", 40, 32, 2, 4096, 131072, head_dim=128, partial_rotary_factor=0.5, attention_bias=True
    ),
    "Granite-3.3-8B": _decoder("granite", 40, 32, 8, 4096, 131072, attention_multiplier=0.0078125),
    "Command-R": _decoder("cohere", 40, 64, 64, 8192, 8192),
    "Command-R7B": _decoder("cohere2", 32, 32, 8, 4096, 8192, sliding_window=4096, sliding_window_pattern=4),
    "Falcon-7B": {
        "model_type": "falcon", "num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544,
        "multi_query": True, "new_decoder_architecture": False, "alibi": False,
    },
    "Hunyuan-7B": _decoder("hunyuan_v1_dense", 32, 32, 8, 4096, 262144, head_dim=128, use_cla=False, cla_share_factor=2),
    "Hunyuan-Large": _decoder("hunyuan", 64, 80, 8, 6400, 131072, use_cla=True, cla_share_factor=2),
    "Llama-3.2-11B-Vision": {
        "model_type": "mllama",
        "text_config": _decoder(
            "mllama_text_model", 40, 32, 8, 4096, 131072, cross_attention_layers=[3, 8, 13, 18, 23, 28, 33, 38]
        ),
    },
    "Llama-4-Scout": {
        "model_type": "llama4",
        "text_config": _decoder("llama4_text", 48, 40, 8, 5120, 10485760, head_dim=128, attention_chunk_size=8192),
    },
    "Llama-3.3-Nemotron-Super-49B": {
        "model_type": "nemotron-nas", "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": None,
        "hidden_size": 8192, "max_position_embeddings": 131072,
        "block_configs": [{"attention": {"n_heads_in_group": 8}}, {"attention": {"no_op": True}}],
    },
    "OpenELM-270M": {
        "model_type": "openelm", "num_transformer_layers": 16, "head_dim": 64, "model_dim": 1280,
        "num_kv_heads": [3] * 5 + [4] * 7 + [5] * 4, "num_query_heads": [12] * 5 + [16] * 7 + [20] * 4,
    },
    "Jamba-v0.1": _decoder("jamba", 32, 32, 8, 4096, 262144, attn_layer_period=8, mamba_d_state=16),
    "Bamba-9B": _decoder("bamba", 32, 32, 8, 4096, 262144, attn_layer_indices=[9, 18, 27], mamba_n_heads=128),
    "Nemotron-Nano-30B-A3B": _decoder(
        "nemotron_h", 52, 32, 2, 2688, 262144, head_dim=128, mamba_num_heads=64, ssm_state_size=128,
        hybrid_override_pattern="MEMEM*...",
    ),
    "Falcon-H1-0.5B": _decoder("falcon_h1", 36, 8, 2, 1024, 16384, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24),
    "Codestral-Mamba-7B": {
        "model_type": "mamba2", "num_hidden_layers": 64, "hidden_size": 4096, "num_heads": 128, "head_dim": 64,
        "state_size": 128,
    },
    "Whisper-large-v3": {
        "model_type": "whisper", "is_encoder_decoder": True, "decoder_layers": 32, "decoder_attention_heads": 20,
        "d_model": 1280,
    },
    "Flan-T5-base": {
        "model_type": "t5", "is_encoder_decoder": True, "num_layers": 12, "num_heads": 12, "d_model": 768, "d_kv": 64,
        "relative_attention_num_buckets": 32,
    },
    "BLOOM-7B1": {"model_type": "bloom", "n_layer": 30, "num_attention_heads": 32, "hidden_size": 4096},
    "MPT-7B": {
        "model_type": "mpt", "n_layers": 32, "n_heads": 32, "d_model": 4096, "max_seq_len": 2048,
        "attn_config": {"alibi": True},
    },
}  # fmt: skip
"""Model to fields. They are what a verdict in ``docs/models.md`` rests on."""

_SIZES = {*LAYERS, *QUERY_HEADS, *KV_HEADS, *HIDDEN, *HEAD_DIM, *POSITIONS, "model_type"}

_INTRODUCTION = f"""\
# Models

<!-- Written by `vllm-spectral doctor --table`: edit `known.py`, `rules.py` and `examples.py` in `vllm_spectral/models`. -->

`vllm-spectral doctor MODEL` gives the verdict on your model, from its own `config.json` and weights. The verdicts below come
from the configuration fields beside them and from nothing else: **a verdict is not a test**, and whether vLLM itself runs a
model is another question. Run from spectral pages so far: {", ".join(sorted(RUN))}.

- *supported*: every layer attends causally to all tokens, and all layers have one size.
- *supported, see the weights*: the same, but keys have biases. In some models a few layers have biases so large that even
  the widest code leaves more error in them than in the rest of the key. `doctor` finds these layers in the weights and
  recommends them for `--exempt-layers` of `serve`, which leaves them on stock pages.
- *refused*: `calibrate`, `serve` and `evaluate` stop before they load the model. Stock vLLM serves it as ever.

Head sizes: {", ".join(map(str, SUPPORTED_HEAD_DIMS))}. Any number of query heads per KV head.
"""

_TYPES = f"""
## Model types

Run: {", ".join(f"`{kind}` ({model})" for kind, model in sorted(RUN_TYPES.items()))}.

Not run, but their attention in vLLM 0.32 was read, and does what the fields say and no more:
{{types}}

Any other type passes with a note that it was never run, unless one of its fields hints at an attention that nobody has looked
at: then it is refused, and the field is named.

## What is refused

| rule | why | way out |
|---|---|---|
"""


def table() -> str:
    """The text of ``docs/models.md``."""
    text = f"{_INTRODUCTION}\n## Well-known models\n\n| model | decoder | other fields | verdict |\n|---|---|---|---|\n"
    for name, config in EXAMPLES.items():
        decoder = Decoder(config)
        support = assess(decoder)
        cells = (name, _sizes(decoder, support), _others(decoder), _verdict(support) + (", run" if name in RUN else ""))
        text += f"| {' | '.join(cells)} |\n"
    text += _TYPES.format(types=textwrap.fill(", ".join(f"`{kind}`" for kind in sorted(READ_TYPES)) + ".", 125))
    for rule in (*RULES, UNKNOWN):
        text += f"| {rule.name} | {rule.reason} | {rule.way_out} |\n"
    return text


def _sizes(decoder: Decoder, support: Support) -> str:
    """Type and sizes; of a refused model no heads, which its fields often do not tell."""
    layers = decoder.first(LAYERS)
    if support.verdict is Verdict.REFUSED:
        return f"`{decoder.model_type}`" + (f", {layers} layers" if layers else "")
    sizes = decoder.geometry()
    heads = f"{sizes.num_query_heads}/{sizes.num_kv_heads} heads of {sizes.head_dim}"
    return f"`{decoder.model_type}`, {layers} layers, {heads}"


def _others(decoder: Decoder) -> str:
    shown = {name: value for name, value in decoder.fields.items() if name not in _SIZES or isinstance(value, list)}
    return ", ".join(f"`{name}` {_short(value)}" for name, value in shown.items())


def _short(value: Any) -> str:
    """A value for a cell: a list by its distinct members, a section by its fields."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        members = list(dict.fromkeys(_short(member) for member in value))
        return f"{len(value)} x " + " / ".join(members[:3]) + (" / ..." if len(members) > 3 else "")
    return value if isinstance(value, str) else json.dumps(value)


def _verdict(support: Support) -> str:
    if support.verdict is Verdict.REFUSED:
        return "**refused**: " + "; ".join(support.reasons)
    return "supported, see the weights" if KEY_BIAS_NOTE in support.notes else "supported"

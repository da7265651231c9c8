"""Whether a model can be served from spectral pages, decided from its configuration: one rule per obstacle.

What a rule says holds for vLLM 0.32: it was read in the model code there. A type that nobody looked at passes only if
none of its fields hints at an attention that we do not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_spectral.errors import UnsupportedModelError
from vllm_spectral.models.decoder import (
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    QUERY_HEADS,
    Decoder,
    Geometry,
)

SUPPORTED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that stock vLLM's paged CPU attention takes as well, so that exempt layers always have a kernel."""

RUN_TYPES = {"llama": "SmolLM2-135M-Instruct", "qwen2": "a small random model"}
"""Model types that were run from spectral pages, and with which model; the one place to add to after a run."""

READ_TYPES = frozenset({
    "apertus", "arcee", "bailing_moe", "chatglm", "cohere", "dbrx", "deepseek", "ernie4_5", "ernie4_5_moe", "exaone",
    "exaone4", "falcon", "gemma", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax",
    "internlm2", "internlm3", "mimo", "minicpm", "minimax_m2", "ministral3", "mistral", "mixtral", "nemotron", "olmo",
    "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl",
    "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_vl_text", "seed_oss", "smollm3", "solar", "stablelm", "starcoder2",
})  # fmt: skip
"""Model types that were not run, but whose attention in vLLM 0.32 does what the fields read here say, and no more."""


class Verdict(StrEnum):
    """What can be done with a model."""

    SUPPORTED = "supported"
    SUPPORTED_WITH_EXEMPT_LAYERS = "supported_with_exempt_layers"
    """Served, but some layers are better left on stock pages."""
    REFUSED = "refused"


@dataclass(frozen=True)
class Support:
    """The verdict on a model.

    Attributes:
        verdict: the verdict.
        reasons: why the model is refused, or why layers should be left exact; empty if it is simply supported.
        notes: what else a user should know.
        exempt_layers: layers to leave on stock pages.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exempt_layers: tuple[int, ...] = ()

    def require_served(self, path: Path) -> None:
        """Raise :class:`UnsupportedModelError`, naming every obstacle, if the model in ``path`` is refused."""
        if self.verdict is Verdict.REFUSED:
            raise UnsupportedModelError(f"{path} cannot be served from spectral pages: " + "; ".join(self.reasons))


@dataclass(frozen=True)
class Rule:
    """An obstacle.

    Attributes:
        name: what it is called.
        reason: why spectral pages cannot serve it.
        fields: fields that show it by being there and neither null, false, 0 nor empty.
        types: model types that have it whatever their fields say.
        evidence: finds what the fields alone do not show; None if there is nothing.
        way_out: what a user can do, if anything.
    """

    name: str
    reason: str
    fields: tuple[str, ...] = ()
    types: frozenset[str] = frozenset()
    evidence: Callable[[Decoder], str | None] | None = None
    way_out: str = ""

    def applies(self, decoder: Decoder) -> str | None:
        """One line that names the evidence and the reason; None if the model does not have the obstacle."""
        found = self._found(decoder)
        return found and f"{found}: {self.reason}" + (f" ({self.way_out})" if self.way_out else "")

    def _found(self, decoder: Decoder) -> str | None:
        own = self.evidence(decoder) if self.evidence else None
        if own:
            return own
        for field in self.fields:
            if _active(value := decoder.whole(field)):
                return shown(field, value)
        named = sorted(self.types & decoder.model_types)
        return f"model_type {named[0]}" if named else None


def shown(field: str, value: Any) -> str:
    """A field with its value, or the bare field where the value says no more."""
    return field if isinstance(value, bool) or not isinstance(value, int | float | str) else f"{field} {value}"


def assess(decoder: Decoder) -> Support:
    """The verdict that the configuration alone allows."""
    reasons = tuple(line for rule in RULES if (line := rule.applies(decoder)))
    if not reasons and (unknown := UNKNOWN.applies(decoder)):
        reasons = (unknown,)
    if reasons:
        return Support(Verdict.REFUSED, reasons)
    return Support(Verdict.SUPPORTED, notes=tuple(_notes(decoder)))


def _active(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {})


def _geometry(decoder: Decoder) -> Geometry | None:
    try:
        return decoder.geometry()
    except (LookupError, TypeError, ValueError):
        return None


def _head_size(decoder: Decoder) -> str | None:
    sizes = None if _active(decoder.get("qk_rope_head_dim")) else _geometry(decoder)
    return f"head_dim {sizes.head_dim}" if sizes and sizes.head_dim not in SUPPORTED_HEAD_DIMS else None


def _groups(decoder: Decoder) -> str | None:
    sizes = _geometry(decoder)
    uneven = sizes and sizes.num_query_heads % sizes.num_kv_heads
    return f"{sizes.num_query_heads} query heads, {sizes.num_kv_heads} KV heads" if sizes and uneven else None


def _window(decoder: Decoder) -> int:
    """The sliding window of some or all layers; 0 if there is none."""
    size, kinds = decoder.get("sliding_window"), decoder.layer_kinds
    # vLLM applies the window to the layers that are listed as sliding; to all, if nothing is listed.
    acts = decoder.get("use_sliding_window") is not False and (kinds is None or "sliding_attention" in kinds)
    return int(size) if acts and isinstance(size, int | float) else 0


def _mixed_windows(decoder: Decoder) -> str | None:
    window, kinds, pattern = _window(decoder), decoder.layer_kinds, decoder.get("sliding_window_pattern")
    if kinds and 0 < (sliding := kinds.count("sliding_attention")) < len(kinds):
        return f"sliding_window {decoder.get('sliding_window')} in {sliding} of {len(kinds)} layers"
    if window and not kinds and _active(pattern):
        return f"sliding_window {window} with {shown('sliding_window_pattern', pattern)}"
    return None


def _idle_window(decoder: Decoder) -> str | None:
    sizes, window = _geometry(decoder), _window(decoder)
    if _mixed_windows(decoder) or not (sizes and 0 < sizes.max_positions <= window):
        return None
    return f"sliding_window {window} in a context of {sizes.max_positions}"


def _uniform_window(decoder: Decoder) -> str | None:
    window = _window(decoder)
    if not window and set(decoder.layer_kinds or []) == {"sliding_attention"}:
        return "layers of type sliding_attention"
    everywhere = window and not _mixed_windows(decoder) and not _idle_window(decoder)
    return f"sliding_window {window}" if everywhere else None


_FULL = {"full_attention", "attention"}
_NAMED_ELSEWHERE = {"sliding_attention", "chunked_attention"}


def _other_layers(decoder: Decoder) -> str | None:
    other = sorted(set(decoder.layer_kinds or []) - _FULL - _NAMED_ELSEWHERE)
    return f"layers of type {', '.join(other)}" if other else None


def _state_space(decoder: Decoder) -> str | None:
    # Granite 4 carries its Mamba fields even where every layer attends.
    if decoder.layer_kinds and set(decoder.layer_kinds) <= _FULL:
        return None
    found = sorted(f for f, v in decoder.fields.items() if re.match(r"(mamba|n_mamba|ssm)_", f) and _active(v))
    return found[0] if found else None


def _chunked(decoder: Decoder) -> str | None:
    return "layers of type chunked_attention" if "chunked_attention" in (decoder.layer_kinds or []) else None


def _alibi(decoder: Decoder) -> str | None:
    inner = decoder.get("attn_config")
    if isinstance(inner, Mapping) and inner.get("alibi"):
        return "attn_config.alibi"
    return "position_embedding_type alibi" if decoder.get("position_embedding_type") == "alibi" else None


def _relative(decoder: Decoder) -> str | None:
    kind = str(decoder.get("position_embedding_type") or "")
    return f"position_embedding_type {kind}" if kind.startswith("relative") else None


def _sinks(decoder: Decoder) -> str | None:
    # vLLM gives Granite sinks as soon as layers are listed, unless the configuration denies it.
    granite = {"granite", "granitemoe", "granitemoeshared"} & decoder.model_types
    if granite and decoder.layer_kinds and decoder.get("attention_sinks") is not False:
        return f"layer_types in {min(granite)}"
    return None


def _shared_cache(decoder: Decoder) -> str | None:
    factor = decoder.get("cla_share_factor")
    return f"use_cla with cla_share_factor {factor}" if decoder.get("use_cla") and factor not in (None, 1) else None


def _uneven_layers(decoder: Decoder) -> str | None:
    for field in (*QUERY_HEADS, *KV_HEADS, *HEAD_DIM, "num_query_heads"):
        if isinstance(decoder.get(field), list | Mapping):
            return f"{field} is a list"
    return None


def _value_size(decoder: Decoder) -> str | None:
    sizes, value = _geometry(decoder), decoder.get("v_head_dim")
    if not sizes or value in (None, sizes.head_dim) or _active(decoder.get("kv_lora_rank")):
        return None
    return f"v_head_dim {value} with head_dim {sizes.head_dim}"


def _bidirectional(decoder: Decoder) -> str | None:
    if decoder.whole("is_causal") is False:
        return "is_causal false"
    # Segments of a text are for BERT and its many descendants, which are encoders unless they say otherwise.
    encoder = _active(decoder.get("type_vocab_size")) and decoder.get("is_decoder") is not True
    return f"model_type {decoder.model_type} with type_vocab_size" if encoder else None


_NO_GENERATOR = re.compile(
    r"For(SequenceClassification|TokenClassification|MaskedLM|\w*RewardModel|Retrieval|Ranking)$"
)


def _no_generator(decoder: Decoder) -> str | None:
    names = decoder.whole("architectures") or []
    found = [name for name in names if _NO_GENERATOR.search(str(name))] if isinstance(names, list) else []
    return f"architecture {found[0]}" if found else None


def _quantized_cache(decoder: Decoder) -> str | None:
    section = decoder.whole("quantization_config") or decoder.whole("compression_config")
    if not isinstance(section, Mapping):
        return None
    inner = section.get("quantization")
    for place in (section, inner if isinstance(inner, Mapping) else {}):
        for field in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if _active(place.get(field)):
                return f"quantization_config.{field}"
    return None


_UNUSUAL = re.compile(
    r"attn|attention|window|sliding|sink|alibi|chunk|lora_rank|mamba|ssm|recurr|linear_(attn|key|value|num|conv|layer)"
    r"|conv_|sparse|latent|cross_|share|kv_|_kv|layer_types|block_types|layers_block|per_layer|global|local|index_|indexer"
    r"|diff_|causal|compress|loop|memory|relative|position_bias|state_size|hybrid|noise"
)
_HARMLESS = re.compile(
    r"expert|moe|mlp|router|token|dropout|pdrop|vocab|tie_|_implementation|sparse_step|_norm|bias$|softmax_in_fp32"
    r"|^use_(flash|cache|memory)|_checkpointing|rope_|_multiplier|pretraining"
)
_JUDGED = {
    *LAYERS, *QUERY_HEADS, *KV_HEADS, *HIDDEN, *HEAD_DIM, *POSITIONS, "layer_types", "layers_block_type", "sliding_window",
    "use_sliding_window", "sliding_window_pattern", "max_window_layers", "use_cla", "cla_share_factor", "v_head_dim",
    "attn_config", "position_embedding_type",
}  # fmt: skip
"""Fields that the code above judges by their values."""


def _unknown_fields(decoder: Decoder) -> str | None:
    if decoder.model_type in READ_TYPES or decoder.model_type in RUN_TYPES:
        return None
    names = [
        field
        for field, value in decoder.fields.items()
        if _UNUSUAL.search(field) and not _HARMLESS.search(field) and field not in _JUDGED and _active(value)
    ]
    return f"model_type {decoder.model_type} with {', '.join(sorted(names))}" if names else None


_BOTH_WAYS = frozenset({
    "bagel", "bert", "big_bird", "camembert", "data2vec-text", "diffusion_gemma", "distilbert", "dream", "electra",
    "ernie", "gemma3", "hrm_text", "llada", "modernbert", "molmo2", "moondream3", "nomic_bert", "paligemma",
    "roberta", "xlm-roberta",
})  # fmt: skip
"""Encoders, diffusion models, and models whose images attend to themselves as a whole."""

_STATE_SPACE = frozenset({
    "bamba", "falcon_h1", "falcon_mamba", "jamba", "mamba", "mamba2", "nemotron_h", "nemotron_h_puzzle", "plamo2",
    "rwkv", "xlstm", "zamba", "zamba2",
})  # fmt: skip
"""All layers or some of them Mamba or the like."""

RULES: tuple[Rule, ...] = (
    Rule(
        "encoder-decoder",
        "encoder-decoder attention is not supported: its decoder reads keys of another sequence",
        fields=("is_encoder_decoder",),
        types=frozenset({"t5", "mt5", "umt5", "bart", "mbart", "whisper", "pegasus", "marian"}),
    ),
    Rule(
        "cross-attention",
        "cross-attention is not supported: those layers hold keys of an image or another sequence",
        fields=("cross_attention_layers", "add_cross_attention"),
    ),
    Rule(
        "state-space layers",
        "a state-space layer keeps a running state, not keys and values, and is not supported",
        fields=("state_size", "hybrid_override_pattern", "attn_layer_period", "attn_layer_indices"),
        types=_STATE_SPACE,
        evidence=_state_space,
    ),
    Rule(
        "linear attention",
        "linear attention keeps a running state, not keys and values, and is not supported",
        fields=("full_attention_interval", "linear_num_key_heads", "linear_attn_config", "attn_type_list"),
        types=frozenset({"bailing_hybrid", "kimi_linear", "minimax", "olmo_hybrid", "qwen3_next"}),
    ),
    Rule(
        "layers of other kinds",
        "only layers with full attention are supported",
        fields=("block_types", "full_attn_idxs", "conv_L_cache"),
        evidence=_other_layers,
    ),
    Rule(
        "latent attention",
        "latent attention is not supported: heads share one compressed vector, or have sizes of their own",
        fields=("kv_lora_rank", "qk_rope_head_dim", "compress_ratios"),
    ),
    Rule(
        "sparse attention",
        "sparse attention is not supported: its indexer reads a second cache",
        fields=("index_topk", "index_n_heads", "indexer_n_heads", "sparse_attention_config"),
    ),
    Rule(
        "window as long as the context",
        "sliding-window layers are not supported yet",
        evidence=_idle_window,
        way_out="this window never acts: set sliding_window to null in a copy of config.json",
    ),
    Rule(
        "sliding window",
        "sliding-window attention is not supported yet",
        fields=("sliding_window_size", "attention_window_size", "rswa_window"),
        evidence=_uniform_window,
        way_out="to serve contexts no longer than the window, where it changes nothing, set sliding_window to null and "
        "max_position_embeddings to the window in a copy of config.json",
    ),
    Rule(
        "sliding and full layers mixed",
        "sliding-window layers are not supported yet",
        fields=("interleaved_sliding_window", "hybrid_layer_pattern", "global_attn_every_n_layers"),
        evidence=_mixed_windows,
    ),
    Rule(
        "chunked attention",
        "attention inside chunks is not supported",
        fields=("attention_chunk_size",),
        evidence=_chunked,
    ),
    Rule(
        "dual chunk attention",
        "dual chunk attention is not supported: it rotates queries by several positions",
        fields=("dual_chunk_attention_config",),
        way_out="without this field the model attends fully, over the context it was first trained for",
    ),
    Rule(
        "soft-capping",
        "attention logit soft-capping is not supported",
        fields=("attn_logit_softcapping", "attn_logit_soft_cap", "attention_logit_cap"),
    ),
    Rule(
        "ALiBi",
        "ALiBi position biases are not supported",
        fields=("alibi", "use_alibi"),
        types=frozenset({"bloom", "mpt", "step1"}),
        evidence=_alibi,
    ),
    Rule(
        "relative position biases",
        "biases on attention scores are not supported",
        fields=("relative_attention_num_buckets", "relative_attention"),
        evidence=_relative,
    ),
    Rule(
        "attention sinks",
        "learned attention sinks are not supported",
        fields=(
            "attention_sinks",
            "add_swa_attention_sink_bias",
            "add_full_attention_sink_bias",
            "swa_attention_sink_enabled",
            "param_sink_number",
        ),
        types=frozenset({"gpt_oss"}),
        evidence=_sinks,
    ),
    Rule(
        "shared KV cache",
        "layers that share a KV cache are not supported",
        fields=("num_kv_shared_layers", "kv_source_layer_ids"),
        evidence=_shared_cache,
    ),
    Rule(
        "layers run several times",
        "a layer with several caches is not supported",
        fields=("loop_num", "total_ut_steps"),
    ),
    Rule(
        "differential attention",
        "differential attention is not supported",
        types=frozenset({"diffllama", "motif", "phi4flash"}),
    ),
    Rule(
        "layers of several sizes",
        "one slot size serves all layers, so that they must agree in heads and head_dim",
        fields=(
            "block_configs",
            "per_layer_config",
            "global_head_dim",
            "num_global_key_value_heads",
            "num_attention_heads_per_layer",
            "swa_head_dim",
            "swa_num_attention_heads",
            "swa_num_key_value_heads",
        ),
        evidence=_uneven_layers,
    ),
    Rule(
        "values of another size",
        "keys and values must have the same size",
        evidence=_value_size,
    ),
    Rule(
        "attention both ways",
        "tokens that attend to later ones are not supported",
        fields=("use_bidirectional_attention", "is_mm_prefix_lm"),
        types=_BOTH_WAYS,
        evidence=_bidirectional,
    ),
    Rule(
        "no text generator",
        "only models that generate text can be calibrated and served",
        evidence=_no_generator,
    ),
    Rule(
        "head size",
        f"this head size is not supported (supported: {', '.join(map(str, SUPPORTED_HEAD_DIMS))})",
        evidence=_head_size,
    ),
    Rule("uneven groups", "query heads are not a multiple of KV heads", evidence=_groups),
    Rule(
        "quantized KV cache in the checkpoint",
        "vLLM would set kv_cache_dtype by it, which must stay auto",
        evidence=_quantized_cache,
        way_out="take that field out of a copy of config.json",
    ),
)
"""In the order in which they are reported; a model is refused if one applies."""

UNKNOWN = Rule(
    "unknown fields of an unknown type",
    "nobody has looked at what these do to attention",
    evidence=_unknown_fields,
    way_out="if they leave causal attention over all tokens as it is, report the model",
)
"""Asked where no other rule applies."""


def _notes(decoder: Decoder) -> list[str]:
    """What a user of a supported model should know."""
    found = []
    kind = decoder.model_type
    if kind in RUN_TYPES:
        found.append(f"model type {kind} was run, with {RUN_TYPES[kind]}")
    elif kind in READ_TYPES:
        found.append(f"model type {kind} was never run here; its attention in vLLM 0.32 is plain")
    else:
        found.append(
            f"model type {kind} is not known here and was never run; its config.json looks like a plain decoder"
        )
    if decoder.section:
        found.append(f"{decoder.section} was judged; calibration measures text alone, no images or sound")
    if _active(window := decoder.fields.get("sliding_window")):
        found.append(f"sliding_window {window} acts in no layer")
    if rotary := _partial_rotary(decoder):
        found.append(
            f"partial rotary embedding ({rotary}): calibration measures keys as they are stored, so this is fine"
        )
    if scale := next((f for f in ("attention_multiplier", "query_pre_attn_scalar") if _active(decoder.get(f))), None):
        found.append(
            f"{scale}: calibration weighs keys against values by the usual 1/sqrt(head_dim), not by this scale"
        )
    if _active(decoder.whole("quantization_config")):
        found.append("quantized weights: the profile belongs to this checkpoint, not to the unquantized one")
    if _has_key_biases(decoder):
        found.append(KEY_BIAS_NOTE)
    return found


KEY_BIAS_NOTE = "keys have biases: only the weights show whether some layers are better left exact"


def _partial_rotary(decoder: Decoder) -> str | None:
    nested = decoder.get("rope_parameters")
    values = (
        {"rope_parameters.partial_rotary_factor": nested.get("partial_rotary_factor")}
        if isinstance(nested, dict)
        else {}
    )
    values |= {name: decoder.get(name) for name in ("partial_rotary_factor", "rotary_pct", "rotary_dim")}
    return next((shown(name, value) for name, value in values.items() if value not in (None, 1, 1.0)), None)


def _has_key_biases(decoder: Decoder) -> bool:
    """Types whose keys always have a bias, and fields that say so."""
    flags = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias")
    always = decoder.model_type.startswith("qwen2") or decoder.model_type in {"gpt2", "opt", "phi", "gpt_neox"}
    return always or any(decoder.get(flag) is True for flag in flags)

"""The obstacles: one rule each.

What a rule says holds for vLLM 0.32. A type that nobody looked at passes only if none of its fields hints at an attention
that we do not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_spectral.models import evidence
from vllm_spectral.models.decoder import Decoder
from vllm_spectral.models.evidence import active, shown
from vllm_spectral.models.known import BOTH_WAYS, STATE_SPACE, SUPPORTED_HEAD_DIMS


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
            if active(value := decoder.whole(field)):
                return shown(field, value)
        named = sorted(self.types & decoder.model_types)
        return f"model_type {named[0]}" if named else None


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
        types=STATE_SPACE,
        evidence=evidence.state_space,
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
        evidence=evidence.other_layers,
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
        evidence=evidence.idle_window,
        way_out="this window never acts: set sliding_window to null in a copy of config.json",
    ),
    Rule(
        "sliding window",
        "sliding-window attention is not supported yet",
        fields=("sliding_window_size", "attention_window_size", "rswa_window"),
        evidence=evidence.uniform_window,
        way_out="to serve contexts no longer than the window, where it changes nothing, set sliding_window to null and "
        "max_position_embeddings to the window in a copy of config.json",
    ),
    Rule(
        "sliding and full layers mixed",
        "sliding-window layers are not supported yet",
        fields=("interleaved_sliding_window", "hybrid_layer_pattern", "global_attn_every_n_layers"),
        evidence=evidence.mixed_windows,
    ),
    Rule(
        "chunked attention",
        "attention inside chunks is not supported",
        fields=("attention_chunk_size",),
        evidence=evidence.chunked,
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
        evidence=evidence.alibi,
    ),
    Rule(
        "relative position biases",
        "biases on attention scores are not supported",
        fields=("relative_attention_num_buckets", "relative_attention"),
        evidence=evidence.relative,
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
        evidence=evidence.sinks,
    ),
    Rule(
        "shared KV cache",
        "layers that share a KV cache are not supported",
        fields=("num_kv_shared_layers", "kv_source_layer_ids"),
        evidence=evidence.shared_cache,
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
        evidence=evidence.uneven_layers,
    ),
    Rule(
        "values of another size",
        "keys and values must have the same size",
        evidence=evidence.value_size,
    ),
    Rule(
        "attention both ways",
        "tokens that attend to later ones are not supported",
        fields=("use_bidirectional_attention", "is_mm_prefix_lm"),
        types=BOTH_WAYS,
        evidence=evidence.bidirectional,
    ),
    Rule(
        "no text generator",
        "only models that generate text can be calibrated and served",
        evidence=evidence.no_generator,
    ),
    Rule(
        "head size",
        f"this head size is not supported (supported: {', '.join(map(str, SUPPORTED_HEAD_DIMS))})",
        evidence=evidence.head_size,
    ),
    Rule("uneven groups", "query heads are not a multiple of KV heads", evidence=evidence.groups),
    Rule(
        "quantized KV cache in the checkpoint",
        "vLLM would set kv_cache_dtype by it, which must stay auto",
        evidence=evidence.quantized_cache,
        way_out="take that field out of a copy of config.json",
    ),
)
"""In the order in which they are reported; a model is refused if one applies."""

UNKNOWN = Rule(
    "unknown fields of an unknown type",
    "nobody has looked at what these do to attention",
    evidence=evidence.unknown_fields,
    way_out="if they leave causal attention over all tokens as it is, report the model",
)
"""Asked where no other rule applies."""

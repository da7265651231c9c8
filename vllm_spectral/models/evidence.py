"""What a configuration's values say of its attention, beyond which fields are there: one function per obstacle.

Each returns the evidence in a few words, or None where there is none. What they say holds for vLLM 0.32: it was read in the
model code there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
from vllm_spectral.models.known import READ_TYPES, RUN_TYPES, SUPPORTED_HEAD_DIMS


def shown(field: str, value: Any) -> str:
    """A field with its value, or the bare field where the value says no more."""
    return field if isinstance(value, bool) or not isinstance(value, int | float | str) else f"{field} {value}"


def active(value: Any) -> bool:
    """Whether a field is there, and neither null, false, 0 nor empty."""
    return value not in (None, False, 0, "", [], {})


def _geometry(decoder: Decoder) -> Geometry | None:
    try:
        return decoder.geometry()
    except (LookupError, TypeError, ValueError):
        return None


def head_size(decoder: Decoder) -> str | None:
    """Of a head size without kernels."""
    sizes = None if active(decoder.get("qk_rope_head_dim")) else _geometry(decoder)
    return f"head_dim {sizes.head_dim}" if sizes and sizes.head_dim not in SUPPORTED_HEAD_DIMS else None


def groups(decoder: Decoder) -> str | None:
    """Of query heads that do not share KV heads evenly."""
    sizes = _geometry(decoder)
    uneven = sizes and sizes.num_query_heads % sizes.num_kv_heads
    return f"{sizes.num_query_heads} query heads, {sizes.num_kv_heads} KV heads" if sizes and uneven else None


def _window(decoder: Decoder) -> int:
    """The sliding window of some or all layers; 0 if there is none."""
    size, kinds = decoder.get("sliding_window"), decoder.layer_kinds
    # vLLM applies the window to the layers that are listed as sliding; to all, if nothing is listed.
    acts = decoder.get("use_sliding_window") is not False and (kinds is None or "sliding_attention" in kinds)
    return int(size) if acts and isinstance(size, int | float) else 0


def mixed_windows(decoder: Decoder) -> str | None:
    """Of a sliding window in some layers."""
    window, kinds, pattern = _window(decoder), decoder.layer_kinds, decoder.get("sliding_window_pattern")
    if kinds and 0 < (sliding := kinds.count("sliding_attention")) < len(kinds):
        return f"sliding_window {decoder.get('sliding_window')} in {sliding} of {len(kinds)} layers"
    if window and not kinds and active(pattern):
        return f"sliding_window {window} with {shown('sliding_window_pattern', pattern)}"
    return None


def idle_window(decoder: Decoder) -> str | None:
    """Of a sliding window that no context outgrows."""
    sizes, window = _geometry(decoder), _window(decoder)
    if mixed_windows(decoder) or not (sizes and 0 < sizes.max_positions <= window):
        return None
    return f"sliding_window {window} in a context of {sizes.max_positions}"


def uniform_window(decoder: Decoder) -> str | None:
    """Of a sliding window that acts in all layers."""
    window = _window(decoder)
    if not window and set(decoder.layer_kinds or []) == {"sliding_attention"}:
        return "layers of type sliding_attention"
    everywhere = window and not mixed_windows(decoder) and not idle_window(decoder)
    return f"sliding_window {window}" if everywhere else None


_FULL = {"full_attention", "attention"}
_NAMED_ELSEWHERE = {"sliding_attention", "chunked_attention"}


def other_layers(decoder: Decoder) -> str | None:
    """Of layers of kinds that no other function names."""
    other = sorted(set(decoder.layer_kinds or []) - _FULL - _NAMED_ELSEWHERE)
    return f"layers of type {', '.join(other)}" if other else None


def state_space(decoder: Decoder) -> str | None:
    """Of layers with a running state."""
    # Granite 4 carries its Mamba fields even where every layer attends.
    if decoder.layer_kinds and set(decoder.layer_kinds) <= _FULL:
        return None
    found = sorted(f for f, v in decoder.fields.items() if re.match(r"(mamba|n_mamba|ssm)_", f) and active(v))
    return found[0] if found else None


def chunked(decoder: Decoder) -> str | None:
    """Of layers that attend inside chunks."""
    return "layers of type chunked_attention" if "chunked_attention" in (decoder.layer_kinds or []) else None


def alibi(decoder: Decoder) -> str | None:
    """Of ALiBi, where no field has its name."""
    inner = decoder.get("attn_config")
    if isinstance(inner, Mapping) and inner.get("alibi"):
        return "attn_config.alibi"
    return "position_embedding_type alibi" if decoder.get("position_embedding_type") == "alibi" else None


def relative(decoder: Decoder) -> str | None:
    """Of biases by relative position."""
    kind = str(decoder.get("position_embedding_type") or "")
    return f"position_embedding_type {kind}" if kind.startswith("relative") else None


def sinks(decoder: Decoder) -> str | None:
    """Of learned attention sinks."""
    # vLLM gives Granite sinks as soon as layers are listed, unless the configuration denies it.
    granite = {"granite", "granitemoe", "granitemoeshared"} & decoder.model_types
    if granite and decoder.layer_kinds and decoder.get("attention_sinks") is not False:
        return f"layer_types in {min(granite)}"
    return None


def shared_cache(decoder: Decoder) -> str | None:
    """Of layers that read the cache of others."""
    factor = decoder.get("cla_share_factor")
    return f"use_cla with cla_share_factor {factor}" if decoder.get("use_cla") and factor not in (None, 1) else None


def uneven_layers(decoder: Decoder) -> str | None:
    """Of sizes that are lists, one for each layer."""
    for field in (*QUERY_HEADS, *KV_HEADS, *HEAD_DIM, "num_query_heads"):
        if isinstance(decoder.get(field), list | Mapping):
            return f"{field} is a list"
    return None


def value_size(decoder: Decoder) -> str | None:
    """Of values that are larger or smaller than keys."""
    sizes, value = _geometry(decoder), decoder.get("v_head_dim")
    if not sizes or value in (None, sizes.head_dim) or active(decoder.get("kv_lora_rank")):
        return None
    return f"v_head_dim {value} with head_dim {sizes.head_dim}"


def bidirectional(decoder: Decoder) -> str | None:
    """Of tokens that attend to later ones."""
    if decoder.whole("is_causal") is False:
        return "is_causal false"
    # Segments of a text are for BERT and its many descendants, which are encoders unless they say otherwise.
    encoder = active(decoder.get("type_vocab_size")) and decoder.get("is_decoder") is not True
    return f"model_type {decoder.model_type} with type_vocab_size" if encoder else None


_NO_GENERATOR = re.compile(
    r"For(SequenceClassification|TokenClassification|MaskedLM|\w*RewardModel|Retrieval|Ranking)$"
)


def no_generator(decoder: Decoder) -> str | None:
    """Of a head that generates no text."""
    names = decoder.whole("architectures") or []
    found = [name for name in names if _NO_GENERATOR.search(str(name))] if isinstance(names, list) else []
    return f"architecture {found[0]}" if found else None


def quantized_cache(decoder: Decoder) -> str | None:
    """Of a checkpoint that chooses the type of the cache."""
    section = decoder.whole("quantization_config") or decoder.whole("compression_config")
    if not isinstance(section, Mapping):
        return None
    inner = section.get("quantization")
    for place in (section, inner if isinstance(inner, Mapping) else {}):
        for field in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if active(place.get(field)):
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


def unknown_fields(decoder: Decoder) -> str | None:
    """Of fields that hint at attention, in a type that nobody looked at."""
    if decoder.model_type in READ_TYPES or decoder.model_type in RUN_TYPES:
        return None
    names = [
        field
        for field, value in decoder.fields.items()
        if _UNUSUAL.search(field) and not _HARMLESS.search(field) and field not in _JUDGED and active(value)
    ]
    return f"model_type {decoder.model_type} with {', '.join(sorted(names))}" if names else None

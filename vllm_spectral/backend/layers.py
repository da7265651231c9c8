"""Finding an attention layer from inside its implementation, and refusing layers we cannot serve."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_spectral.errors import UnsupportedModelError


class StepLengths(Protocol):
    """What every attention metadata says of a step.

    Attributes:
        num_actual_tokens: tokens, padding not included.
        query_start_loc: ``[num_requests + 1]`` int32, first token of each request, and the end.
        seq_lens: ``[num_requests]`` int32, tokens after the step.
    """

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor


def layer_of(impl: AttentionImpl, vllm_config: VllmConfig) -> tuple[str, int, Any]:
    """Name, index and module of the layer that owns ``impl``.

    An implementation is created before its layer is complete and is never told its name; vLLM's forward context
    knows every attention layer by name.
    """
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if getattr(layer, "impl", None) is impl:
            return name, extract_layer_index(name), layer
    raise RuntimeError("the attention implementation belongs to no registered layer")


def requests_of(metadata: StepLengths) -> Iterator[tuple[int, slice, int]]:
    """``(place in the batch, rows of the step, tokens after the step)`` of every request with tokens in the step."""
    starts = metadata.query_start_loc.tolist()
    for request, context_len in enumerate(metadata.seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        if rows.start < rows.stop:
            yield request, rows, context_len


def positions_of(metadata: StepLengths) -> Tensor:
    """``[num_tokens]`` int64: the place of every token of the step in its request."""
    lengths: Tensor = metadata.query_start_loc.diff()
    first: Tensor = (metadata.seq_lens - lengths).repeat_interleave(lengths)
    offset: Tensor = metadata.query_start_loc[:-1].repeat_interleave(lengths)
    return torch.arange(len(first)) - offset + first


def require_supported(impl: AttentionImpl, name: str) -> None:
    """Raise :class:`UnsupportedModelError` for attention that compressed pages would get wrong."""
    problems = {
        "attention that is not causal self-attention": impl.attn_type != AttentionType.DECODER,
        "sliding-window attention": impl.sliding_window not in (-1, (-1, -1)),
        "ALiBi position biases": impl.alibi_slopes is not None,
        "attention logit soft-capping": bool(impl.logits_soft_cap),
        "learned attention sinks": impl.sinks is not None,
        "a KV cache shared with another layer": impl.kv_sharing_target_layer_name is not None,
        f"kv_cache_dtype {impl.kv_cache_dtype} (leave it at auto)": impl.kv_cache_dtype != "auto",
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedModelError(f"{name} uses {' and '.join(found)}, which spectral pages do not support")

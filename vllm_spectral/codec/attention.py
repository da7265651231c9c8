"""Attention over compressed pages, in the rotated domain: the reference for every kernel.

With orthogonal ``U_k`` and ``U_v``, ``q . k = (q U_k) . (k U_k)`` and ``sum p v = (sum p (v U_v)) U_v^T``. So the
query is rotated once, values are accumulated rotated, and the output is un-rotated once; the cache never is.
Softmax runs over tiles of keys with a running maximum (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018), so that the decoded tile, not the context, bounds the workspace.

Everything is summed in float64 and rounded once. A matrix product sums in an order that depends on its shape, hence on
how a prompt was cut and who else is in the batch; in float32 that would change a hidden state now and then, the hidden
state a stored code, and the code every later token. See the contract in ``docs/architecture.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import rotate, unrotate

KEY_TILE_TOKENS = 512
"""Tokens decoded at a time (rounded to whole blocks)."""
QUERY_TILE_TOKENS = 256
"""Queries that attend to a decoded tile at a time."""


def workspace_bytes(num_query_heads: int, num_heads: int, head_dim: int) -> int:
    """Largest float64 workspace of :func:`paged_attention`, in bytes: a decoded tile of K and V, and its scores."""
    decoded = 2 * KEY_TILE_TOKENS * num_heads * head_dim
    scores = 2 * num_query_heads * QUERY_TILE_TOKENS * KEY_TILE_TOKENS
    return 8 * (decoded + scores)


def paged_attention(
    query: Tensor, pages: Tensor, blocks: Tensor, context_len: int, codec: LayerCodec, scale: float
) -> Tensor:
    """Causal attention of one request's newest tokens over its compressed pages.

    The queries are the last ``num_queries`` tokens of the context; their own keys and values are stored already,
    and like all others they are read in compressed form.

    Args:
        query: ``[num_queries, num_query_heads, head_dim]``, any float dtype.
        pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.
        blocks: ``[>= ceil(context_len / block_size)]`` int, physical blocks of the request in order.
        context_len: tokens stored, the queries included.
        codec: the layer's codec.
        scale: factor of the scores, usually ``head_dim ** -0.5``.

    Returns:
        ``[num_queries, num_query_heads, head_dim]`` float32.
    """
    num_queries, num_query_heads, head_dim = query.shape
    num_heads = codec.layout.num_heads
    group = num_query_heads // num_heads
    block_size = pages.shape[2]
    # [H, G * Tq, D]: the queries that share a KV head become rows of one matrix.
    grouped = rotate(query.view(num_queries, num_heads, group, head_dim).transpose(1, 2), codec.keys.basis)
    grouped = (grouped.double() * scale).permute(2, 1, 0, 3)
    position = torch.arange(context_len - num_queries, context_len)
    output = torch.zeros(num_heads, group, num_queries, head_dim, dtype=torch.float64)
    total = torch.zeros(num_heads, group, num_queries, 1, dtype=torch.float64)
    peak = torch.full_like(total, -torch.inf)
    step = max(KEY_TILE_TOKENS // block_size, 1)
    for first in range(0, -(-context_len // block_size), step):
        slots = codec.layout.read(pages, blocks[first : first + step])
        start = first * block_size
        slots = slots[: context_len - start]
        keys = codec.decode_keys(slots).double().permute(1, 2, 0).unsqueeze(1)
        values = codec.decode_values(slots).double().transpose(0, 1).unsqueeze(1)
        key_position = torch.arange(start, start + slots.shape[0])
        for low in range(0, num_queries, QUERY_TILE_TOKENS):
            rows = slice(low, low + QUERY_TILE_TOKENS)
            if position[rows][-1] < start:
                continue
            scores = grouped[:, :, rows] @ keys
            scores.masked_fill_(key_position > position[rows, None], -torch.inf)
            new_peak = torch.maximum(peak[:, :, rows], scores.amax(-1, keepdim=True))
            # A query before this tile sees nothing yet: keep its peak finite so that exp(-inf - peak) is 0, not NaN.
            safe_peak = new_peak.clamp_min(torch.finfo(torch.float64).min)
            weights = scores.sub_(safe_peak).exp_()
            decay = (peak[:, :, rows] - safe_peak).exp()
            output[:, :, rows] = output[:, :, rows] * decay + weights @ values
            total[:, :, rows] = total[:, :, rows] * decay + weights.sum(-1, keepdim=True)
            peak[:, :, rows] = new_peak
    rotated = (output / total).permute(2, 1, 0, 3)
    return unrotate(rotated, codec.values.basis).transpose(1, 2).reshape(num_queries, num_query_heads, head_dim)

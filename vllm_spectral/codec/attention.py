"""Attention over compressed pages, in the rotated domain: the reference for every kernel.

With orthogonal ``U_k`` and ``U_v``, ``q . k = (q U_k) . (k U_k)`` and ``sum p v = (sum p (v U_v)) U_v^T``. So the
query is rotated once, values are accumulated rotated, and the output is un-rotated once; the cache never is.

Some positions may be read from exact copies instead. The two parts of the context are attended to separately, each with
its own maximum and sum, and merged by log-sum-exp; within a part, softmax runs over tiles of keys with a running maximum
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), so that the tile, not the context, bounds
the workspace.

Everything is summed in float64 and rounded once. A matrix product sums in an order that depends on its shape, hence on
how a prompt was cut and who else is in the batch; in float32 that would change a hidden state now and then, the hidden
state a stored code, and the code every later token. See the contract in ``docs/architecture.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import rotate, unrotate

KEY_TILE_TOKENS = 512
"""Tokens decoded at a time (rounded to whole blocks)."""
QUERY_TILE_TOKENS = 256
"""Queries that attend to a decoded tile at a time."""


@dataclass(frozen=True)
class ExactTokens:
    """Positions of which exact copies are at hand, and which queries read them.

    A query at position ``p`` reads position ``j`` exactly if ``j`` is among ``positions`` and ``j < first`` or
    ``p - j < recent``; else from its page.

    Attributes:
        positions: ``[n]`` int64, rising.
        keys, values: ``[n, num_heads, head_dim]``, any float dtype, not rotated.
        first, recent: see above.
    """

    positions: Tensor
    keys: Tensor
    values: Tensor
    first: int
    recent: int

    def read_by(self, queries: Tensor, positions: Tensor) -> Tensor:
        """``[num_queries, num_positions]`` bool: does the query's window hold the position."""
        return (positions < self.first) | (queries[:, None] - positions < self.recent)


class _Part:
    """Softmax numerator and denominator over the keys seen so far, ``[H, G, T, .]`` float64."""

    def __init__(self, num_heads: int, group: int, num_queries: int, head_dim: int) -> None:
        self.output = torch.zeros(num_heads, group, num_queries, head_dim, dtype=torch.float64)
        self.total = torch.zeros(num_heads, group, num_queries, 1, dtype=torch.float64)
        self.peak = torch.full_like(self.total, -torch.inf)

    def add(self, rows: slice, scores: Tensor, values: Tensor) -> None:
        """Add a tile; ``scores`` (``[H, G, rows, n]``, -inf where unseen) are overwritten."""
        peak = torch.maximum(self.peak[:, :, rows], scores.amax(-1, keepdim=True))
        # A query that has seen nothing yet: keep its peak finite so that exp(-inf - peak) is 0, not NaN.
        safe_peak = peak.clamp_min(torch.finfo(torch.float64).min)
        weights = scores.sub_(safe_peak).exp_()
        decay = (self.peak[:, :, rows] - safe_peak).exp()
        self.output[:, :, rows] = self.output[:, :, rows] * decay + weights @ values
        self.total[:, :, rows] = self.total[:, :, rows] * decay + weights.sum(-1, keepdim=True)
        self.peak[:, :, rows] = peak

    def weights_beside(self, other: _Part) -> Tensor:
        """What this part's output is to be multiplied with when both are merged, ``[H, G, T, 1]``."""
        peak = torch.maximum(self.peak, other.peak)
        mine, theirs = (self.peak - peak).exp(), (other.peak - peak).exp()
        return mine / (mine * self.total + theirs * other.total)


def workspace_bytes(num_query_heads: int, num_heads: int, head_dim: int) -> int:
    """Largest float64 workspace of :func:`paged_attention`, in bytes: a decoded tile of K and V, and its scores."""
    decoded = 2 * KEY_TILE_TOKENS * num_heads * head_dim
    scores = 2 * num_query_heads * QUERY_TILE_TOKENS * KEY_TILE_TOKENS
    return 8 * (decoded + scores)


def paged_attention(
    query: Tensor,
    pages: Tensor,
    blocks: Tensor,
    context_len: int,
    codec: LayerCodec,
    scale: float,
    exact: ExactTokens | None = None,
) -> Tensor:
    """Causal attention of one request's newest tokens over its context.

    The queries are the last ``num_queries`` tokens of the context; their own keys and values are stored already.

    Args:
        query: ``[num_queries, num_query_heads, head_dim]``, any float dtype.
        pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.
        blocks: ``[>= ceil(context_len / block_size)]`` int, physical blocks of the request in order.
        context_len: tokens stored, the queries included.
        codec: the layer's codec.
        scale: factor of the scores, usually ``head_dim ** -0.5``.
        exact: what is to be read from exact copies; None to read everything from pages.

    Returns:
        ``[num_queries, num_query_heads, head_dim]`` float32.
    """
    num_queries, num_query_heads, head_dim = query.shape
    num_heads = codec.layout.num_heads
    group = num_query_heads // num_heads
    # [T, G, H, D]: the queries that share a KV head become rows of one matrix.
    grouped = query.view(num_queries, num_heads, group, head_dim).transpose(1, 2)
    position = torch.arange(context_len - num_queries, context_len)
    paged = _Part(num_heads, group, num_queries, head_dim)
    rotated = rotate(grouped, codec.keys.basis).double() * scale
    _attend_pages(paged, rotated.permute(2, 1, 0, 3), position, pages, blocks, codec, exact)
    # Without copies the second part is empty and weighs nothing.
    copies = _Part(num_heads, group, num_queries, head_dim)
    if exact is not None:
        _attend_copies(copies, (grouped.double() * scale).permute(2, 1, 0, 3), position, exact)
    turned = unrotate((paged.output * paged.weights_beside(copies)).permute(2, 1, 0, 3), codec.values.basis)
    plain = (copies.output * copies.weights_beside(paged)).permute(2, 1, 0, 3)
    return (turned + plain).float().transpose(1, 2).reshape(num_queries, num_query_heads, head_dim)


def exact_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of one request's tokens over themselves, nothing compressed: what an exact cache answers.

    Args:
        query: ``[num_tokens, num_query_heads, head_dim]``.
        keys, values: ``[num_tokens, num_heads, head_dim]``.
        scale: factor of the scores.

    Returns:
        ``[num_tokens, num_query_heads, head_dim]`` float32.
    """
    q, k, v = (tensor.transpose(0, 1).float() for tensor in (query, keys, values))
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return attended.transpose(0, 1)


def _query_tiles(num_queries: int) -> list[slice]:
    return [slice(low, min(low + QUERY_TILE_TOKENS, num_queries)) for low in range(0, num_queries, QUERY_TILE_TOKENS)]


def _attend_pages(
    part: _Part,
    rotated: Tensor,
    position: Tensor,
    pages: Tensor,
    blocks: Tensor,
    codec: LayerCodec,
    exact: ExactTokens | None,
) -> None:
    """Add every key that is read from its page; ``rotated`` are the scaled queries, ``[H, G, T, D]``."""
    context_len, block_size = int(position[-1]) + 1, pages.shape[2]
    has_copy = torch.zeros(context_len, dtype=torch.bool)
    if exact is not None:
        has_copy[exact.positions] = True
    step = max(KEY_TILE_TOKENS // block_size, 1)
    for first in range(0, -(-context_len // block_size), step):
        start = first * block_size
        slots = codec.layout.read(pages, blocks[first : first + step])[: context_len - start]
        keys = codec.decode_keys(slots).double().permute(1, 2, 0).unsqueeze(1)
        values = codec.decode_values(slots).double().transpose(0, 1).unsqueeze(1)
        key_position = torch.arange(start, start + slots.shape[0])
        for rows in _query_tiles(len(position)):
            queries = position[rows]
            if queries[-1] < start:
                continue
            hidden = key_position > queries[:, None]
            if exact is not None:
                hidden |= has_copy[key_position] & exact.read_by(queries, key_position)
            part.add(rows, (rotated[:, :, rows] @ keys).masked_fill_(hidden, -torch.inf), values)


def _attend_copies(part: _Part, grouped: Tensor, position: Tensor, exact: ExactTokens) -> None:
    """Add every key that is read from its exact copy; ``grouped`` are the scaled queries, ``[H, G, T, D]``."""
    for rows in _query_tiles(len(position)):
        queries = position[rows]
        near = exact.positions > queries[0] - exact.recent
        index = (((exact.positions < exact.first) | near) & (exact.positions <= queries[-1])).nonzero()[:, 0]
        if not len(index):
            continue
        keys = exact.keys[index].double().permute(1, 2, 0).unsqueeze(1)
        values = exact.values[index].double().transpose(0, 1).unsqueeze(1)
        key_position = exact.positions[index]
        seen = (key_position <= queries[:, None]) & exact.read_by(queries, key_position)
        part.add(rows, (grouped[:, :, rows] @ keys).masked_fill_(~seen, -torch.inf), values)

"""Attention in which near and first tokens are read exactly and all others as a rival restores them."""

from __future__ import annotations

import torch
from torch import Tensor

_QUERY_TILE = 256


def windowed_attention(
    query: Tensor, keys: Tensor, values: Tensor, restored: tuple[Tensor, Tensor], first: int, recent: int, scale: float
) -> Tensor:
    """Causal attention of a whole request, in float32.

    A query at position ``p`` reads position ``j`` exactly if ``j < first`` or ``p - j < recent``.

    Args:
        query: ``[num_tokens, num_query_heads, head_dim]``.
        keys, values: ``[num_tokens, num_heads, head_dim]``, as the model produced them.
        restored: keys and values as read back from the rival's cache, same shapes.
        first, recent: see above; 0 and 0 for none.
        scale: factor of the scores.

    Returns:
        ``[num_tokens, num_query_heads, head_dim]`` float32.
    """
    num_tokens, num_heads, head_dim = keys.shape
    group = query.shape[1] // num_heads
    grouped = query.float().view(num_tokens, num_heads, group, head_dim).permute(1, 2, 0, 3) * scale
    exact_keys, exact_values, far_keys, far_values = (
        t.float().transpose(0, 1).unsqueeze(1) for t in (keys, values, *restored)
    )
    difference = exact_values - far_values
    output = torch.empty(num_heads, group, num_tokens, head_dim)
    for low in range(0, num_tokens, _QUERY_TILE):
        high = min(low + _QUERY_TILE, num_tokens)
        row = torch.arange(low, high)[:, None]
        scores = grouped[:, :, low:high] @ far_keys[:, :, :high].mT
        # Only two narrow strips of the scores are exact: the first columns, and a band along the diagonal.
        strips = [(0, min(first, high)), (min(max(low - recent + 1, first, 0), high), high)] if first or recent else []
        masks = []
        for start, stop in strips:
            column = torch.arange(start, stop)
            near = (column < first) | (row - column < recent)
            own = grouped[:, :, low:high] @ exact_keys[:, :, start:stop].mT
            scores[..., start:stop] = torch.where(near, own, scores[..., start:stop])
            masks.append(near)
        scores.masked_fill_(torch.arange(high) > row, -torch.inf)
        weights = scores.softmax(-1)
        tile = weights @ far_values[:, :, :high]
        for (start, stop), near in zip(strips, masks, strict=True):
            tile += (weights[..., start:stop] * near) @ difference[:, :, start:stop]
        output[:, :, low:high] = tile
    return output.permute(2, 0, 1, 3).reshape(num_tokens, num_heads * group, head_dim)

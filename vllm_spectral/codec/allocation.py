"""Integer water-filling: how many bits each rotated channel gets.

The error of a channel with variance ``v`` under ``b`` bits is ``v * D(b)``, where ``D`` is the codebook's
distortion. Reverse water-filling (Cover and Thomas, "Elements of Information Theory", 10.3.3) spends the next bit
where it lowers the summed error most; with integer bits and a convex ``D`` the greedy order is exact.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import MAX_BITS, normal_distortion

BLOCK_CHANNELS = 4
"""Neighbouring channels that share one bit width, so that a kernel unpacks whole groups and never a lone channel."""


def water_fill(
    variances: Tensor,
    budget_bits: int,
    *,
    block: int = BLOCK_CHANNELS,
    distortion: Sequence[float] | None = None,
) -> Tensor:
    """Allocate a shared budget over channels.

    Args:
        variances: ``[num_channels]`` float, the weighted error a channel causes when nothing of it is stored.
            K and V share one budget by being concatenated here.
        budget_bits: total bits to spend; at most ``num_channels * MAX_BITS`` can be used.
        block: channels per block; ``num_channels`` must be a multiple.
        distortion: relative error for 0 to ``MAX_BITS`` bits, falling and convex; default: unit normal, Lloyd-Max.

    Returns:
        ``[num_channels]`` int64 bits, equal inside each block; their sum is at most ``budget_bits`` and short of it
        by less than ``block``, unless every channel has ``MAX_BITS``.

    Raises:
        ValueError: if the shapes or the budget make no sense.
    """
    if variances.ndim != 1 or variances.numel() % block:
        raise ValueError(f"variances must be [n * {block}], got {tuple(variances.shape)}")
    if budget_bits < 0:
        raise ValueError(f"the budget must not be negative, got {budget_bits}")
    curve = tuple(distortion or normal_distortion())
    weight = variances.double().clamp_min(0).view(-1, block).sum(dim=1).tolist()
    bits = [0] * len(weight)
    # Ties go to the earlier block: the order, and with it the profile, is reproducible.
    heap = [(-w * (curve[0] - curve[1]), index) for index, w in enumerate(weight)]
    heapq.heapify(heap)
    left = budget_bits
    while heap and left >= block:
        _, index = heapq.heappop(heap)
        bits[index] += 1
        left -= block
        if bits[index] < MAX_BITS:
            b = bits[index]
            heapq.heappush(heap, (-weight[index] * (curve[b] - curve[b + 1]), index))
    return torch.tensor(bits).repeat_interleave(block)


def flat_fill(num_channels: int, budget_bits: int) -> Tensor:
    """Spread a budget as evenly as integers allow: the allocation of the outlier fallback.

    Args:
        num_channels: channels to serve.
        budget_bits: total bits.

    Returns:
        ``[num_channels]`` int64 bits that differ by at most one, the larger ones first.
    """
    base, extra = divmod(min(budget_bits, num_channels * MAX_BITS), num_channels)
    return torch.full((num_channels,), base) + (torch.arange(num_channels) < extra).long()

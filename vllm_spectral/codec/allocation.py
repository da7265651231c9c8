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


def water_fill(variances: Tensor, budget_bits: int, *, distortion: Sequence[float] | None = None) -> Tensor:
    """Allocate a budget over channels.

    Args:
        variances: ``[num_channels]`` float, the weighted error a channel causes when nothing of it is stored.
        budget_bits: total bits to spend; at most ``num_channels * MAX_BITS`` can be used.
        distortion: relative error for 0 to ``MAX_BITS`` bits, falling and convex; default: unit normal, Lloyd-Max.

    Returns:
        ``[num_channels]`` int64 bits that sum to ``budget_bits``, unless every channel has ``MAX_BITS``.

    Raises:
        ValueError: if the shape or the budget makes no sense.
    """
    if variances.ndim != 1:
        raise ValueError(f"variances must be [num_channels], got {tuple(variances.shape)}")
    if budget_bits < 0:
        raise ValueError(f"the budget must not be negative, got {budget_bits}")
    curve = tuple(distortion or normal_distortion())
    weight = variances.double().clamp_min(0).tolist()
    bits = [0] * len(weight)
    # Ties go to the earlier channel: the order, and with it the profile, is reproducible.
    heap = [(-w * (curve[0] - curve[1]), index) for index, w in enumerate(weight)]
    heapq.heapify(heap)
    for _ in range(budget_bits):
        if not heap:
            break
        _, index = heapq.heappop(heap)
        bits[index] += 1
        if bits[index] < MAX_BITS:
            b = bits[index]
            heapq.heappush(heap, (-weight[index] * (curve[b] - curve[b + 1]), index))
    return torch.tensor(bits)


def remaining_error(variances: Tensor, bits: Tensor) -> float:
    """Summed error of an allocation, ``[num_channels]`` each, in the variances' unit."""
    return float((variances.double().clamp_min(0) * torch.tensor(normal_distortion()).double()[bits]).sum())


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

"""Is the text that a profile is measured on broad enough for what else may be served?

A narrow text has channels of next to no energy, which get no bits, and which other text may use. So the built-in
prompts, which are broad, are measured beside the user's text, and what a profile of the text would make of them is
compared with what a profile of their own would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import normal_distortion
from vllm_spectral.codec.rotation import channel_energy
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.moments import LayerMoments


def excess_error(profile: Sequence[LayerProfile], own: Sequence[LayerMoments], other: Sequence[LayerMoments]) -> float:
    """How much better a profile serves the text it was made of than another.

    Args:
        profile: the layers made from ``own``.
        own: moments of the text.
        other: moments of the other text.

    Returns:
        Ratio of the expected relative quantization errors, other over own; geometric mean over layers, heads, keys
        and values. Expected means: every channel has its variance times the distortion of its bits.
    """
    ratios = [
        (_relative_error(layer, b) / _relative_error(layer, a)).log()
        for layer, a, b in zip(profile, own, other, strict=True)
    ]
    return float(torch.stack(ratios).mean().exp())


def _relative_error(layer: LayerProfile, moments: LayerMoments) -> Tensor:
    """``[2, num_heads]``: of keys and of values, as a share of their energy."""
    distortion = torch.tensor(normal_distortion(), dtype=torch.float64)
    parts = (
        (layer.key_basis, layer.key_bits, moments.keys),
        (layer.value_basis, layer.value_bits, moments.values),
    )
    errors = []
    for basis, bits, second_moment in parts:
        energy = channel_energy(second_moment, basis)
        errors.append((energy * distortion[bits.long()]).sum(-1) / energy.sum(-1))
    return torch.stack(errors).clamp_min(1e-12)

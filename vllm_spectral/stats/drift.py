"""How far live keys and values have drifted from the spectrum that a profile was made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spectral.codec.quantizer import LayerCodec, VectorCoding
from vllm_spectral.codec.rotation import channel_energy
from vllm_spectral.stats.moments import LayerMoments

LEADING_ENERGY = 0.9
"""The leading channels are the fewest that hold this share of the profile's energy."""


@dataclass(frozen=True)
class Drift:
    """Of one layer: the energy that the profile has in its leading channels minus the energy that live vectors have there.

    Both are shares of all energy, means over heads; 0 for text like the calibration's, at most :data:`LEADING_ENERGY` and a
    little more.
    """

    keys: float
    values: float


def drift(codec: LayerCodec, moments: LayerMoments) -> Drift:
    """The drift of a layer; ``moments`` must hold some tokens."""
    return Drift(_of_moment(codec.keys, moments.keys), _of_moment(codec.values, moments.values))


def _of_moment(coding: VectorCoding, second_moment: Tensor) -> float:
    return shortfall(coding, channel_energy(second_moment, coding.basis))


def shortfall(coding: VectorCoding, energy: Tensor) -> float:
    """What the profile has in its leading channels minus what is found there, as shares of all energy; mean over heads.

    Args:
        coding: of the keys or the values.
        energy: ``[num_heads, head_dim]``, sums of squares found in the rotated channels.
    """
    expected, found = coding.width.double().square(), energy.double()
    order = expected.argsort(-1, descending=True)
    expected, found = expected.gather(-1, order), found.gather(-1, order)
    expected, found = (t / t.sum(-1, keepdim=True).clamp_min(1e-30) for t in (expected, found))
    leading = expected.cumsum(-1) - expected < LEADING_ENERGY
    return float((torch.where(leading, expected - found, 0.0)).sum(-1).mean())

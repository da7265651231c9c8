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


class LeadingChannels:
    """The channels that hold most of what a profile expects of the keys, or of the values, of one layer.

    Args:
        coding: of the keys or the values.
    """

    def __init__(self, coding: VectorCoding) -> None:
        expected = coding.width.double().square()
        expected = expected / expected.sum(-1, keepdim=True).clamp_min(1e-30)
        order = expected.argsort(-1, descending=True)
        ranked = expected.gather(-1, order)
        mask = (ranked.cumsum(-1) - ranked < LEADING_ENERGY).double()
        self._leading = torch.zeros_like(mask).scatter(-1, order, mask)
        self._expected = (expected * self._leading).sum(-1)

    def shortfall(self, energy: Tensor) -> Tensor:
        """What the profile has in these channels minus what is found there, as shares of all energy; ``[num_heads]`` float64.

        Args:
            energy: ``[num_heads, head_dim]``, sums of squares found in the rotated channels.
        """
        energy = energy.double()
        found = (energy * self._leading).sum(-1) / energy.sum(-1).clamp_min(1e-30)
        return self._expected - found


class Yardstick:
    """What moments of a layer are held against.

    Args:
        codec: the layer's.
    """

    def __init__(self, codec: LayerCodec) -> None:
        self._codec = codec
        self._keys, self._values = LeadingChannels(codec.keys), LeadingChannels(codec.values)

    def drift(self, moments: LayerMoments) -> Drift:
        """The drift of the layer; ``moments`` must hold some tokens."""
        keys, values = self._codec.keys.basis, self._codec.values.basis
        return Drift(
            float(self._keys.shortfall(channel_energy(moments.keys, keys)).mean()),
            float(self._values.shortfall(channel_energy(moments.values, values)).mean()),
        )

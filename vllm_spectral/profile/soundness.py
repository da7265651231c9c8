"""Whether the numbers of a profile make sense: what passes can be built into a codec and given to kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import MAX_BITS
from vllm_spectral.codec.layout import split_words
from vllm_spectral.profile.schema import FIGURES, LayerProfile, Profile

ORTHOGONALITY = 1e-3
"""Largest entry of ``U.T @ U - I``; bases that were computed in float64 and rounded to float32 stay below 1e-6."""
LARGEST = 1e18
"""Largest magnitude in a profile: its squares, summed over channels, are still float32. Activations stay below 1e6."""


def require_sound(profile: Profile) -> None:
    """Check everything that types and shapes do not say.

    Raises:
        ValueError: naming the layer and what is wrong with it.
    """
    levels = profile.codebooks.levels
    _require_bounded("the codebooks", levels)
    for bits in range(MAX_BITS + 1):
        if bool((levels[bits, : 2**bits].diff() < 0).any()):
            raise ValueError(f"the levels of {bits} bits fall")
        if bool(levels[bits, 2**bits :].any()) or (bits == 0 and float(levels[0, 0])):
            raise ValueError(f"{bits} bits have more levels than they can name")
    if profile.expectation is not None:
        figures = profile.expectation.figures
        _require_bounded("what is expected of the canary", figures)
        # The first half are ratios of squares; a limit made of a negative one would never let a server be ready.
        if bool((figures[..., : FIGURES // 2] < 0).any()):
            raise ValueError("a negative error ratio is expected of the canary")
    for index, layer in enumerate(profile.layers):
        try:
            _require_sound_layer(layer, profile.slot_bytes)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None


def _require_sound_layer(layer: LayerProfile, slot_bytes: int) -> None:
    for name, tensor in vars(layer).items():
        if tensor.is_floating_point():
            _require_bounded(name, tensor)
        if name.endswith("spectrum") and bool((tensor < 0).any()):
            raise ValueError(f"{name} has negative energies")
        if name.endswith("basis"):
            excess = tensor.mT @ tensor - torch.eye(tensor.shape[-1])
            if not float(excess.abs().max()) <= ORTHOGONALITY:
                raise ValueError(f"{name} is not orthogonal")
    split_words(layer.key_bits.long(), layer.value_bits.long(), slot_bytes)


def _require_bounded(name: str, tensor: Tensor) -> None:
    # NaN is not below anything.
    if not float(tensor.abs().max()) <= LARGEST:
        raise ValueError(f"{name} has numbers that are not finite, or beyond {LARGEST:g}")

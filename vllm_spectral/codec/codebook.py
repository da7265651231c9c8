"""Scalar codebooks: Lloyd-Max quantizers of the unit normal distribution.

A rotated channel, divided by its standard deviation and by the token's scale, is close to a unit normal.
The Lloyd-Max conditions (S. P. Lloyd, "Least squares quantization in PCM", 1982; J. Max, 1960) say that each
level is the mean of its cell and each boundary the midpoint of its two levels; for the normal density both
have closed forms in the error function.

Levels are rounded to bf16, so that a kernel which multiplies in bf16 reads exactly what the reference reads.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MAX_BITS = 8
"""Most bits one channel may take; a codebook of ``b`` bits has ``2 ** b`` levels. Six are what two vector registers hold
as a lookup table; the error they leave is a thousandth of the channel's variance."""


@lru_cache(maxsize=1)
def normal_codebooks(iterations: int = 2000) -> Tensor:
    """Lloyd-Max levels for 0 to :data:`MAX_BITS` bits.

    Args:
        iterations: Lloyd steps; the start (the companding rule of Panter and Dite, which is optimal in the limit
            of many levels) is so close that few matter.

    Returns:
        ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32, each value exact in bf16; row ``b`` holds ``2 ** b`` rising levels,
        then zeros. Row 0 is the single level 0.
    """
    table = torch.zeros(MAX_BITS + 1, 2**MAX_BITS)
    for bits in range(1, MAX_BITS + 1):
        count = 2**bits
        quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        levels = math.sqrt(3.0) * torch.special.ndtri(quantile)
        for _ in range(iterations):
            mass, moment = _cells(midpoints(levels))
            levels = torch.where(mass > 1e-300, moment / mass, levels)
        levels = (levels - levels.flip(0)) / 2
        table[bits, :count] = levels.bfloat16().float()
    return table


class Codebooks:
    """The codebooks of a profile.

    Args:
        levels: ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32, as :func:`normal_codebooks` lays them out.

    Attributes:
        levels: the same.
        boundaries: ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32; row ``b`` holds the ``2 ** b - 1`` midpoints between
            neighbouring levels, then infinity.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels
        self.boundaries = torch.full_like(levels, torch.inf)
        for bits in range(1, levels.shape[0]):
            self.boundaries[bits, : 2**bits - 1] = midpoints(levels[bits, : 2**bits])

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tables."""
        return sum(t.numel() * t.element_size() for t in (self.levels, self.boundaries))

    def nearest_codes(self, values: Tensor, bits: Tensor) -> Tensor:
        """The code of the nearest level: how many boundaries lie below the value.

        Args:
            values: ``[..., num_heads, head_dim]`` float32, in units of the codebook.
            bits: ``[num_heads, head_dim]`` int64.

        Returns:
            ``[..., num_heads, head_dim]`` int32.
        """
        codes = torch.zeros(values.shape, dtype=torch.int32)
        for width in sorted(set(bits.flatten().tolist())):
            if width:
                where = bits == width
                edges = self.boundaries[width, : 2**width - 1]
                codes[..., where] = torch.bucketize(values[..., where], edges, out_int32=True)
        return codes

    def levels_of(self, codes: Tensor, bits: Tensor) -> Tensor:
        """The levels of codes: ``[..., num_heads, head_dim]`` int to float32."""
        return self.levels.flatten()[bits * self.levels.shape[1] + codes]


def _cells(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Mass and first moment of the unit normal in the cells between edges, ``[n]`` float64 to ``[n + 1]`` each."""
    inf = torch.tensor([math.inf], dtype=torch.float64)
    low, high = torch.cat([-inf, edges]), torch.cat([edges, inf])
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    return mass, (torch.exp(-0.5 * low * low) - torch.exp(-0.5 * high * high)) / math.sqrt(2 * math.pi)


def midpoints(levels: Tensor) -> Tensor:
    """Decision boundaries of rising levels: ``[n]`` float to ``[n - 1]``."""
    return (levels[1:] + levels[:-1]) / 2


@lru_cache(maxsize=1)
def normal_distortion() -> tuple[float, ...]:
    """Mean squared error of a unit normal under each codebook of :func:`normal_codebooks`.

    Returns:
        ``MAX_BITS + 1`` floats, for 0 to ``MAX_BITS`` bits; the first is 1.0 (nothing stored).
    """
    result = [1.0]
    for bits in range(1, MAX_BITS + 1):
        levels = normal_codebooks()[bits, : 2**bits].double()
        mass, moment = _cells(midpoints(levels))
        # E[(x - q)^2] with E[x^2] = 1. Rounded levels are no longer quite their cells' means.
        result.append(1.0 - float((2 * levels * moment - levels * levels * mass).sum()))
    return tuple(result)

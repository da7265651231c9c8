"""Scalar codebooks: Lloyd-Max quantizers of the unit normal distribution.

A rotated channel, divided by its standard deviation and by the token's scale, is close to a unit normal.
The Lloyd-Max conditions (S. P. Lloyd, "Least squares quantization in PCM", 1982; J. Max, 1960) say that each
level is the mean of its cell and each boundary the midpoint of its two levels; for the normal density both
have closed forms in the error function.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MAX_BITS = 8
"""Most bits one channel may take; a codebook of ``b`` bits has ``2 ** b`` levels."""

CELLS = 4096
"""Cells of the quantization table; the narrowest step of the widest codebook spans eight of them."""
CELL_RANGE = 4.5
"""Beyond it every codebook is at its outermost level."""


@lru_cache(maxsize=1)
def normal_codebooks(iterations: int = 2000) -> Tensor:
    """Lloyd-Max levels for 0 to :data:`MAX_BITS` bits.

    Args:
        iterations: Lloyd steps; the start (the companding rule of Panter and Dite, which is optimal in the limit
            of many levels) is so close that few matter.

    Returns:
        ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32; row ``b`` holds ``2 ** b`` rising levels, then zeros.
        Row 0 is the single level 0.
    """
    table = torch.zeros(MAX_BITS + 1, 2**MAX_BITS)
    for bits in range(1, MAX_BITS + 1):
        count = 2**bits
        quantile = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        levels = math.sqrt(3.0) * torch.special.ndtri(quantile)
        for _ in range(iterations):
            edges = boundaries(levels)
            inf = torch.tensor([math.inf], dtype=torch.float64)
            low, high = torch.cat([-inf, edges]), torch.cat([edges, inf])
            mass = torch.special.ndtr(high) - torch.special.ndtr(low)
            moment = (torch.exp(-0.5 * low * low) - torch.exp(-0.5 * high * high)) / math.sqrt(2 * math.pi)
            levels = torch.where(mass > 1e-300, moment / mass, levels)
        levels = (levels - levels.flip(0)) / 2
        table[bits, :count] = levels.float()
    return table


class Codebooks:
    """Codebooks with the tables that quantize by lookup.

    The range ``[-CELL_RANGE, CELL_RANGE)`` is cut into :data:`CELLS` equal cells, and all values in a cell get the code
    that is nearest to its center: one table lookup for any bit width, and a definition that a kernel can meet exactly.

    Args:
        levels: ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32, as :func:`normal_codebooks` lays them out.
    """

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels
        center = (torch.arange(CELLS) + 0.5) * (2 * CELL_RANGE / CELLS) - CELL_RANGE
        self._cell_codes = torch.stack(
            [torch.bucketize(center, boundaries(levels[bits, : 2**bits])) for bits in range(MAX_BITS + 1)]
        )
        self._cell_levels = levels.gather(1, self._cell_codes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tables."""
        return sum(t.numel() * t.element_size() for t in (self.levels, self._cell_codes, self._cell_levels))

    def nearest_levels(self, values: Tensor, bits: Tensor) -> Tensor:
        """The level each value is stored as.

        Args:
            values: ``[..., num_heads, head_dim]`` float32, in units of the codebook.
            bits: ``[num_heads, head_dim]`` int64.

        Returns:
            ``[..., num_heads, head_dim]`` float32.
        """
        return self._cell_levels.flatten()[self._cells(values, bits)]

    def nearest_codes(self, values: Tensor, bits: Tensor) -> Tensor:
        """The code each value is stored as, int64; shapes as :meth:`nearest_levels`."""
        return self._cell_codes.flatten()[self._cells(values, bits)]

    def levels_of(self, codes: Tensor, bits: Tensor) -> Tensor:
        """The levels of codes: ``[..., num_heads, head_dim]`` int to float32."""
        return self.levels.flatten()[bits * self.levels.shape[1] + codes]

    @staticmethod
    def _cells(values: Tensor, bits: Tensor) -> Tensor:
        cell = ((values + CELL_RANGE) * (CELLS / (2 * CELL_RANGE))).clamp(0, CELLS - 1).long()
        return cell.add_(bits * CELLS)


def boundaries(levels: Tensor) -> Tensor:
    """Decision boundaries of rising levels: the midpoints.

    Args:
        levels: ``[num_levels]`` float, rising.

    Returns:
        ``[num_levels - 1]``, same dtype.
    """
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
        edges = torch.special.ndtr(boundaries(levels))
        mass = torch.diff(edges, prepend=torch.zeros(1).double(), append=torch.ones(1).double())
        # At the Lloyd-Max optimum every level is its cell's mean, so E[(x - q)^2] = E[x^2] - E[q^2].
        result.append(1.0 - float((mass * levels * levels).sum()))
    return tuple(result)

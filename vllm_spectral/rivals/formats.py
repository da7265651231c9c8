"""The formats: TurboQuant (rotated keys, plain values) and int4 per token and head (both rotated)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import midpoints, normal_codebooks
from vllm_spectral.codec.rotation import hadamard_basis, hadamard_matrix, rotate, unrotate
from vllm_spectral.errors import ConfigError

_SIGN_SEED = 0


class Rival(Protocol):
    """Another way to store keys and values."""

    @property
    def name(self) -> str:
        """As on the command line."""

    def bits(self, head_dim: int) -> float:
        """Stored bits per element, scales included."""

    def restore(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What would be read back; ``[num_tokens, num_heads, head_dim]`` float32 in and out."""


@dataclass(frozen=True)
class TurboQuant:
    """TurboQuant as vLLM 0.32 has it (``--kv-cache-dtype turboquant_*``), without its layers left in bf16.

    A key is divided by its norm, rotated by a Hadamard matrix without signs, coded by Lloyd-Max levels for a normal of
    variance ``1 / head_dim``, and restored with unit norm times its fp16 norm. A value is not rotated: uniform levels
    between its minimum and its maximum, which are fp16. (Zandieh et al., "TurboQuant", 2025, without the QJL residual.)

    Attributes:
        key_bits, value_bits: bits per element; vLLM offers 4/4, 3/4 and 3/3.
    """

    key_bits: int
    value_bits: int

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"turboquant_k{self.key_bits}v{self.value_bits}"

    def bits(self, head_dim: int) -> float:
        """Codes, one fp16 norm of the key, two fp16 numbers of the value."""
        return (self.key_bits + self.value_bits) / 2 + 48 / (2 * head_dim)

    def restore(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize and restore; see :class:`Rival`."""
        num_heads, head_dim = keys.shape[-2:]
        basis = hadamard_matrix(head_dim).float().expand(num_heads, -1, -1)
        norm = keys.norm(dim=-1, keepdim=True)
        levels = normal_codebooks()[self.key_bits, : 2**self.key_bits] / math.sqrt(head_dim)
        rotated = levels[torch.bucketize(rotate(keys / (norm + 1e-8), basis).contiguous(), midpoints(levels))]
        unit = rotated / rotated.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        restored_keys = unrotate(_half(norm) * unit, basis)
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        top = 2**self.value_bits - 1
        step = ((high - low) / top).clamp_min(1e-8)
        codes = ((values - low) / step + 0.5).floor().clamp(0, top)
        return restored_keys, codes * _half(step) + _half(low)


@dataclass(frozen=True)
class Int4PerTokenHead:
    """vLLM 0.32's ``--kv-cache-dtype int4_per_token_head``.

    Keys and values are rotated by a Hadamard matrix with random signs and coded by 16 uniform levels between minimum
    and maximum with an integer zero point, which hides in the last four bits of a float32 step.
    """

    name: str = "int4_per_token_head"

    def bits(self, head_dim: int) -> float:
        """Codes and one float32 per vector."""
        return 4 + 32 / head_dim

    def restore(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize and restore; see :class:`Rival`."""
        num_heads, head_dim = keys.shape[-2:]
        # One draw of signs for all heads, as there.
        basis = hadamard_basis(1, head_dim, _SIGN_SEED).expand(num_heads, -1, -1)
        return self._restore(keys, basis), self._restore(values, basis)

    @staticmethod
    def _restore(vectors: Tensor, basis: Tensor) -> Tensor:
        rotated = rotate(vectors, basis)
        low, high = rotated.amin(-1, keepdim=True), rotated.amax(-1, keepdim=True)
        step = ((high - low) / 15).clamp_min(1e-6)
        zero = (-low / step).round().clamp(0, 15)
        codes = (rotated / step + zero).round().clamp(0, 15)
        return unrotate((codes - zero) * step, basis)


def _half(numbers: Tensor) -> Tensor:
    """Through fp16, as stored."""
    return numbers.half().float()


RIVALS: tuple[Rival, ...] = (TurboQuant(4, 4), TurboQuant(3, 3), TurboQuant(4, 2), TurboQuant(2, 2), Int4PerTokenHead())
"""What ``evaluate --rivals all`` compares with. 4/2 and 2/2 are not offered by vLLM: fairer points at lower budgets."""


def rival(name: str) -> Rival:
    """The rival of that name; any ``turboquant_kAvB`` with 2 to 4 bits is one.

    Raises:
        ConfigError: for an unknown name.
    """
    for known in RIVALS:
        if known.name == name:
            return known
    match = re.fullmatch(r"turboquant_k([2-4])v([2-4])", name)
    if match:
        return TurboQuant(int(match[1]), int(match[2]))
    raise ConfigError(f"unknown rival {name!r} (known: {', '.join(r.name for r in RIVALS)})")

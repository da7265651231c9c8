"""Layers and steps to compile, check and time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_spectral.codec.allocation import water_fill
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.layout import WORD_BITS, SlotLayout, payload_words, slot_bytes_for
from vllm_spectral.codec.quantizer import LayerCodec


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        heads, query_heads, head_dim: the layer's shape.
        bits: stored bits per element.
        requests: in the batch.
        queries: tokens of the step per request.
        context: tokens per request after the step.
        block: tokens per page.
    """

    heads: int = 8
    query_heads: int = 32
    head_dim: int = 128
    bits: float = 3.0
    requests: int = 32
    queries: int = 1
    context: int = 16384
    block: int = 64


@lru_cache(maxsize=8)
def mixing(heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random orthogonal basis per head, ``[heads, dim, dim]``, and falling deviations of its channels, ``[heads, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q.contiguous()
    steepness = 0.5 + torch.rand(heads, 1, generator=generator)
    return basis, 10 ** (0.3 - steepness * torch.linspace(0, 1, dim)[None, :])


def vectors(count: int, heads: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """``[count, heads, dim]`` bf16 keys (``seed`` 1) or values (2) as the layer's bases expect them, a sink now and then."""
    basis, deviation = (t.to(device) for t in mixing(heads, dim, seed))
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randn(count, heads, dim, generator=generator, device=device) * deviation
    found = torch.einsum("thd,hed->the", drawn, basis)
    found[::500] = sink(heads, dim, seed).to(device) + 0.1 * found[::500]
    return found.bfloat16()


def sink(heads: int, dim: int, seed: int) -> Tensor:
    """``[heads, dim]``: a typical first token, which the fallback knows."""
    return 6 * torch.randn(heads, dim, generator=torch.Generator().manual_seed(seed + 100))


def layer_codec(case: Case) -> LayerCodec:
    """The codec of a layer with uneven bits, as calibration would make it, of no real model."""
    heads, dim, slot = case.heads, case.head_dim, slot_bytes_for(case.bits, case.head_dim)
    (key_basis, key_deviation), (value_basis, value_deviation) = (mixing(heads, dim, seed) for seed in (1, 2))
    # Half of the words to each side; what packing wastes is taken off again until the codes fit.
    words = payload_words(slot)
    budget = WORD_BITS * (words // 2)
    while True:
        pairs = key_deviation.square().unflatten(-1, (-1, 2)).sum(-1)
        keys = torch.stack([water_fill(row, budget // 2).repeat_interleave(2) for row in pairs])
        values = torch.stack([water_fill(row, budget) for row in value_deviation.square()])
        try:
            layout = SlotLayout(keys, values, slot)
        except ValueError:
            budget -= WORD_BITS // 2
            continue
        break
    return LayerCodec(
        key_basis, value_basis, key_deviation, value_deviation, sink(heads, dim, 1), sink(heads, dim, 2), layout,
        Codebooks(normal_codebooks()),
    )  # fmt: skip

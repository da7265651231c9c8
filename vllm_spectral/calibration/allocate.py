"""From second moments to a profile: bases, spectra and the split of bits between keys and values.

Why keys and values can share one budget: let a query attend with weights ``p_i`` over values ``v_i`` with output
``o``. To first order an error ``dk_i`` of a key changes its score by ``e_i = s q . dk_i`` (``s`` is the score scale)
and the output by ``p_i e_i (v_i - o)``; an error ``dv_i`` of a value changes the output by ``p_i dv_i``. With errors
independent over tokens both are weighted by the same ``sum p_i^2``, so that per token

    cost = s^2 E[(q . dk)^2] * E|v - o|^2  +  |dv|^2.

Quantization errors of the rotated channels are independent, so that ``E[(q . dk)^2] = sum_c (U^T Q U)_cc E[dk_c^2]``
with ``Q = E[q q^T]``; and ``E|v - o|^2`` is at most the variance of the values, less where the attended values resemble
each other: a measured :data:`VALUE_SPREAD` of it. So a key channel weighs its spectrum times ``s^2 (U^T Q U)_cc
E|v - o|^2``, a value channel its spectrum as it is, and one water-filling serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.codec.allocation import remaining_error, water_fill
from vllm_spectral.codec.layout import WORD_BITS, pack_fields, payload_words
from vllm_spectral.codec.rotation import eigenbasis, hadamard_basis, rotate
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.moments import LayerMoments

VALUE_SPREAD = 0.5
"""``E|v - o|^2`` as a share of the values' variance. Best of 1/4, 1/2, 1, 2 at 2, 2.5 and 3 bits with the exact tier."""
HADAMARD_KEY_WEIGHT = 4.0
"""Weight of a key's relative error against a value's when nothing was measured."""


def spectral_layer(moments: LayerMoments, slot_bytes: int) -> LayerProfile:
    """Eigenbases and water-filled bits of one measured layer.

    Args:
        moments: what calibration accumulated.
        slot_bytes: size of the layer's slots.
    """
    count = max(moments.num_tokens, 1)
    key_basis, key_spectrum = eigenbasis(moments.keys / count)
    value_basis, value_spectrum = eigenbasis(moments.values / count)
    value_variance = value_spectrum.double().sum(-1) - (moments.value_sum / count).square().sum(-1)
    # diag(U^T Q U): the second moment of the rotated query, channel by channel.
    queries = (moments.queries / max(moments.num_queries, 1)).transpose(0, 1)
    half = rotate(queries, key_basis).transpose(0, 1)
    query_power = (half * key_basis).sum(-2).double()
    head_dim = key_spectrum.shape[-1]
    # s^2 = 1 / head_dim, the scale of scaled dot-product attention.
    key_cost = key_spectrum * query_power / head_dim * VALUE_SPREAD * value_variance[:, None]
    sinks = max(moments.num_sinks, 1)
    key_bits, value_bits = _share(key_cost, value_spectrum, slot_bytes)
    return LayerProfile(
        key_basis=key_basis,
        value_basis=value_basis,
        key_spectrum=key_spectrum,
        value_spectrum=value_spectrum,
        key_sink=(moments.key_sink / sinks).float(),
        value_sink=(moments.value_sink / sinks).float(),
        key_bits=key_bits,
        value_bits=value_bits,
    )


def hadamard_layer(num_heads: int, head_dim: int, slot_bytes: int, seed: int) -> LayerProfile:
    """A layer that needs no measurement: flat spectra, bits split by :data:`HADAMARD_KEY_WEIGHT` alone."""
    basis = hadamard_basis(num_heads, head_dim, seed)
    flat, zero = torch.ones(num_heads, head_dim), torch.zeros(num_heads, head_dim)
    key_bits, value_bits = _share(flat * HADAMARD_KEY_WEIGHT, flat, slot_bytes)
    return LayerProfile(
        key_basis=basis,
        value_basis=basis.clone(),
        key_spectrum=flat,
        value_spectrum=flat.clone(),
        key_sink=zero,
        value_sink=zero.clone(),
        key_bits=key_bits,
        value_bits=value_bits,
    )


def _share(key_cost: Tensor, value_cost: Tensor, slot_bytes: int) -> tuple[Tensor, Tensor]:
    """Bits of keys and values, ``[num_heads, head_dim]`` uint8 each, from one budget per head."""
    shares = [
        _share_head(k.double(), v.double(), payload_words(slot_bytes))
        for k, v in zip(key_cost, value_cost, strict=True)
    ]
    key_bits, value_bits = (torch.stack(bits).to(torch.uint8) for bits in zip(*shares, strict=True))
    return key_bits, value_bits


def _share_head(key_cost: Tensor, value_cost: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Bits of one head: the number of key words is tried around what joint water-filling would give the keys."""
    joint = water_fill(torch.cat([key_cost, value_cost]), WORD_BITS * num_words)
    guess = int(joint[: len(key_cost)].sum()) // (2 * WORD_BITS)
    best: tuple[float, Tensor, Tensor] | None = None
    for pairs in range(max(guess - 1, 1), min(guess + 2, (num_words - 1) // 2) + 1):
        # A pair of channels shares its width, and a pair of words: a bit of the pair costs one bit in each.
        key_bits = _fill_words(key_cost.view(-1, 2).sum(-1), pairs).repeat_interleave(2)
        value_bits = _fill_words(value_cost, num_words - 2 * pairs)
        error = remaining_error(key_cost, key_bits) + remaining_error(value_cost, value_bits)
        if best is None or error < best[0]:
            best = error, key_bits, value_bits
    assert best is not None
    return best[1], best[2]


def _fill_words(cost: Tensor, num_words: int) -> Tensor:
    """The best ``[n]`` bits whose fields pack into so many words."""
    budget = WORD_BITS * num_words
    while pack_fields((bits := water_fill(cost, budget)).tolist()).num_words > num_words:
        budget -= 1
    return bits

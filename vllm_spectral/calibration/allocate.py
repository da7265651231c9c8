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

Which basis. An error of a value weighs the same in every direction, so that the values' eigenbasis is best (the
Karhunen-Loeve transform). Keys have two moments, their own and the queries', and what an allocation leaves falls with the
product over the channels of ``(U^T K U)_cc (U^T Q U)_cc``: a channel should be weak in both. No rotation diagonalizes both,
but the eigenbasis of ``K + a Q`` (each divided by its trace) nearly does for a wide range of ``a``. So a few are tried per
head, ``a = 0``, the keys' own eigenbasis, among them, and the one is kept that leaves the smallest error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.codec.allocation import remaining_error, water_fill
from vllm_spectral.codec.layout import WORD_BITS, pack_fields, payload_words
from vllm_spectral.codec.rotation import channel_energy, eigenbasis, hadamard_basis
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.moments import LayerMoments

VALUE_SPREAD = 0.5
"""``E|v - o|^2`` as a share of the values' variance. Best of 1/4, 1/2, 1, 2 at 2, 2.5 and 3 bits with the exact tier."""
QUERY_SHARES = (0.0, 0.25, 0.5)
"""Shares ``a`` that are tried. From a tenth to one they cannot be told apart; with the keys' own eigenbasis alone KL is
a tenth higher at 2 and 3 bits."""
HADAMARD_KEY_WEIGHT = 4.0
"""Weight of a key's relative error against a value's when nothing was measured."""


def spectral_layer(moments: LayerMoments, slot_bytes: int) -> LayerProfile:
    """Bases and water-filled bits of one measured layer.

    Args:
        moments: what calibration accumulated.
        slot_bytes: size of the layer's slots.
    """
    count, sinks = max(moments.num_tokens, 1), max(moments.num_sinks, 1)
    keys, queries = moments.keys / count, moments.queries / max(moments.num_queries, 1)
    value_basis, value_spectrum = eigenbasis(moments.values / count)
    value_variance = value_spectrum.double().sum(-1) - (moments.value_sum / count).square().sum(-1)
    # s^2 = 1 / head_dim, the scale of scaled dot-product attention.
    price = VALUE_SPREAD * value_variance / keys.shape[-1]
    chosen = [
        _key_basis(*head, WORD_BITS * payload_words(slot_bytes))
        for head in zip(keys, queries, price, value_spectrum, strict=True)
    ]
    key_basis = torch.stack([basis for basis, _ in chosen])
    key_bits, value_bits = _share(torch.stack([cost for _, cost in chosen]), value_spectrum, slot_bytes)
    return LayerProfile(
        key_basis=key_basis,
        value_basis=value_basis,
        key_spectrum=channel_energy(keys, key_basis).float(),
        value_spectrum=value_spectrum,
        key_sink=(moments.key_sink / sinks).float(),
        value_sink=(moments.value_sink / sinks).float(),
        key_bits=key_bits,
        value_bits=value_bits,
    )


def _key_basis(keys: Tensor, queries: Tensor, price: Tensor, value_cost: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The basis of one head's keys that leaves least, its columns by falling energy, and what its channels cost.

    Args:
        keys, queries: ``[head_dim, head_dim]`` float64, second moments.
        price: of an error of the scores, in that of a value.
        value_cost: ``[head_dim]``, cost of the values' channels, which share the budget.
        budget: bits for both.

    Returns:
        ``[head_dim, head_dim]`` float32 and ``[head_dim]`` float64.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    own, seen = _of_trace_one(keys), _of_trace_one(queries)
    for share in QUERY_SHARES:
        basis, _ = eigenbasis(own + share * seen)
        energy = channel_energy(keys, basis)
        order = torch.argsort(energy, descending=True)
        basis, energy = basis[:, order], energy[order]
        cost = energy * channel_energy(queries, basis) * price
        both = torch.cat([cost, value_cost])
        error = remaining_error(both, water_fill(both, budget))
        if best is None or error < best[0]:
            best = error, basis, cost
    assert best is not None
    return best[1], best[2]


def _of_trace_one(moment: Tensor) -> Tensor:
    """``[D, D]``: divided by its trace; a moment of nothing stays 0."""
    return moment / moment.trace().clamp_min(1e-30)


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

"""Sampling live steps: the figures are what their definitions say, and damage shows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.conftest import DIM, HEADS, correlated, measured
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import rotate
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.drift import LEADING_ENERGY, Yardstick
from vllm_spectral.stats.moments import LayerMoments
from vllm_spectral.stats.probe import Probe, expected_error, probe

SLOT_BYTES = 64
TOKENS = 200
POSITIONS = torch.arange(100, 100 + TOKENS)
BOOKS = Codebooks(normal_codebooks())
QUERY = torch.randn(3 * HEADS, DIM, generator=torch.Generator().manual_seed(7))


def look(codec: LayerCodec, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> Probe:
    keys = correlated(TOKENS, 3) if keys is None else keys
    values = correlated(TOKENS, 4) if values is None else values
    return probe(QUERY, keys, values, codec.encode(keys, values), POSITIONS, codec, DIM**-0.5)


@pytest.fixture(scope="module")
def healthy(layer: LayerProfile) -> Probe:
    return look(layer.codec(SLOT_BYTES, BOOKS))


def test_the_error_is_what_the_profile_predicts(healthy: Probe) -> None:
    assert 0.7 < healthy.error_ratio < 1.3
    assert healthy.fallback_share < 0.05
    assert 0 < healthy.clipped_share < 0.1


def test_attention_is_compared_with_attention_over_exact_vectors(layer: LayerProfile, healthy: Probe) -> None:
    """Against the definition, written out for one head at a time."""
    codec = layer.codec(SLOT_BYTES, BOOKS)
    keys, values = correlated(TOKENS, 3), correlated(TOKENS, 4)
    slots = codec.encode(keys, values)
    errors, divergences = [], []
    for head in range(HEADS):
        back_keys = codec.decode_keys(slots)[:, head] @ layer.key_basis[head].T
        back_values = codec.decode_values(slots)[:, head] @ layer.value_basis[head].T
        difference = size = 0.0
        for query in QUERY[3 * head : 3 * head + 3]:
            p = (keys[:, head] @ query * DIM**-0.5).softmax(0)
            q = (back_keys @ query * DIM**-0.5).softmax(0)
            divergences.append(float((p * (p / q).log()).sum()))
            truth, found = p @ values[:, head], q @ back_values
            difference += float((truth - found).square().sum())
            size += float(truth.square().sum())
        errors.append(difference / size)
    assert healthy.output_error == pytest.approx((sum(errors) / HEADS) ** 0.5, rel=1e-3)
    assert healthy.attention_kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_what_the_kernels_served_is_believed_not_recomputed(layer: LayerProfile) -> None:
    codec = layer.codec(SLOT_BYTES, BOOKS)
    keys, values = correlated(TOKENS, 3), correlated(TOKENS, 4)
    slots = codec.encode(keys, values)
    served = torch.zeros(3 * HEADS, DIM)
    result = probe(QUERY, keys, values, slots, POSITIONS, codec, DIM**-0.5, served)
    assert result.output_error == pytest.approx(1.0)


@pytest.mark.parametrize("part", ["key_basis", "value_basis"])
def test_a_transposed_basis_is_seen(layer: LayerProfile, healthy: Probe, part: str) -> None:
    """``h @ U.T`` is orthogonal too, and with uneven bits it is noise: the origin of this project."""
    turned = dataclasses.replace(layer, **{part: getattr(layer, part).mT.contiguous()})
    assert look(turned.codec(SLOT_BYTES, BOOKS)).error_ratio > 2 * healthy.error_ratio


def test_a_zeroed_codebook_is_seen(layer: LayerProfile) -> None:
    codec = layer.codec(SLOT_BYTES, Codebooks(torch.zeros_like(BOOKS.levels)))
    assert look(codec).error_ratio > 10


def test_sinks_do_not_count(layer: LayerProfile) -> None:
    """A first token is an outlier by nature; the profile predicts nothing about it."""
    codec = layer.codec(SLOT_BYTES, BOOKS)
    keys, values = correlated(TOKENS, 3), correlated(TOKENS, 4)
    keys[:4] = torch.randn(4, HEADS, DIM) * 100
    slots, positions = codec.encode(keys, values), torch.arange(TOKENS)
    assert probe(QUERY, keys, values, slots, positions, codec, DIM**-0.5).error_ratio < 1.3


def test_expectation_is_energy_times_distortion(layer: LayerProfile) -> None:
    codec = layer.codec(SLOT_BYTES, BOOKS)
    keys = correlated(4000, 5)
    rotated = rotate(keys, codec.keys.basis)
    restored = codec.decode_keys(codec.encode(keys, keys))
    found = (rotated - restored).square().sum((0, 2)) / rotated.square().sum((0, 2))
    torch.testing.assert_close(expected_error(codec.keys), found, rtol=0.25, atol=0)


def test_drift_is_nought_at_home_and_large_abroad(layer: LayerProfile) -> None:
    codec = layer.codec(SLOT_BYTES, BOOKS)
    home = Yardstick(codec).drift(measured(seed=50))
    assert abs(home.keys) < 0.02 and abs(home.values) < 0.02
    moments = LayerMoments(HEADS, DIM)
    white = torch.randn(4000, HEADS, DIM)
    moments.add(torch.randn(4000, HEADS, DIM), white, correlated(4000, 60), torch.arange(4000) % 500)
    abroad = Yardstick(codec).drift(moments)
    leading = layer.key_spectrum.cumsum(-1) - layer.key_spectrum < LEADING_ENERGY * layer.key_spectrum.sum(-1)[:, None]
    expected = LEADING_ENERGY - leading.float().mean()
    assert abroad.keys == pytest.approx(float(expected), abs=0.06)
    assert abs(abroad.values) < 0.02


def test_moments_survive_their_file_and_forget(layer: LayerProfile) -> None:
    del layer
    moments = measured()
    again = LayerMoments.from_tensors(moments.to_tensors())
    assert again.num_tokens == moments.num_tokens and torch.equal(again.keys, moments.keys)
    joined = LayerMoments.joined([moments, again])
    assert joined.keys.shape == (2 * HEADS, DIM, DIM) and joined.num_tokens == moments.num_tokens
    tokens, keys = moments.num_tokens, moments.keys.clone()
    moments.halve()
    assert moments.num_tokens == tokens // 2 and torch.equal(moments.keys, keys / 2)
    assert torch.equal(again.keys, keys), "a copy must not change with it"

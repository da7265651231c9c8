"""From tokens to windows, from moments to bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DIM, HEADS, correlated, measured
from vllm_spectral.calibration import allocate
from vllm_spectral.calibration.allocate import spectral_layer
from vllm_spectral.calibration.breadth import excess_error
from vllm_spectral.calibration.prompts import OPENINGS, QUESTIONS
from vllm_spectral.calibration.run import NARROW, PIECE_TOKENS, PROBE_TOKENS, join, probes, spread
from vllm_spectral.codec.rotation import channel_energy
from vllm_spectral.stats.moments import LayerMoments

documents = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=50), min_size=1, max_size=9)


@given(documents=documents, window=st.integers(1, 60))
def test_joined_windows_are_full_and_hold_everything(documents: list[list[int]], window: int) -> None:
    windows = join(documents, window)
    assert all(len(ids) == window for ids in windows)
    flat = [token for ids in windows for token in ids]
    expected = [token for ids in documents for token in ids]
    assert flat[: len(expected)] == expected
    assert len(flat) < len(expected) + window


@given(length=st.integers(1, 20 * PIECE_TOKENS), most=st.integers(1, 8 * PIECE_TOKENS))
def test_spread_takes_from_all_of_a_document(length: int, most: int) -> None:
    taken = spread(list(range(length)), most)
    assert taken[0] == 0
    assert taken == sorted(set(taken))
    assert len(taken) <= max(most, PIECE_TOKENS)
    if most >= 2 * PIECE_TOKENS and length > 4 * PIECE_TOKENS:
        assert taken[-1] > length // 3


@given(documents=documents)
def test_probes_are_short_and_never_empty(documents: list[list[int]]) -> None:
    starts = probes(documents)
    assert all(0 < len(ids) <= PROBE_TOKENS for ids in starts)
    assert starts[0] == documents[0][:PROBE_TOKENS]


def test_the_prompts_are_diverse_and_distinct() -> None:
    prompts = QUESTIONS + OPENINGS
    assert len(set(prompts)) == len(prompts) >= 50
    text = " ".join(prompts)
    assert all(marker in text for marker in ("def ", "SELECT", "Bayes", "français", "中文", "日本", "INTERVIEWER"))


def test_keys_that_no_query_looks_at_get_fewer_bits() -> None:
    """The price of a key channel is the query's power along it."""
    moments = LayerMoments(HEADS, DIM)
    keys = torch.randn(3000, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    keys = keys * torch.linspace(2.0, 1.0, DIM)
    query = torch.randn(3000, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    query[..., : DIM // 2] *= 1e-3
    moments.add(query, keys, correlated(3000, 2), torch.arange(3000))
    layer = spectral_layer(moments, 64)
    # Where each rotated channel points: its share in the half that queries ignore.
    ignored = layer.key_basis[:, : DIM // 2].square().sum(-2)
    bits = layer.key_bits.float()
    # By their variance alone the ignored ones would get up to one bit more.
    assert bits[ignored > 0.97].mean() < bits[ignored < 0.03].mean() - 1


def crossed(degrees: float) -> LayerMoments:
    """Channels in pairs of nearly equal energy; of each pair, queries see one direction, so far from the first channel."""
    energy = (0.9 ** torch.arange(DIM // 2)).repeat_interleave(2) * torch.tensor([1.0, 0.8]).repeat(DIM // 2)
    angle = torch.deg2rad(torch.tensor(degrees))
    seen = torch.stack([angle.cos(), angle.sin()])
    moments = measured()
    moments.keys = torch.diag_embed(energy.double()).repeat(HEADS, 1, 1)
    block = torch.outer(seen, seen).double() + 0.01 * torch.eye(2).double()
    moments.queries = torch.block_diag(*[block] * (DIM // 2)).repeat(HEADS, 1, 1)
    moments.num_tokens = moments.num_queries = 1
    return moments


def test_the_keys_basis_regards_the_queries_where_their_axes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an allocation leaves falls with the mean logarithm of the channels' costs."""

    def mean_log_cost(moments: LayerMoments) -> float:
        basis = spectral_layer(moments, 48).key_basis
        return float(sum(channel_energy(m, basis).log().mean() for m in (moments.keys, moments.queries)))

    def gain(moments: LayerMoments) -> float:
        with monkeypatch.context() as patched:
            patched.setattr(allocate, "QUERY_SHARES", (0.0,))
            own = mean_log_cost(moments)
        return own - mean_log_cost(moments)

    assert gain(crossed(45.0)) > 0.4
    assert gain(crossed(0.0)) == pytest.approx(0.0, abs=1e-6)


def test_a_basis_of_keys_is_orthogonal_and_sorted_by_its_own_energy() -> None:
    moments = crossed(45.0)
    layer = spectral_layer(moments, 48)
    torch.testing.assert_close(layer.key_basis.mT @ layer.key_basis, torch.eye(DIM).expand(HEADS, -1, -1))
    torch.testing.assert_close(
        layer.key_spectrum.double(), channel_energy(moments.keys / moments.num_tokens, layer.key_basis)
    )
    assert (layer.key_spectrum.diff(dim=-1) <= 0).all()


def test_equal_moments_give_equal_profiles_at_any_budget() -> None:
    for slot in (32, 48, 64):
        first, second = spectral_layer(measured(), slot), spectral_layer(measured(), slot)
        for field in dataclasses.fields(first):
            assert torch.equal(getattr(first, field.name), getattr(second, field.name))
        assert int((first.key_bits.int() + first.value_bits.int()).sum(-1).max()) <= 8 * slot


def test_other_text_fares_worse_than_what_a_profile_was_made_of() -> None:
    own, same, other = measured(4000, 0), measured(4000, 5), LayerMoments(HEADS, DIM)
    white = torch.randn(2, 4000, HEADS, DIM, generator=torch.Generator().manual_seed(3))
    other.add(torch.randn(4000, HEADS, DIM), white[0], white[1], torch.arange(4000))
    profile = [spectral_layer(own, 48)]
    assert excess_error(profile, [own], [own]) == pytest.approx(1.0)
    assert excess_error(profile, [own], [same]) == pytest.approx(1.0, abs=0.1)
    assert excess_error(profile, [own], [other]) > NARROW

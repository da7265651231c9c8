"""Water-filling: within budget, optimal, reproducible."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spectral.codec.allocation import flat_fill, water_fill
from vllm_spectral.codec.codebook import MAX_BITS, midpoints, normal_codebooks, normal_distortion

variances = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=64).map(torch.tensor)


@given(variances=variances, budget=st.integers(0, 600))
def test_the_budget_is_spent_and_never_exceeded(variances: torch.Tensor, budget: int) -> None:
    assert int(water_fill(variances, budget).sum()) == min(budget, MAX_BITS * len(variances))


def test_greedy_is_optimal() -> None:
    """Against every allocation of a small problem."""
    spectrum = torch.tensor([9.0, 3.0, 1.0, 0.2])
    curve = normal_distortion()

    def cost(bits: tuple[int, ...]) -> float:
        return sum(float(v) * curve[b] for v, b in zip(spectrum, bits, strict=True))

    best = min((b for b in itertools.product(range(MAX_BITS + 1), repeat=4) if sum(b) <= 9), key=cost)
    assert cost(tuple(water_fill(spectrum, 9).tolist())) == pytest.approx(cost(best))


def test_more_variance_never_gets_fewer_bits() -> None:
    assert (water_fill(torch.logspace(2, -3, 64), 200).diff() <= 0).all()


@given(channels=st.integers(1, 64), budget=st.integers(0, 600))
def test_flat_bits_differ_by_at_most_one(channels: int, budget: int) -> None:
    bits = flat_fill(channels, budget)
    assert int(bits.max() - bits.min()) <= 1
    assert int(bits.sum()) == min(budget, channels * MAX_BITS)


@pytest.mark.parametrize("arguments", [(torch.ones(4, 4), 10), (torch.ones(4), -1)])
def test_nonsense_is_refused(arguments: tuple[torch.Tensor, int]) -> None:
    with pytest.raises(ValueError, match=r"variances|budget"):
        water_fill(*arguments)


def test_codebooks_meet_the_lloyd_max_condition_and_the_literature() -> None:
    """Distortions as tabulated by Max (1960): .3634, .1175, .03454, .009497 for 1 to 4 bits."""
    assert normal_distortion()[1:5] == pytest.approx((0.3634, 0.1175, 0.03454, 0.009497), rel=2e-3)
    sample = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = normal_codebooks()[3, :8].double()
    code = torch.bucketize(sample, midpoints(levels))
    means = torch.stack([sample[code == c].mean() for c in range(8)])
    torch.testing.assert_close(means, levels, rtol=0, atol=0.01)

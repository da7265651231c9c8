"""The canary's comparison."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm_spectral_server.canary import TOP_TOKENS, compare


def top(logits: torch.Tensor, count: int = TOP_TOKENS) -> dict[int, float]:
    values, index = logits.log_softmax(-1).topk(count)
    return dict(zip(index.tolist(), values.tolist(), strict=True))


def test_equal_predictions_agree() -> None:
    rows = [top(row) for row in torch.randn(5, 100)]
    verdict = compare(rows, rows)
    assert verdict.kl == pytest.approx(0, abs=1e-6)
    assert verdict.top1 == 1.0


@given(seed=st.integers(0, 1000), noise=st.floats(0.0, 5.0))
def test_the_divergence_is_a_lower_bound(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 200, generator=generator, dtype=torch.float64) * 3
    b = a + noise * torch.randn(4, 200, generator=generator, dtype=torch.float64)
    true = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
    found = compare([top(row) for row in a], [top(row) for row in b]).kl
    assert -1e-6 <= found <= float(true) + 1e-6


def test_other_tokens_altogether_are_far_apart() -> None:
    a = [{1: math.log(0.9), 2: math.log(0.09)}]
    b = [{3: math.log(0.9), 1: math.log(1e-6)}]
    verdict = compare(a, b)
    assert verdict.kl > 5
    assert verdict.top1 == 0.0


def test_not_a_number_is_no_agreement() -> None:
    verdict = compare([{1: -0.1, 2: -3.0}], [{1: math.nan, 2: math.nan}])
    assert not verdict.kl <= 0.25

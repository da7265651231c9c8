"""The benchmark times nothing unless its gate is passed; the gate lets the kernels through and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.gpu.attention import NotEqualError, check
from benchmarks.gpu.cases import Case
from tests.triton.device.cases import DEVICE
from vllm_spectral.kernels.triton.layer import TritonLayer

SMALL = Case(requests=2, context=45, heads=1, query_heads=3, head_dim=32, block=32, bits=4.0)


def test_the_gate_lets_the_kernels_through() -> None:
    assert 0 < check(SMALL, DEVICE) < 1.5e-2


def test_the_gate_sees_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonLayer, "store", lambda self, keys, values, pages, slots: pages.fill_(7))
    with pytest.raises(NotEqualError, match="slots differ"):
        check(SMALL, DEVICE)


def test_the_gate_sees_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TritonLayer.attend

    def wrong(self, query, keys, values, pages, requests, output, *rest) -> None:  # type: ignore[no-untyped-def]
        right(self, query, keys, values, pages, requests, output, *rest)
        output[0] *= 1.1

    monkeypatch.setattr(TritonLayer, "attend", wrong)
    with pytest.raises(NotEqualError, match="away from the reference"):
        check(SMALL, DEVICE)

"""The rivals' kernels take what the benchmark gives them: vLLM's own, on a GPU or under the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu import rivals
from benchmarks.gpu.cases import Case
from vllm_spectral.kernels.interface import Bounds, Requests

CASE = Case(heads=2, query_heads=8, head_dim=128, requests=2, context=70, block=32)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("make", [rivals._turboquant, rivals._int4])
def test_a_step_of_decoding(make: Callable[..., Callable[[], torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    per_request = -(-CASE.context // CASE.block)
    table = torch.arange(CASE.requests * per_request, dtype=torch.int32, device=DEVICE).view(CASE.requests, -1)
    starts = torch.arange(CASE.requests + 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((CASE.requests,), CASE.context, dtype=torch.int32, device=DEVICE)
    query = torch.randn(CASE.requests, CASE.query_heads, CASE.head_dim, device=DEVICE).bfloat16()
    found = make(CASE, query, Requests(table, starts, lengths, None, None, Bounds(1, CASE.context)))()
    assert found.shape == query.shape
    # Pages of zeros: whatever the scores are, values of zero come out.
    assert torch.equal(found.float(), torch.zeros_like(found, dtype=torch.float32))

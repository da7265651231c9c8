"""The scratch that layers share: its size, who may use it at once, and what a call leaves alone."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.kernels.conftest import Step, codec_of, tokens
from vllm_spectral.kernels import layer as layer_module
from vllm_spectral.kernels.interface import Exact, Pool, Requests
from vllm_spectral.kernels.layer import NativeLayer, Workspace
from vllm_spectral.kernels.library import library


def test_a_long_context_takes_scratch_for_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that wait to be merged hold as many rows as the step has, not as many as a unit of work may have."""
    workspace = Workspace()
    monkeypatch.setattr(layer_module, "WORKSPACE", workspace)
    codec = codec_of(1, 64, 3.0)
    native, query, own = NativeLayer(codec), torch.randn(1, 4, 64), torch.randn(1, 1, 64)
    pages = torch.zeros(1, 1, 32, codec.layout.slot_bytes, dtype=torch.uint8)

    def needed(context: int) -> int:
        table = torch.zeros(1, context // 32, dtype=torch.int32)
        lens = torch.tensor([context], dtype=torch.int32)
        requests = Requests(table, torch.tensor([0, 1], dtype=torch.int32), lens)
        native.attend(query, own, own, pages, requests, torch.empty_like(query), 0.125)
        return workspace.num_bytes

    short, long = needed(4096), needed(1 << 18)
    spans, row = (1 << 18) // 1024, 4 * (3 * 64 + 2)
    assert long - short <= 2 * spans * 4 * row


def test_threads_take_turns() -> None:
    """A process may have engines in several threads, and the lock of Python is not held while a kernel runs."""
    steps = [Step(codec_of(2, 64, 3.0), 3, [context], [1], seed=context) for context in (300, 2900)]
    expected = [step.native(library(), exact=True) for step in steps]
    equal = [0, 0]

    def work(index: int) -> None:
        for _ in range(60):
            equal[index] += torch.equal(steps[index].native(library(), exact=True), expected[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [60, 60]


def test_a_layer_without_a_pool_writes_no_copies() -> None:
    """A step's plan is all layers'; one that has no copies must not write into those of the layer before."""
    codec = codec_of(2, 64, 3.0)
    keys = tokens(40, 0, 2, 64, torch.bfloat16)
    pages = torch.zeros(2, 2, 32, codec.layout.slot_bytes, dtype=torch.uint8)
    lens, starts = torch.tensor([40], dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32)
    places = torch.arange(40)
    exact = Exact(places, places, torch.full((1, 68), -1, dtype=torch.int32), 4, 64)
    requests = Requests(torch.tensor([[0, 1]], dtype=torch.int32), starts, lens, places, exact)
    pool = Pool(*torch.zeros(2, 5, 2, 8, 64, dtype=torch.bfloat16))
    query, output = torch.randn(40, 4, 64), torch.empty(40, 4, 64)
    NativeLayer(codec).attend(query, keys, keys, pages, requests, output, 0.125, pool)
    assert torch.equal(pool.keys.transpose(1, 2).reshape(40, 2, 64), keys)
    NativeLayer(codec).attend(query, 2 * keys, keys, pages, requests, output, 0.125)
    assert torch.equal(pool.keys.transpose(1, 2).reshape(40, 2, 64), keys)

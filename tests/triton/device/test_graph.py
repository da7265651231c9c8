"""A captured step replays with other lengths: no length is read on the host."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import Step, codec_of
from tests.tolerances import KERNEL_BF16
from tests.triton.device.cases import DEVICE, close, layer_of
from vllm_spectral.errors import KernelError
from vllm_spectral.kernels.layer import Requests
from vllm_spectral.kernels.triton.layer import Bounds, Scratch


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_replays_with_other_lengths() -> None:
    long, short = (Step(codec_of(2, 64, 3.0), 4, contexts, [1, 1]) for contexts in ([700, 30], [33, 600]))
    layer = layer_of(long.codec)
    pages = torch.zeros(64, *long.pages.shape[1:], dtype=torch.uint8, device=DEVICE)
    table = torch.zeros(2, 32, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    slots = torch.full((2,), -1, device=DEVICE)
    query, output = long.query.to(DEVICE), torch.empty_like(long.query, device=DEVICE)
    keys, values = (torch.cat([long.own(i)[k] for i in range(2)]).to(DEVICE) for k in (0, 1))

    def show(step: Step) -> None:
        pages[: len(step.pages)] = step.pages.to(DEVICE)
        for row, sequence in enumerate(step.sequences):
            table[row, : len(sequence.blocks)] = sequence.blocks.int().to(DEVICE)
        lengths.copy_(torch.tensor(step.contexts))
        query.copy_(step.query)
        slots.copy_(step.slots())
        for k, own in enumerate((keys, values)):
            own.copy_(torch.cat([step.own(i)[k] for i in range(2)]))

    def run() -> None:
        layer.store(keys, values, pages, slots)
        requests = Requests(table, torch.arange(3, dtype=torch.int32, device=DEVICE), lengths)
        layer.attend(query, keys, values, pages, requests, output, long.scale, Bounds(1, 1024))

    show(long)
    run()  # compiles, and lets scratch grow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for step in (long, short, long):
        show(step)
        output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        close(output.cpu().float(), step.reference(False), KERNEL_BF16)


def test_scratch_does_not_grow_under_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(torch.device("cuda", 0) if DEVICE.type == "cuda" else DEVICE)
    kept = scratch.take("sums", 100, torch.float32)
    monkeypatch.setattr(scratch, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert scratch.take("sums", 50, torch.float32) is kept
    assert scratch.num_bytes == 400
    with pytest.raises(KernelError, match="run the largest step once before capturing"):
        scratch.take("sums", 101, torch.float32)

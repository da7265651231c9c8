"""A captured step replays with other lengths: no length is read on the host."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.kernels.conftest import Step, codec_of
from tests.tolerances import KERNEL_BF16
from tests.triton.device.cases import DEVICE, close, layer_of
from vllm_spectral.errors import KernelError
from vllm_spectral.kernels.interface import Bounds, Requests
from vllm_spectral.kernels.triton.layer import Scratch
from vllm_spectral.kernels.triton.plan import most_scratch, plan_step


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_replays_with_other_lengths() -> None:
    long, short = (Step(codec_of(2, 64, 3.0), 4, contexts, [1, 1]) for contexts in ([700, 30], [33, 600]))
    layer = layer_of(long.codec)
    pages = torch.zeros(64, *long.pages.shape[1:], dtype=torch.uint8, device=DEVICE)
    table = torch.zeros(2, 32, dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    slots, starts = torch.full((2,), -1, device=DEVICE), torch.arange(3, dtype=torch.int32, device=DEVICE)
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
        requests = Requests(table, starts, lengths, slots, bounds=Bounds(1, 1024))
        layer.attend(query, keys, values, pages, requests, output, long.scale)

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
        # Two rows, and outputs of bf16: nothing averages out.
        close(output.cpu().float(), step.reference(False), 3 * KERNEL_BF16)


def test_scratch_does_not_grow_under_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(torch.device("cuda", 0) if DEVICE.type == "cuda" else DEVICE)
    kept = scratch.take("sums", 100, torch.float32)
    monkeypatch.setattr(scratch, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert scratch.take("sums", 50, torch.float32) is kept
    assert scratch.num_bytes == 400
    with pytest.raises(KernelError, match="run the largest step once before capturing"):
        scratch.take("sums", 101, torch.float32)


def test_reserved_scratch_never_grows_again() -> None:
    """A graph captured before would go on writing to memory that was given back."""
    scratch = Scratch(DEVICE)
    scratch.reserve({"sums": (100, torch.float32)})
    assert scratch.take("sums", 100, torch.float32).numel() == 100
    for name, count in (("sums", 101), ("flat", 1)):
        with pytest.raises(KernelError, match="more than were reserved"):
            scratch.take(name, count, torch.float32)


@pytest.mark.parametrize("group", [1, 4, 7, 71])
def test_what_is_reserved_is_enough_for_every_step(group: int) -> None:
    layer = layer_of(codec_of(2, 64, 3.0))
    rows, partial = most_scratch(300, group, 2, 20)
    for requests, tokens in ((1, 1), (1, 300), (300, 300), (7, 40), (30, 300), (2, 3)):
        for queries, context in product((1, 2, tokens), (1, 500, 100_000)):
            plan = plan_step(requests, tokens, queries, context, group, 2, 20)
            assert plan.scratch_floats(2, 1)[0] <= partial
            assert plan.whole or tokens * group <= rows
    layer.reserve(300, group)
    assert layer.workspace_bytes > 0

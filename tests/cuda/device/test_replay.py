"""A step that was captured once serves later ones: lengths, blocks and exact copies come from buffers that the builder fills.

On a GPU the step is captured in a CUDA graph. Without one, a capture is what it records: kernels, grids, numbers and
addresses; a replay launches just these again, under Triton's interpreter, and no code of the backend's runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from tests.conftest import DIM
from tests.cuda.device.conftest import BLOCK, KV_HEADS, QUERY_HEADS, Loaded
from tests.kernels.conftest import tokens
from tests.tolerances import KERNEL_BF16
from vllm_spectral.backend import impl
from vllm_spectral.backend.metadata import SpectralMetadata, SpectralMetadataBuilder
from vllm_spectral.codec.attention import ExactTokens, paged_attention
from vllm_spectral.kernels.triton.layer import TritonLayer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, MOST_TOKENS, BLOCKS = 4, 128, 24
FIRST, RECENT = 4, 16
"""A short window, so that short contexts are read from pages too."""


@dataclass
class Request:
    """What a request consists of, and where it lies."""

    seed: int
    blocks: list[int]
    length: int = 0
    keys: torch.Tensor = field(init=False)
    values: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.blocks) * BLOCK
        self.keys, self.values = (tokens(count, self.seed + side, KV_HEADS, DIM, torch.bfloat16) for side in (1, 2))

    def slots(self, start: int) -> list[int]:
        return [self.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, self.length)]


class Runner:
    """The part of vLLM's model runner that attention sees: inputs at fixed addresses, one layer, metadata for every step."""

    def __init__(self, loaded: Loaded) -> None:
        self.layer = loaded.layers[0]
        loaded.config.cache_config.block_size = BLOCK
        spec = self.layer.get_attn_backend().customize_spec(self.layer.get_kv_cache_spec(loaded.config))
        self.builder = SpectralMetadataBuilder(spec, loaded.names, loaded.config, DEVICE)
        shape = (BLOCKS, KV_HEADS, BLOCK, spec.state_content_bytes)
        self.pages = torch.zeros(shape, dtype=torch.uint8, device=DEVICE)
        self.starts = torch.zeros(ROWS + 1, dtype=torch.int32, device=DEVICE)
        self.lengths = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(ROWS, 16, dtype=torch.int32, device=DEVICE)
        self.slots = torch.full((MOST_TOKENS,), -1, dtype=torch.int64, device=DEVICE)
        self.query, self.output = (
            torch.zeros(MOST_TOKENS, QUERY_HEADS, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
        )
        self.keys, self.values = (
            torch.zeros(MOST_TOKENS, KV_HEADS, DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)
        )

    def common(self, rows: int, count: int, longest: int, context: int) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.starts[: rows + 1], query_start_loc_cpu=self.starts[: rows + 1].cpu(),
            seq_lens=self.lengths[:rows], num_reqs=rows, num_actual_tokens=count, max_query_len=longest,
            max_seq_len=context, block_table_tensor=self.table[:rows], slot_mapping=self.slots[:count],
        )  # fmt: skip

    def forward(self, metadata: SpectralMetadata, count: int) -> None:
        self.layer.impl.forward(
            self.layer, self.query[:count], self.keys[:count], self.values[:count], self.pages, metadata,
            self.output[:count],
        )  # fmt: skip

    def show(self, requests: list[Request], new: list[int], *, padded: bool) -> SpectralMetadata:
        """Put a step where the kernels look for it, as vLLM does before every step; its metadata."""
        start, generator = 0, torch.Generator().manual_seed(sum(new) + requests[0].length)
        for left in (self.query, self.keys, self.values, self.output):
            left.fill_(torch.nan)  # what pads a step is whatever was there
        self.slots.fill_(-1)
        self.lengths.zero_()
        self.table.zero_()
        for row, (request, count) in enumerate(zip(requests, new, strict=True)):
            before, request.length = request.length, request.length + count
            self.table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32, device=DEVICE)
            self.lengths[row], self.starts[row + 1] = request.length, start + count
            self.slots[start : start + count] = torch.tensor(request.slots(before), device=DEVICE)
            self.keys[start : start + count] = request.keys[before : request.length].to(DEVICE)
            self.values[start : start + count] = request.values[before : request.length].to(DEVICE)
            start += count
        self.starts[len(requests) + 1 :] = start
        query = 0.25 * torch.randn(start, QUERY_HEADS, DIM, generator=generator)
        self.query[:start] = query.bfloat16().to(DEVICE)
        rows, count = (ROWS, ROWS) if padded else (len(requests), start)
        longest = max(request.length for request in requests)
        return self.builder.build(0, self.common(rows, count, max(new), longest))

    def check(self, requests: list[Request], new: list[int]) -> None:
        """Compare with the reference over the same pages, each request's window exact."""
        codec, start = self.layer.impl.codec, 0
        for request, count in zip(requests, new, strict=True):
            rows = slice(start, start + count)
            before = request.length - count
            held = {*range(min(FIRST, before)), *range(max(before - RECENT, 0), request.length)}
            at = torch.tensor(sorted(held))
            exact = ExactTokens(at, request.keys[at], request.values[at], FIRST, RECENT)
            expected = paged_attention(
                self.query[rows].cpu(), self.pages.cpu(), torch.tensor(request.blocks), request.length, codec,
                self.layer.impl.scale, exact,
            )  # fmt: skip
            found = self.output[rows].cpu().float()
            assert torch.isfinite(found).all()
            # Single rows have nothing to average over.
            assert (found - expected).norm() <= 3 * KERNEL_BF16 * expected.norm()
            start += count


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], Callable[[], object]]:
    """``capture(run)`` runs once and gives what runs it again without any of its code."""
    record: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
    recording = False

    def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
        if recording:
            record.append((kernel, grid, arguments, options))
        kernel[grid](*arguments, **options)

    def kernels(codec: Any, device: torch.device, peer: Any) -> TritonLayer:
        return TritonLayer(codec, device, peer.scratch if peer else None, launch=launch)

    monkeypatch.setattr(impl, "layer_kernels", kernels)

    def taken(run: Callable[[], None]) -> Callable[[], object]:
        nonlocal recording
        if DEVICE.type == "cuda":
            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            return graph.replay
        recording = True
        run()
        recording = False

        def again() -> None:
            for kernel, grid, arguments, options in record:
                kernel[grid](*arguments, **options)

        return again

    return taken


def test_a_captured_step_replays_with_other_requests(configured: Any, load: Any, capture: Any) -> None:
    config = configured(
        {"exact_first_tokens": FIRST, "exact_recent_tokens": RECENT},
        max_num_batched_tokens=MOST_TOKENS, max_num_seqs=ROWS, max_model_len=512, kv_cache_memory_bytes=1 << 24,
    )  # fmt: skip
    runner = Runner(load(config, DEVICE.type))
    metadata = runner.builder.build_for_cudagraph_capture(runner.common(ROWS, ROWS, 1, 512))
    replay = capture(lambda: runner.forward(metadata, ROWS))
    copies = runner.layer.impl.copies
    assert not runner.pages.any() and not copies.keys.any(), "a captured step stores nothing"

    first, second, third = Request(10, [3, 7, 5]), Request(20, [9, 2]), Request(30, [1, 11])
    new = [62, 9]
    runner.forward(runner.show([first, second], new, padded=False), sum(new))
    runner.check([first, second], new)
    runner.forward(runner.show([third], [31], padded=False), 31)
    # Over the end of a block, with others in other rows, and with fewer than were captured.
    for requests in [[first, second]] * 3 + [[second, third, first], [third]]:
        runner.show(requests, [1] * len(requests), padded=True)
        replay()
        runner.check(requests, [1] * len(requests))
    counters = copies.tier.directory.counters
    assert counters.found == counters.wanted > 0
    for request in (first, second, third):
        stored = runner.layer.impl.codec.layout.read(runner.pages.cpu(), torch.tensor(request.blocks))[: request.length]
        encoded = runner.layer.impl.codec.encode(request.keys[: request.length], request.values[: request.length])
        assert torch.equal(stored, encoded), "a replay stores what the codec would store"

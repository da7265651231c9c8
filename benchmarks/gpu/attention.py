"""Decoding and storing on a GPU, alone: ``python -m benchmarks.gpu.attention --json benchmarks/results/gpu.json``.

Needs torch, Triton and numpy; run from the repository's root, nothing has to be installed. Correctness comes first: the
kernels are compared with the float64 reference on the same bytes, and nothing is timed unless they agree. Then every side
replays a CUDA graph of its own, sides take turns, and medians are reported:

    spectral    one decode step of one layer: queries rotated, pages and exact copies attended to, the result rotated back
    flash       torch's scaled_dot_product_attention on contiguous bf16 keys and values, forced to its FlashAttention
    flashinfer  FlashInfer's batch decode on bf16 pages, where it can be imported
    turboquant  vLLM's Triton decode of its 4-bit TurboQuant cache, where vLLM can be imported
    int4        vLLM's Triton decode of its int4_per_token_head cache, the same
    copy        a device-to-device copy of as many bytes as the context takes in spectral pages: the limit
    store       new keys and values compressed into pages
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu import rivals
from benchmarks.gpu.cases import Case, layer_codec, vectors
from vllm_spectral.codec.attention import ExactTokens, paged_attention
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.kernels.interface import Bounds, Exact, Pool, Requests
from vllm_spectral.kernels.triton.layer import Scratch, TritonLayer
from vllm_spectral.kernels.triton.plan import Tuning

FIRST, RECENT, COPY_GROUP = 4, 64, 8
TOLERANCE = 1.5e-2
"""Norm of the difference to the reference over its norm: as ``KERNEL_BF16`` in ``tests/tolerances.py``, for its reasons."""
ROUNDS, REPLAYS = 11, 20


class NotEqualError(Exception):
    """A kernel does not compute what the reference computes."""


@dataclass
class Step:
    """One decode step on a device: pages with other requests' between them, copies of every window."""

    case: Case
    codec: LayerCodec
    layer: TritonLayer
    query: Tensor
    keys: Tensor
    values: Tensor
    pages: Tensor
    requests: Requests
    pool: Pool
    slots: Tensor
    context: list[Tensor]

    def attend(self, output: Tensor) -> None:
        """The step of one layer without its store."""
        self.layer.attend(
            self.query,
            self.keys,
            self.values,
            self.pages,
            self.requests,
            output,
            self.case.head_dim**-0.5,
            self.pool,
        )

    def store(self) -> None:
        """The store of the step's tokens."""
        self.layer.store(self.keys, self.values, self.pages, self.slots)


def make_step(case: Case, device: torch.device, scratch: Scratch, tuning: Tuning | None = None) -> Step:
    """Build a step; every request has the case's context. The kernels themselves fill the pages."""
    codec = layer_codec(case)
    layer = TritonLayer(codec, device, scratch, tuning)
    per_request = -(-case.context // case.block)
    order = torch.randperm(case.requests * per_request, generator=torch.Generator().manual_seed(0))
    table = order.view(case.requests, per_request).int().to(device)
    shape = (case.requests * per_request, case.heads, case.block, codec.layout.slot_bytes)
    pages = torch.empty(shape, dtype=torch.uint8, device=device)
    # One context serves all requests: what is read, not what it says, is timed.
    context = [vectors(case.context, case.heads, case.head_dim, seed, device) for seed in (1, 2)]
    position = torch.arange(case.context, device=device)
    for request in range(case.requests):
        blocks = table[request].long()[position // case.block]
        layer.store(context[0], context[1], pages, blocks * case.block + position % case.block)
    before = case.context - case.queries
    start = max(before - RECENT, 0)
    window = torch.cat([torch.arange(min(FIRST, before)), torch.arange(start, before)])
    entries = -(-len(window) // COPY_GROUP)
    copies = torch.zeros(
        2, case.requests * entries, case.heads, COPY_GROUP, case.head_dim, dtype=torch.bfloat16, device=device
    )
    rows = torch.full((case.requests, FIRST + RECENT), -1, dtype=torch.int32)
    column = torch.cat([torch.arange(min(FIRST, before)), FIRST + torch.arange(before - start)])
    pool = Pool(copies[0], copies[1])
    for request in range(case.requests):
        row = request * entries * COPY_GROUP + torch.arange(len(window))
        rows[request, column] = row.int()
        layer.keep(context[0], context[1], pool, Exact(window.to(device), row.to(device), rows[:0], FIRST, RECENT))
    generator = torch.Generator(device).manual_seed(3)
    tokens = case.requests * case.queries
    query = torch.randn(tokens, case.query_heads, case.head_dim, generator=generator, device=device) * 0.5
    lengths = torch.full((case.requests,), case.context, dtype=torch.int32, device=device)
    starts = torch.arange(0, tokens + 1, case.queries, dtype=torch.int32, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    exact = Exact(none, none, rows.to(device), FIRST, RECENT)
    own = [side[before:].repeat(case.requests, 1, 1) for side in context]
    last = torch.arange(before, case.context, device=device)
    slots = (table.long()[:, last // case.block] * case.block + last % case.block).flatten()
    requests = Requests(table, starts, lengths, None, exact, Bounds(case.queries, case.context))
    return Step(case, codec, layer, query.bfloat16(), own[0], own[1], pages, requests, pool, slots, context)


def check(case: Case, device: torch.device, tuning: Tuning | None = None) -> float:
    """Compare store and attention with the reference.

    Returns:
        Norm of attention's error over the norm of the answer.

    Raises:
        NotEqualError: if bytes differ, or attention by more than bf16 explains.
    """
    step = make_step(case, device, Scratch(device), tuning)
    keys, values = (side.cpu() for side in step.context)
    expected = torch.zeros(step.pages.shape, dtype=torch.uint8)
    slots = step.codec.encode(keys, values)
    position = torch.arange(case.context)
    table = step.requests.block_table.cpu()
    for request in range(case.requests):
        place = table[request].long()[position // case.block] * case.block + position % case.block
        step.codec.layout.write(expected, place, slots)
        stored = step.codec.layout.read(step.pages.cpu(), table[request])[: case.context]
        if different := int((stored != slots).any(-1).sum()):
            raise NotEqualError(
                f"{case}: {different} of {stored.shape[0] * case.heads} slots differ from the reference's"
            )
    output = torch.full_like(step.query, torch.nan)
    step.attend(output)
    before = case.context - case.queries
    positions = torch.tensor(sorted({*range(min(FIRST, before)), *range(max(before - RECENT, 0), case.context)}))
    copies = ExactTokens(positions, keys[positions], values[positions], FIRST, RECENT)
    worst = 0.0
    for request in range(case.requests):
        rows = slice(request * case.queries, (request + 1) * case.queries)
        answer = paged_attention(
            step.query[rows].cpu(), expected, table[request], case.context, step.codec, case.head_dim**-0.5, copies
        )
        worst = max(worst, float((output[rows].cpu().float() - answer).norm() / answer.norm()))
    if not worst <= TOLERANCE:
        raise NotEqualError(f"{case}: attention is {worst:.2e} away from the reference, {TOLERANCE:.1e} are allowed")
    return worst


CHECKS = (
    Case(requests=2, context=300, heads=2, query_heads=8, block=32),
    Case(requests=1, context=130, queries=40, heads=1, query_heads=4, block=64, bits=4.0),
    Case(requests=2, context=200, heads=1, query_heads=7, head_dim=80, block=96, bits=2.5),
)
"""Decode and a prompt's chunk, a group and a head size that are no powers of two, tiles within blocks and across them."""


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """A replayed CUDA graph of ``REPLAYS`` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYS):
            run()
    return graph.replay


def timed(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds per call of every side; each round replays all sides, one after the other."""
    graphs = {name: graph_of(run) for name, run in sides.items()}
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(ROUNDS):
        for name, replay in graphs.items():
            start.record()
            replay()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / REPLAYS)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(case: Case, device: torch.device, scratch: Scratch, tuning: Tuning | None) -> dict[str, Any]:
    """Time one case."""
    step = make_step(case, device, scratch, tuning)
    output = torch.empty_like(step.query)
    source = torch.empty(step.pages.numel(), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sides: dict[str, Callable[[], object]] = {
        "spectral": lambda: step.attend(output),
        "copy": lambda: target.copy_(source),
        "store": step.store,
        **rivals.decode_sides(case, step.query, step.context, step.requests),
    }
    step.attend(output)  # scratch grows before graphs keep its addresses
    step.store()
    times = timed(sides)
    read = step.pages.numel() / times["spectral"] / 1e6
    bf16 = min(times[name] for name in rivals.BF16 if name in times)
    return {
        **asdict(case), "milliseconds": times, "page_bytes": step.pages.numel(), "gigabytes_per_second": read,
        # A copy reads and writes: in the same time twice its bytes cross the memory bus.
        "share_of_copy_bandwidth": read / (2 * step.pages.numel() / times["copy"] / 1e6),
        "times_as_fast_as_bf16": bf16 / times["spectral"],
        "times_as_fast_as_turboquant": times["turboquant"] / times["spectral"] if "turboquant" in times else None,
    }  # fmt: skip


def prefill(case: Case, device: torch.device, scratch: Scratch, tuning: Tuning | None) -> dict[str, Any]:
    """Time the store and the attention of one prompt that is one step."""
    step = make_step(case, device, scratch, tuning)
    output = torch.empty_like(step.query)
    step.attend(output)
    query = step.query.transpose(0, 1)[None]
    keys, values = (side.transpose(0, 1)[None] for side in step.context)

    def flash_prefill() -> object:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)

    return {
        **asdict(case),
        "milliseconds": timed({"spectral": lambda: step.attend(output), "store": step.store, "flash": flash_prefill}),
    }


def cases(args: argparse.Namespace, memory: int) -> Iterator[Case]:
    """Every combination whose bf16 keys and values fit a third of the memory."""
    for query_heads, requests, context in product(args.query_heads, args.requests, args.contexts):
        case = Case(query_heads=query_heads, requests=requests, context=context, bits=args.bits)
        if 4 * requests * context * case.heads * case.head_dim * 2 < memory // 3:
            yield case


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--bits", type=float, default=3.0, help="stored bits per element (3.0)")
    found.add_argument("--query-heads", type=int, nargs="+", default=[32, 64], help="beside 8 KV heads (32 64)")
    found.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 128], help="batch sizes (1 8 32 128)")
    found.add_argument("--contexts", type=int, nargs="+", default=[2048, 16384, 131072], help="tokens per request")
    found.add_argument(
        "--tune", action="store_true", help="try tile sizes, warps and register limits on one case first"
    )
    found.add_argument("--json", type=Path, help="where the results go")
    return found


def tuned(device: torch.device, scratch: Scratch) -> Tuning:
    """The fastest of some tunings at batch 32 and 16k of context."""
    found: list[tuple[float, Tuning]] = []
    for groups, warps, registers in product((1, 2, 4), (2, 4, 8), (0, 128, 168)):
        tuning = Tuning(groups=groups, warps=warps, registers=registers)
        try:
            step = make_step(Case(), device, scratch, tuning)
            output = torch.empty_like(step.query)
            step.attend(output)
            time = timed({"spectral": lambda: step.attend(output)})["spectral"]  # noqa: B023 - called at once
        except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
            print(f"  {tuning}: {str(error).splitlines()[0]}")
            continue
        print(f"  {tuning}: {time:.3f} ms", flush=True)
        found.append((time, tuning))
    return min(found, key=lambda pair: pair[0])[1]


def line(case: Case, result: dict[str, Any]) -> str:
    """What is printed of a case."""
    what = f"{case.query_heads}/{case.heads} heads, batch {case.requests}, {case.queries} of {case.context} tokens: "
    if "failed" in result:
        return f"{what}failed: {result['failed']}"
    found = what + ", ".join(f"{name} {time:.3f}" for name, time in result["milliseconds"].items()) + " ms"
    if case.queries > 1:
        return found
    return (
        f"{found}; {result['times_as_fast_as_bf16']:.2f} times as fast as bf16, "
        f"{100 * result['share_of_copy_bandwidth']:.0f} % of a copy's bandwidth"
    )


def main() -> int:
    args = parser().parse_args()
    if not torch.cuda.is_available():
        print(
            "No NVIDIA GPU here, so there is nothing to time. What can be said without one: python -m benchmarks.gpu.compiled"
        )
        return 2
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    print(f"{properties.name}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    for case in CHECKS:
        for tuning in (
            Tuning(),
            replace(Tuning(), least_tiles=1, programs_per_processor=64),
            Tuning(groups=4, warps=8),
        ):
            print(f"equal to the reference: {check(case, device, tuning):.1e}  {case}", flush=True)
    scratch = Scratch(device)
    tuning = tuned(device, scratch) if args.tune else Tuning()
    results: dict[str, list[dict[str, Any]]] = {"decode": [], "prefill": []}
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": properties.name,
        "torch": torch.__version__, "triton": triton.__version__, "command": " ".join(sys.argv),
        "tuning": asdict(tuning),
    }  # fmt: skip
    prompts = [Case(requests=1, queries=n, context=n, bits=args.bits) for n in (2048, 8192)]
    failed = False
    for case in [*prompts, *cases(args, properties.total_memory)]:
        kind, time_case = ("decode", measure) if case.queries == 1 else ("prefill", prefill)
        try:
            result = time_case(case, device, scratch, tuning)
        except Exception as error:
            # Whoever was lent a GPU wants the others all the same.
            traceback.print_exc()
            failed, result = True, {**asdict(case), "failed": str(error)}
        results[kind].append(result)
        print(line(case, result), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(about | results, indent=1) + "\n")
        torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

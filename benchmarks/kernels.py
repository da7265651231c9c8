"""Decode attention over compressed pages against vLLM's own CPU kernels, and against reading the same bytes.

``python -m benchmarks.kernels PROFILE [--json FILE]``. Every side walks through several caches that together exceed the last
cache level. Keys and values are drawn from the profile's own spectra, so that every width of field occurs as often as in
service; head_dim 128 is two heads of 64 side by side. Our side reads the exact tier as well, with the default window.
Correctness comes first: each case is compared with the reference.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.measure import beyond_cache, interleaved, ratios, save, spread
from vllm_spectral.backend.exact_tier import ExactTier, LayerCopies
from vllm_spectral.codec.attention import paged_attention
from vllm_spectral.exact.directory import ExactDirectory, StepPlan
from vllm_spectral.exact.window import ExactWindow, copy_bytes, group_tokens
from vllm_spectral.kernels.interface import Requests
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.library import ISA_VARIABLE, isas, library
from vllm_spectral.profile.schema import LayerProfile, Profile
from vllm_spectral.profile.storage import load_profile

BLOCK = 32
MOST_STOCK = 4 << 30
"""Most bytes that the stock kernel's caches of one case may take."""
SAMPLE = 4096


@dataclass(frozen=True)
class Case:
    """One point: KV heads, query heads per KV head, head size, tokens per request, requests."""

    heads: int
    group: int
    dim: int
    context: int
    batch: int


CASES = (
    Case(8, 4, 128, 16384, 1), Case(8, 4, 128, 65536, 1), Case(8, 4, 64, 16384, 1), Case(8, 4, 64, 65536, 1),
    Case(3, 3, 64, 7168, 8), Case(3, 3, 64, 1024, 32), Case(3, 3, 64, 256, 32), Case(3, 3, 64, 256, 1),
)  # fmt: skip


def widened(layer: LayerProfile, heads: int, times: int) -> LayerProfile:
    """``heads`` heads made of ``times`` of the layer's heads side by side each."""
    index = torch.arange(heads * times) % layer.key_bits.shape[0]

    def of(name: str, tensor: Tensor) -> Tensor:
        chosen = tensor[index].unflatten(0, (heads, times))
        if name.endswith("basis"):
            return torch.stack([torch.block_diag(*blocks) for blocks in chosen])
        return chosen.flatten(1)

    return LayerProfile(**{name: of(name, tensor) for name, tensor in vars(layer).items()})


def sample(basis: Tensor, spectrum: Tensor, seed: int) -> Tensor:
    """``[SAMPLE, heads, dim]`` bf16 with the given second moment."""
    draw = torch.randn(SAMPLE, *spectrum.shape, generator=torch.Generator().manual_seed(seed)) * spectrum.sqrt()
    return torch.einsum("thc,hdc->thd", draw, basis).bfloat16()


def exact_tier(case: Case) -> ExactTier:
    """Room for the windows of all of a case's requests in one layer."""
    window, size = ExactWindow(), group_tokens(BLOCK)
    entries = case.batch * window.entries_per_request(size)
    return ExactTier(ExactDirectory(window, entries, BLOCK), copy_bytes(case.heads, case.dim), 1)


def plan_step(tier: ExactTier, table: Tensor, context: int, queries: int) -> StepPlan:
    """The plan of a step in which every request has so many queries, all tokens before having been computed.

    Args:
        table: ``[num_requests, num_blocks]`` int32.
        context: tokens of a request after the step.
        queries: tokens of the step.
    """
    count = len(table)
    for start, end in ((0, context - queries), (context - queries, context)):
        positions = torch.arange(start, end)
        slots = table[:, positions // BLOCK].long() * BLOCK + positions % BLOCK
        lens, tokens = np.full(count, end), np.full(count, end - start)
        plan = tier.directory.step(table.numpy(), lens, tokens, slots.flatten().numpy())
    return plan


def stock_attention(
    case: Case, query: Tensor, requests: Requests, table: Tensor, cache_dtype: str = "auto"
) -> Callable[[Tensor, Tensor], None]:
    """VLLM's own kernel for a step of some requests, given a cache's keys and values."""
    isa = _get_attn_isa(torch.bfloat16, BLOCK, case.dim, cache_dtype)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=case.batch, num_heads=case.heads * case.group, num_kv_heads=case.heads, head_dim=case.dim,
        seq_lens=requests.context_lens, dtype=torch.bfloat16, query_start_loc=requests.query_start,
        causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True, dynamic_causal=None,
        kv_cache_dtype=cache_dtype,
    )  # fmt: skip
    output = torch.empty_like(query)

    def run(keys: Tensor, values: Tensor) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output,
            query_start_loc=requests.query_start, seq_lens=requests.context_lens, scale=case.dim**-0.5,
            causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0,
            scheduler_metadata=schedule, s_aux=None, kv_cache_dtype=cache_dtype,
        )  # fmt: skip

    return run


class Bench:
    """One case, ready to run."""

    def __init__(self, case: Case, profile: Profile, isa: str) -> None:
        self.case = case
        times = case.dim // profile.fingerprint.head_dim
        self.layer = layer = widened(profile.layers[len(profile.layers) // 3], case.heads, times)
        self.codec = layer.codec(profile.slot_bytes * times, profile.codebooks)
        self.isa = isa
        self.native = NativeLayer(self.codec, library({ISA_VARIABLE: isa}))
        self.blocks = -(-case.context // BLOCK)
        self.table = torch.randperm(self.blocks * case.batch).view(case.batch, -1).int()
        self.bytes = self.blocks * case.batch * self.codec.layout.page_bytes(BLOCK)
        count = -(-beyond_cache() // self.bytes) + 1
        keys = sample(layer.key_basis, layer.key_spectrum, 0)
        values = sample(layer.value_basis, layer.value_spectrum, 1)
        shape = (self.blocks * case.batch, case.heads, BLOCK, self.codec.layout.slot_bytes)
        first = torch.empty(shape, dtype=torch.uint8)
        for low in range(0, shape[0] * BLOCK, SAMPLE):
            place = torch.arange(low, min(low + SAMPLE, shape[0] * BLOCK))
            self.native.store(keys[: len(place)], values[: len(place)], first, place)
        self.pages = [first, *(first.clone() for _ in range(count - 1))]
        self.query = torch.randn(case.batch, case.heads * case.group, case.dim).bfloat16()
        self.output = torch.empty_like(self.query)
        self.keys = keys[: case.batch]  # of the step's own tokens
        starts = torch.arange(case.batch + 1, dtype=torch.int32)
        self.tier = exact_tier(case)
        self.plan = plan_step(self.tier, self.table, case.context, 1)
        lens = torch.full((case.batch,), case.context, dtype=torch.int32)
        self.requests = Requests(self.table, starts, lens, exact=self.tier.exact(self.plan))
        self.copies = [LayerCopies(self.tier, case.heads, case.dim, torch.device("cpu")) for _ in self.pages]
        for copies in self.copies:
            copies.keys.normal_()
            copies.values.normal_()
        self.scale = case.dim**-0.5

    def check(self) -> float:
        """Relative error against the reference on the same bytes; a kernel that is wrong is not timed."""
        self.attend(self.pages[0], self.copies[0])
        own = self.keys[:1]
        exact = self.copies[0].read(self.plan, 0, self.case.context, own, own)
        expected = paged_attention(
            self.query[:1], self.pages[0], self.table[0], self.case.context, self.codec, self.scale, exact
        )
        error = float((self.output[:1].float() - expected).norm() / expected.norm())
        if not error < (0.04 if "vnni" in self.isa or "amx" in self.isa else 0.02):
            raise SystemExit(f"{self.case}: wrong by {error:.1e}")
        return error

    def attend(self, pages: Tensor, copies: LayerCopies) -> None:
        """One step of every request over one of the caches."""
        query, own = self.query, self.keys
        self.native.attend(query, own, own, pages, self.requests, self.output, self.scale, copies.pool)

    def ours(self) -> Callable[[], None]:
        """Our kernel, a cache after the other."""
        caches = itertools.cycle(zip(self.pages, self.copies, strict=True))
        return lambda: self.attend(*next(caches))

    def read(self) -> Callable[[], int]:
        """Nothing but reading the same bytes, with as many threads."""
        pages, lib = itertools.cycle(self.pages), library()
        threads = torch.get_num_threads()

        def run() -> int:
            page = next(pages)
            return int(lib.read(page.data_ptr(), page.numel(), threads))

        return run

    def stock(self, cache_dtype: str) -> Callable[[], None]:
        """Time vLLM's kernel over caches of its own, as many as ours."""
        case = self.case
        shape = (self.blocks * case.batch, case.heads, 2 * BLOCK, case.dim)
        first = torch.randn(shape).bfloat16()
        if cache_dtype != "auto":
            first = first.to(torch.float8_e4m3fn).view(torch.uint8)
        count = max(2, min(len(self.pages), MOST_STOCK // first.nbytes))
        caches = [cache.chunk(2, dim=2) for cache in (first, *(first.clone() for _ in range(count - 1)))]
        attend, pool = (
            stock_attention(case, self.query, self.requests, self.table, cache_dtype),
            itertools.cycle(caches),
        )
        return lambda: attend(*next(pool))

    def compare(self, rounds: int = 9) -> dict[str, Any]:
        """Seconds per call of every side, one figure per round; checked first."""
        error = self.check()
        sides = {"ours": self.ours(), "bf16": self.stock("auto"), "fp8": self.stock("fp8"), "read": self.read()}
        return {"seconds": interleaved(sides, rounds=rounds), "bytes": self.bytes, "relative_error": error}


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=isas(), default=isas()[0])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    profile, results = load_profile(arguments.profile), []
    for case in CASES:
        bench = Bench(case, profile, arguments.isa)
        result = bench.compare()
        taken = result["seconds"]
        of_read = 100 * ratios(taken["read"], taken["ours"])
        sys.stdout.write(
            f"{case}: ours {spread(taken['ours'])} ms, bf16 / ours {ratios(taken['bf16'], taken['ours']):.2f}, "
            f"fp8 / ours {ratios(taken['fp8'], taken['ours']):.2f}, {of_read:.0f} % of the read limit, "
            f"{bench.bytes / statistics.median(taken['ours']) / 1e9:.1f} GB/s, error {result['relative_error']:.1e}\n"
        )
        sys.stdout.flush()
        results.append({"case": vars(case), **result})
    save(
        arguments.json,
        {"isa": arguments.isa, "threads": arguments.threads, "bits": profile.bits_per_element, "cases": results},
    )


if __name__ == "__main__":
    main()

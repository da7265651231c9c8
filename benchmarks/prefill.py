"""One layer's part of prefill, store and attention, against vLLM's own bf16 kernels.

``python -m benchmarks.prefill PROFILE [--isa ...] [--json FILE]``. Whole prompts, and the last chunk of one whose rest is in
the pages already, as after a chunk or a prefix hit. Instruction sets that are named are run side by side. Keys and values are
drawn from the profile's own spectra; our side writes and reads the exact tier as well, with the default window. Gated: the
last query's output must have the bits that decoding it gives.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.kernels import BLOCK, Bench, Case, exact_tier, plan_step, sample, stock_attention
from benchmarks.measure import interleaved, ratios, save, spread
from vllm_spectral.backend.exact_tier import LayerCopies
from vllm_spectral.kernels.interface import Requests
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.library import ISA_VARIABLE, isas, library
from vllm_spectral.profile.storage import load_profile

SHAPES = ((3, 3, 64), (8, 4, 128))
PROMPTS = ((128, 128), (1024, 1024), (4096, 4096), (4096, 512))
"""Tokens of context after the step, and those of the step."""


class Prefill:
    """One step of one request, ready to run on every side."""

    def __init__(self, bench: Bench, queries: int) -> None:
        case, layer = bench.case, bench.layer
        self.bench, self.queries = bench, queries
        self.query = torch.randn(queries, case.heads * case.group, case.dim).bfloat16()
        self.keys = sample(layer.key_basis, layer.key_spectrum, 2)[:queries].contiguous()
        self.values = sample(layer.value_basis, layer.value_spectrum, 3)[:queries].contiguous()
        self.output = torch.empty_like(self.query)
        positions = torch.arange(case.context - queries, case.context)
        self.slots = bench.table[0][positions // BLOCK].long() * BLOCK + positions % BLOCK
        starts = torch.tensor([0, queries], dtype=torch.int32)
        self.lens = torch.tensor([case.context], dtype=torch.int32)
        tier = exact_tier(case)
        plan = plan_step(tier, bench.table, case.context, queries)
        self.requests = Requests(bench.table, starts, self.lens, self.slots, tier.exact(plan))
        # The last token alone, the others being there.
        alone = tier.directory.step(bench.table.numpy(), self.lens.numpy(), np.ones(1, int), self.slots[-1:].numpy())
        self.last = Requests(
            bench.table, torch.tensor([0, 1], dtype=torch.int32), self.lens, self.slots[-1:], tier.exact(alone)
        )
        self.pool = LayerCopies(tier, case.heads, case.dim, torch.device("cpu")).pool
        self.pool.keys.normal_()
        self.pool.values.normal_()

    def ours(self, isa: str) -> Callable[[], None]:
        """Store, then attend, by an instruction set; checked first."""
        bench, native = self.bench, NativeLayer(self.bench.codec, library({ISA_VARIABLE: isa}))

        def run() -> None:
            native.attend(
                self.query, self.keys, self.values, bench.pages[0], self.requests, self.output, bench.scale, self.pool
            )

        run()
        alone, last = torch.empty_like(self.query[-1:]), self.query[-1:].contiguous()
        native.attend(last, self.keys[-1:], self.values[-1:], bench.pages[0], self.last, alone, bench.scale, self.pool)
        if not torch.equal(alone, self.output[-1:]):
            raise SystemExit(f"{bench.case}, {self.queries} queries, {isa}: decoding gives other bits")
        return run

    def stock(self) -> Callable[[], None]:
        """Stock's two operators over a cache of its own."""
        case = self.bench.case
        isa = _get_attn_isa(torch.bfloat16, BLOCK, case.dim, "auto")
        keys, values = torch.randn(self.bench.blocks, case.heads, 2 * BLOCK, case.dim).bfloat16().chunk(2, dim=2)
        attend = stock_attention(case, self.query, self.requests, self.bench.table)

        def run() -> None:
            ops.cpu_attn_reshape_and_cache(self.keys, self.values, keys, values, self.slots, isa)
            attend(keys, values)

        return run


def main() -> None:
    """Measure all prompts of both shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--isa", nargs="+", choices=isas(), default=[isas()[0]], help="run side by side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    profile = load_profile(arguments.profile)
    results: list[dict[str, Any]] = []
    for heads, group, dim in SHAPES:
        for context, queries in PROMPTS:
            prefill = Prefill(Bench(Case(heads, group, dim, context, 1), profile, arguments.isa[0]), queries)
            sides = {isa: prefill.ours(isa) for isa in arguments.isa} | {"stock": prefill.stock()}
            taken = interleaved(sides, rounds=arguments.rounds)
            for isa in arguments.isa:
                sys.stdout.write(
                    f"{heads} x {group} x {dim}, {queries} of {context} tokens, {isa}: {spread(taken[isa])} ms, "
                    f"stock / ours {ratios(taken['stock'], taken[isa]):.2f} "
                    f"(stock {1e3 * statistics.median(taken['stock']):.3f} ms)\n"
                )
            sys.stdout.flush()
            results.append({"shape": [heads, group, dim], "context": context, "queries": queries, "seconds": taken})
    save(arguments.json, {"threads": arguments.threads, "bits": profile.bits_per_element, "cases": results})


if __name__ == "__main__":
    main()

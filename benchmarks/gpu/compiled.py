"""What the compiler makes of the kernels, without a GPU: ``python -m benchmarks.gpu.compiled``.

Compiles every kernel for sm_90 with the arguments that a step passes, down to machine code, and prints registers, spilled
bytes, shared memory, and how many instructions the loop over pages spends per stored element: what bounds decoding once the
bytes are few.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.cases import Case, layer_codec
from vllm_spectral.kernels.interface import Bounds, Exact, Pool, Requests
from vllm_spectral.kernels.triton.layer import TritonLayer
from vllm_spectral.kernels.triton.plan import Tuning

CAPABILITY = 90
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code.

    Attributes:
        name: of the kernel.
        ptx: the intermediate code.
        cubin: the machine code.
        shared: bytes of shared memory.
    """

    name: str
    ptx: str
    cubin: bytes
    shared: int

    def resources(self) -> tuple[int, int]:
        """Registers per thread and bytes spilled to memory."""
        found = re.search(r"REG:(\d+) STACK:(\d+)", self._tool("cuobjdump", "-res-usage"))
        assert found, "cuobjdump has another format"
        return int(found[1]), int(found[2])

    def usual_round(self) -> Counter[str]:
        """Instructions of one round of the largest loop, by name, if no branch in it is taken to something rare.

        Rare is what the shortest way through the loop leaves out: vectors of the fallback, edges of windows.
        """
        lines: list[str] = []
        labels: dict[str, int] = {}
        for line in self._tool("nvdisasm", "-c").splitlines():
            if label := re.match(r"(\.L_x_\d+):", line.strip()):
                labels[label[1]] = len(lines)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(instruction[1])
        jumps = {i: labels[m[1]] for i, x in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", x))}
        back = max((i for i, to in jumps.items() if to < i), key=lambda i: i - jumps[i], default=None)
        if back is None:
            return Counter()
        # Fewest instructions from the loop's head to each place, in program order: the loop has no loops inside.
        best: dict[int, tuple[int, int]] = {jumps[back]: (0, -1)}
        for i in range(jumps[back], back):
            if i not in best:
                continue
            steps = [jumps[i]] if i in jumps else []
            if i not in jumps or lines[i].startswith("@"):
                steps.append(i + 1)
            for to in steps:
                if to > i and (to not in best or best[i][0] + 1 < best[to][0]):
                    best[to] = (best[i][0] + 1, i)
        names: Counter[str] = Counter()
        place = back
        while place >= 0:
            names[re.sub(r"^@!?U?P\w+\s+", "", lines[place]).split()[0].split(".")[0]] += 1
            place = best[place][1] if place in best else -1
        return names

    def _tool(self, name: str, *options: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.cubin)
            return subprocess.run([_TOOLS / name, *options, path], capture_output=True, text=True, check=True).stdout


def compile_call(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    """Compile a kernel for what a call passes, as Triton's own launcher would."""
    passed = dict(zip(kernel.arg_names, arguments, strict=False)) | {
        k: options[k] for k in options if k in kernel.arg_names
    }
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = passed[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    settings = {k: v for k, v in options.items() if k not in kernel.arg_names}
    result = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=settings)
    return Compiled(kernel.__name__, result.asm["ptx"], result.asm["cubin"], result.metadata.shared)


def compile_step(
    case: Case, tuning: Tuning | None = None, only: str = "", bounds: Bounds | None = None, **settings: Any
) -> Iterator[tuple[Compiled, dict[str, Any]]]:
    """Compile what one step launches: a store, exact copies, and attention.

    Args:
        case: the step.
        tuning: how it is cut.
        only: name of the one kernel that is wanted; default: all.
        bounds: of the step's lengths; default: the case's.
        settings: of the call.

    Yields:
        Each kernel and the options it was launched with.
    """
    done: list[tuple[Compiled, dict[str, Any]]] = []

    def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
        del grid
        if not only or kernel.__name__ == only:
            done.append((compile_call(kernel, arguments, options), options))

    codec = layer_codec(case)
    layer = TritonLayer(codec, torch.device("cpu"), tuning=tuning, launch=launch)
    tokens, dim = case.requests * case.queries, case.head_dim
    query = torch.zeros(tokens, case.query_heads, dim, dtype=torch.bfloat16)
    keys = torch.zeros(tokens, case.heads, dim, dtype=torch.bfloat16)
    pages = torch.zeros(4, case.heads, case.block, codec.layout.slot_bytes, dtype=torch.uint8)
    pool = Pool(*(torch.zeros(4, case.heads, 8, dim, dtype=torch.bfloat16) for _ in range(2)))
    rows = torch.zeros(case.requests, 68, dtype=torch.int32)
    exact = Exact(torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, dtype=torch.int64), rows, 4, 64)
    table = torch.zeros(case.requests, -(-case.context // case.block), dtype=torch.int32)
    lengths = torch.zeros(case.requests + 1, dtype=torch.int32)
    slots = torch.zeros(tokens, dtype=torch.int64)
    requests = Requests(table, lengths, lengths[1:], slots, exact, bounds or Bounds(case.queries, case.context))
    layer.attend(query, keys, keys, pages, requests, torch.zeros_like(query), dim**-0.5, pool, **settings)
    yield from done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="KERNEL", help="one kernel, e.g. pages_kernel")
    parser.add_argument("--groups", type=int, nargs="+", default=[Tuning.groups], help="groups of 32 tokens per tile")
    parser.add_argument("--warps", type=int, nargs="+", default=[Tuning.warps], help="warps of the pages kernel")
    parser.add_argument("--registers", type=int, nargs="+", default=[Tuning.registers], help="most per thread; 0: any")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    print(f"Triton {triton.__version__}, sm_{CAPABILITY}")
    print(
        f"{'step':8} {'kernel':15} tile warps registers spilled shared  instructions in a usual round of the longest loop"
    )
    for name, case in (("decode", Case()), ("prefill", Case(requests=1, queries=2048, context=4096))):
        for groups in args.groups:
            for warps in args.warps:
                for registers in args.registers:
                    tuning = Tuning(groups=groups, warps=warps, registers=registers)
                    for kernel, options in compile_step(case, tuning, args.only):
                        used, spilled = kernel.resources()
                        loop = kernel.usual_round()
                        each = ""
                        if kernel.name == "pages_kernel":
                            elements = groups * 32 * 2 * case.head_dim
                            each = f", {loop.total() * options['num_warps'] * 32 / elements:.1f} per element"
                        print(
                            f"{name:8} {kernel.name:15} {groups * 32:4} {options['num_warps']:5} {used:9} {spilled:7} "
                            f"{kernel.shared:6}  {loop.total()}{each}: {dict(loop.most_common(8))}"
                        )


if __name__ == "__main__":
    main()

"""Every kernel compiles for sm_90 with what a step passes: the interpreter accepts much that the compiler refuses."""

from __future__ import annotations

import os
import re

import pytest

from benchmarks.gpu.cases import Case
from benchmarks.gpu.compiled import compile_step

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

REGISTERS = 255
"""What a thread may address."""
SHARED_BYTES = 227 * 1024
"""What a program may use of an H100's shared memory."""


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (Case(heads=2, query_heads=8, context=8192), {"store", "copy", "prepare", "pages", "finish"}),
        (Case(heads=1, query_heads=5, head_dim=80, bits=4.0, requests=1, queries=40, context=256, block=32), {"pages"}),
    ],
    ids=["decode", "a prompt of five heads of 80"],
)
def test_every_kernel_compiles(case: Case, kernels: set[str]) -> None:
    found = {}
    for kernel, _ in compile_step(case):
        registers, spilled = kernel.resources()
        print(f"{kernel.name}: {registers} registers, {spilled} bytes spilled, {kernel.shared} bytes shared")
        assert registers <= REGISTERS
        assert kernel.shared <= SHARED_BYTES
        found[kernel.name.removesuffix("_kernel")] = kernel
    assert kernels <= set(found)
    # The scales' search repeats the reference's operations one by one; a contracted product would store other bytes.
    assert not re.search(r"\bfma\.rn(\.ftz)?\.f32|\.ftz\.f32", found["store"].ptx)
    assert "fma.rn.f64" in found["store"].ptx
    assert "mma" in found["pages"].ptx

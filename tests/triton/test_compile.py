"""Every kernel compiles for sm_90 with what a step passes: the interpreter accepts much that the compiler refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.gpu.cases import Case
from benchmarks.gpu.compiled import Compiled, compile_step
from vllm_spectral.kernels.interface import Bounds

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

REGISTERS = 255
"""What a thread may address."""
SHARED_BYTES = 227 * 1024
"""What a program may use of an H100's shared memory."""


def compiled(case: Case, **options: Any) -> dict[str, Compiled]:
    found = {}
    for kernel, _ in compile_step(case, **options):
        registers, spilled = kernel.resources()
        print(f"{kernel.name}: {registers} registers, {spilled} bytes spilled, {kernel.shared} bytes shared")
        assert registers <= REGISTERS
        assert kernel.shared <= SHARED_BYTES
        found[kernel.name.removesuffix("_kernel")] = kernel
    return found


def test_every_kernel_of_a_decode_step_compiles() -> None:
    found = compiled(Case(heads=2, query_heads=8, context=8192))
    assert set(found) == {"store", "copy", "prepare", "pages", "finish"}
    # The scales' search repeats the reference's operations one by one; a contracted product would store other bytes.
    assert not re.search(r"\bfma\.rn(\.ftz)?\.f32|\.ftz\.f32", found["store"].ptx)
    assert re.search(r"mma\.sync\S*\.f64", found["store"].ptx)
    assert "mma" in found["pages"].ptx


def test_a_mixed_step_with_odd_sizes_a_window_and_a_soft_cap_compiles() -> None:
    """One program per tile of rows, requests found by bisection, tiles across blocks."""
    case = Case(heads=1, query_heads=5, head_dim=80, bits=4.0, requests=4, context=256, block=32)
    found = compiled(case, only="pages_kernel", bounds=Bounds(200, 256), soft_cap=30.0, window=100)
    assert set(found) == {"pages"}


def test_wide_heads_fit_into_shared_memory() -> None:
    """A prompt's rows are finished by the program that read the pages: both rotations, copies and all."""
    case = Case(heads=8, query_heads=32, head_dim=256, context=8192, requests=64)
    assert set(compiled(case, only="pages_kernel", bounds=Bounds(200, 8192))) == {"pages"}


def test_the_benchmark_needs_torch_and_triton_alone() -> None:
    """It is carried to machines that have nothing else."""
    code = "import sys, benchmarks.gpu.attention; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "vllm",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "pydantic",
        "fastapi",
        "matplotlib",
        "prometheus_client",
    }
    assert "triton" in run.stdout.split()
    assert not heavy & set(run.stdout.split())

"""The CUDA backend's tests without a GPU: in a process of their own, because vLLM and Triton are told untruths for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda.pretend import PRETEND


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests in tests/cuda/device run as they are")
def test_as_if_on_a_gpu() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).parent / "device")],
        env={**os.environ, PRETEND: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

"""The kernels' tests without a GPU: in a process of their own, because Triton's interpreter changes Triton for good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE_TESTS = Path(__file__).parent / "device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests in tests/triton/device run as they are")
@pytest.mark.parametrize("path", sorted(DEVICE_TESTS.glob("test_*.py")), ids=lambda p: p.stem)
def test_under_the_interpreter(path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

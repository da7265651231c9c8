"""Timing that a shared machine cannot fool: sides interleaved, several rounds, medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def interleaved(
    sides: Mapping[str, Callable[[], object]], *, rounds: int = 9, seconds: float = 0.05
) -> dict[str, list[float]]:
    """Seconds per call of every side, one figure per round; each round runs all sides, one after the other.

    Every round begins with another side: what one leaves in the caches is not always the same one's to bear.

    Args:
        sides: what to time, by name.
        rounds: figures per side.
        seconds: calls are repeated for about this long per figure.
    """
    repeats = {}
    for name, run in sides.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(seconds / (time.perf_counter() - start)))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            run = sides[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            taken[name].append((time.perf_counter() - start) / repeats[name])
    return taken


def spread(figures: list[float]) -> str:
    """Median and range in milliseconds."""
    low, high = min(figures) * 1e3, max(figures) * 1e3
    return f"{statistics.median(figures) * 1e3:.3f} ({low:.3f} to {high:.3f})"


def ratios(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def beyond_cache() -> int:
    """Bytes that no cache of this machine holds: a quarter more than its largest, 96 MiB at least."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    kibibytes = [int(path.read_text().strip().removesuffix("K")) for path in caches]
    return max(96 << 20, max(kibibytes, default=0) * 1280)


def _circumstances() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), platform.machine()
    )
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} x {model}",
        "vector_extensions": sorted(f for f in flags.split() if f.startswith(("avx", "amx"))),
        "commit": commit + ("+" if dirty else ""),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("LD_PRELOAD", "MALLOC_", "OMP_", "ONEDNN_", "VLLM_CPU_"))
        },
    }


def _module() -> str:
    """What was started with ``python -m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


CIRCUMSTANCES = _circumstances()
"""Date, machine, commit, command and environment of a result: as its run began, not as it ended."""


def save(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(CIRCUMSTANCES | result, indent=1) + "\n")

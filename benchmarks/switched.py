"""``vllm-spectral serve`` that watches itself much more often than it should, one way at a time, or not at all.

For :mod:`benchmarks.overhead`. ``POST /v1/kv_cache/watching/{state}`` sets what is done until the next such request, and
answers with the figures of the moment before and the moment after; what was under way is waited for. States are those of
:data:`PAUSES`, ``sampling`` and ``off``; of its own accord the server does nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import Counter
from typing import Any

import psutil
from fastapi import Request
from vllm_spectral_server.monitor import Monitor
from vllm_spectral_server.routes import kv_cache

from vllm_spectral.cli.main import main

SAMPLED_EVERY = 1
"""Steps, in state ``sampling``."""
PAUSES = {"questions": 0.0, "canaries": 1.0}
"""Seconds between two questions to the workers, or two canaries, in the state of that name."""


def sample_every(worker: Any, every: int) -> None:
    """Runs in a worker."""
    worker._spectral_observer().every = every


class Switch:
    """What the server does to watch itself."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def turn(self, state: str, request: Request) -> dict[str, Any]:
        """Begin with something else."""
        monitor: Monitor = request.app.state.spectral
        self._stop.set()
        if self._task is not None:
            await self._task
        before = self._figures(monitor)
        every = SAMPLED_EVERY if state == "sampling" else 0
        await monitor.ask(sample_every, every)  # type: ignore[arg-type]  # vLLM takes functions, too
        after = self._figures(monitor)
        self._stop.clear()
        self._task = asyncio.create_task(self._repeat(monitor, state)) if state in PAUSES else None
        return {"before": before, "after": after}

    async def _repeat(self, monitor: Monitor, state: str) -> None:
        while not self._stop.is_set():
            await (monitor.refresh() if state == "questions" else monitor.canary.run(monitor._look))
            self._counts[state] += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), PAUSES[state])

    def _figures(self, monitor: Monitor) -> dict[str, Any]:
        parent, taken = psutil.Process(), 0.0
        for each in [parent, *parent.children(recursive=True)]:
            taken += sum(each.cpu_times()[:2])
        return {
            "seconds": time.perf_counter(),
            "processor_seconds": taken,
            "tokens": monitor.view.total("generated_tokens"),
            "steps": monitor.view.steps,
            "events": dict(self._counts),
            "canary_pause": monitor.canary.pause,
        }


if __name__ == "__main__":
    Monitor.running = lambda _monitor: contextlib.nullcontext()  # type: ignore[assignment,method-assign,return-value]
    kv_cache.router.add_api_route("/watching/{state}", Switch().turn, methods=["POST"])
    sys.exit(main())

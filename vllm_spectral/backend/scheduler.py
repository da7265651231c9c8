"""VLLM's scheduler, which also says what its free pages still hold, tells one front end all, and lets the canary go first.

A page that no request holds may still serve a prefix hit. vLLM counts it as free, and reports no more than that; from
outside, a full prefix cache and an empty one look the same.
"""

from __future__ import annotations

import os
import secrets
import time
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from vllm_spectral.backend.orphan import end_with_parent

USED_KEY, CACHED_KEY = "spectral:used_blocks", "spectral:cached_blocks"
"""Where the counts travel: in ``SchedulerStats.num_kv_fetch_reqs_by_stage``, the one field of the statistics that is a
free table of numbers; who reads the statistics takes them out again."""
CANARY_PREFIX = f"canary-{os.environ.setdefault('SPECTRAL_CANARY', secrets.token_hex(8))}-"
"""How the ids of the canary's requests begin. It goes before all that wait: it is there to say what answers are worth, not
how long the queue is. Some routes let clients name their requests, and they shall not: drawn by the process that starts
all others of a server, which inherit it."""
WATCHER = 0
"""Index of the front end that watches: where several processes serve HTTP, it hears of every step."""
_FIRST = -(2**31)
_PAUSE = 1000
"""Counting walks over all blocks, some 50 ns each; after a count there is a pause of so many times its duration."""


class _Spectral:
    """Mixed into a scheduler."""

    kv_cache_manager: Any
    waiting: Any
    _spectral_next = 0.0
    _spectral_counts: tuple[int, int] = (0, 0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The one thing of ours that lives in the engine's process, and only where a server started it.
        end_with_parent()

    def add_request(self, request: Request) -> None:
        """As vLLM's, but for the canary."""
        first = request.request_id.startswith(CANARY_PREFIX)
        if first:
            request.priority = _FIRST  # for a queue in the order of priorities
        super().add_request(request)  # type: ignore[misc]
        if first and request in self.waiting:
            self.waiting.remove_request(request)
            self.waiting.prepend_request(request)

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, but the statistics, which go to one front end, always go to the same, and are sent first."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        told = next((output for output in outputs.values() if output.scheduler_stats is not None), None)
        if told is None or told is outputs.get(WATCHER):
            return outputs
        watcher = outputs.pop(WATCHER, None) or EngineCoreOutputs()
        watcher.scheduler_stats, told.scheduler_stats = told.scheduler_stats, None
        return {WATCHER: watcher, **outputs}

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """As vLLM's, with the two counts; they are of one moment."""
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is None:
            return None
        idle = not stats.num_running_reqs and not stats.num_waiting_reqs
        if idle or time.perf_counter() > self._spectral_next:
            self._spectral_counts = self._spectral_count()
        stats.num_kv_fetch_reqs_by_stage[USED_KEY], stats.num_kv_fetch_reqs_by_stage[CACHED_KEY] = self._spectral_counts
        return stats

    def _spectral_count(self) -> tuple[int, int]:
        start, pool = time.perf_counter(), self.kv_cache_manager.block_pool
        cached = sum(block.ref_cnt == 0 and block.block_hash is not None for block in pool.blocks)
        # The null block is vLLM's own.
        used = len(pool.blocks) - 1 - pool.get_num_free_blocks()
        now = time.perf_counter()
        self._spectral_next = now + _PAUSE * (now - start)
        return used, cached


class SpectralScheduler(_Spectral, Scheduler):
    """For synchronous scheduling."""


class SpectralAsyncScheduler(_Spectral, AsyncScheduler):
    """For asynchronous scheduling."""


def use_spectral_scheduler(vllm_config: VllmConfig) -> None:
    """Have the engine use a scheduler of ours, unless the user chose one of their own.

    Must run after vLLM has settled its configuration, since the class depends on whether scheduling is asynchronous.
    """
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SpectralAsyncScheduler if scheduler.async_scheduling else SpectralScheduler

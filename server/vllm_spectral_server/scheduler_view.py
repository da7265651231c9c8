"""What the schedulers last said: pages in use, requests, tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_spectral.backend.scheduler import CACHED_KEY, USED_KEY

RATE_SECONDS = 10.0
COUNTS = ("prompt_tokens", "generated_tokens", "preemptions")
"""What is counted since the start, by every front end for its own requests."""


@dataclass
class EngineView:
    """One engine, as of its last step.

    vLLM reports with every scheduler step, the step that frees the last request included, so that an idle engine shows what
    is really held.

    Attributes:
        blocks: held by requests (vLLM keeps one more, the null block, for itself), and held by none but still serving prefix
            hits. One pair, replaced as a whole: whoever reads it in another thread reads one moment's.
        running, waiting: requests.
    """

    blocks: tuple[int, int] = (0, 0)
    running: int = 0
    waiting: int = 0


@dataclass
class SchedulerView:
    """All engines of this server.

    Attributes:
        engines: by data-parallel rank.
        counts: :data:`COUNTS` of every front end, one after the other. Each writes its own; where there are several they lie
            in shared memory.
        front_end: which of them this is.
        steps: of all engines so far, as far as they told this front end.
        stepped: when the last of them was, on the monotonic clock.
    """

    engines: dict[int, EngineView] = field(default_factory=dict)
    counts: MutableSequence[int] = field(default_factory=lambda: [0] * len(COUNTS))
    front_end: int = 0
    steps: int = 0
    stepped: float = 0.0
    _counted: tuple[int, int] = (0, 0)
    _recent: deque[tuple[float, int, int]] = field(default_factory=deque)

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """Factory for vLLM's ``stat_loggers``."""
        self.engines[engine_index] = EngineView()
        return _Recorder(self, vllm_config, engine_index)

    def total(self, name: str) -> int:
        """A figure summed over the engines, or over the front ends."""
        if name in COUNTS:
            return sum(self.counts[COUNTS.index(name) :: len(COUNTS)])
        return sum(getattr(engine, name) for engine in self.engines.values())

    def tokens_per_second(self) -> tuple[float, float]:
        """Prompt and generated tokens per second over the last :data:`RATE_SECONDS`."""
        self._look()
        return tuple(sum(entry[i] for entry in self._recent) / RATE_SECONDS for i in (1, 2))  # type: ignore[return-value]

    def _look(self) -> None:
        """Note what was counted since the last look, by all front ends."""
        now, counted = time.monotonic(), (self.total("prompt_tokens"), self.total("generated_tokens"))
        if counted != self._counted:
            self._recent.append((now, counted[0] - self._counted[0], counted[1] - self._counted[1]))
            self._counted = counted
        while self._recent and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()

    def record(self, engine_index: int, scheduler: Any, iteration: Any) -> None:
        """Take in what vLLM says after a step; either part may be None."""
        view = self.engines[engine_index]
        if scheduler is not None:
            self.steps += 1
            self.stepped = time.monotonic()
            counts = scheduler.num_kv_fetch_reqs_by_stage
            # Ours ride in a table that vLLM's own loggers read after us.
            view.blocks = counts.pop(USED_KEY, 0), counts.pop(CACHED_KEY, 0)
            view.running = scheduler.num_running_reqs
            view.waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
        if iteration is not None:
            new = (
                iteration.prompt_token_stats.computed, iteration.num_generation_tokens, iteration.num_preempted_reqs,
            )  # fmt: skip
            for index, count in enumerate(new, self.front_end * len(COUNTS)):
                self.counts[index] += count
        self._look()


class _Recorder(StatLoggerBase):
    def __init__(self, view: SchedulerView, _vllm_config: Any, engine_index: int) -> None:
        self._view, self._engine_index = view, engine_index

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_args: Any, **_kwargs: Any) -> None:
        self._view.record(self._engine_index, scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say at start."""

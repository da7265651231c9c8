"""How much of the page pool is in use, as the scheduler last said."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class PoolUsage:
    """The latest share of pages in use.

    vLLM reports it with every scheduler step, the step that frees the last request included, so that an idle engine
    shows what is really held.
    """

    def __init__(self) -> None:
        self.fraction = 0.0

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """Factory for vLLM's ``stat_loggers``."""
        return _Recorder(self, vllm_config, engine_index)

    def used_blocks(self, num_blocks: int) -> int:
        """Blocks in use of ``num_blocks``; vLLM keeps one, the null block, for itself and leaves it out of the share."""
        return round(self.fraction * (num_blocks - 1))


class _Recorder(StatLoggerBase):
    def __init__(self, usage: PoolUsage, _vllm_config: Any, _engine_index: int) -> None:
        self._usage = usage

    def record(self, scheduler_stats: Any, *_args: Any, **_kwargs: Any) -> None:
        if scheduler_stats is not None:
            self._usage.fraction = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say at start."""

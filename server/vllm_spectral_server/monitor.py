"""The one place that knows the state of the cache: routes, metrics, page and log all show what it has."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from vllm.logger import init_logger

from vllm_spectral.profile.schema import Profile
from vllm_spectral.stats.memory import EngineMemory, MemoryReport, WorkerMemory
from vllm_spectral.stats.moments import LayerMoments
from vllm_spectral_server.canary import Canary, LayerCheck
from vllm_spectral_server.scheduler_view import SchedulerView
from vllm_spectral_server.schemas import Alarm

logger = init_logger("vllm.spectral.monitor")

POLL_SECONDS = 2.0
HISTORY = 3000
"""Probes shown: with 30 layers and a canary a minute, an hour and a half without traffic."""
LEAST_PROBES = 3
"""Probes of a layer before its mean can raise an alarm."""
LEAST_TOKENS = 2048
"""Tokens in a layer's live moments before its drift can."""
_FIGURES = ("output_error", "attention_kl", "fallback_share", "clipped_share")


@dataclass(frozen=True)
class Limits:
    """Past these a figure raises an alarm.

    Attributes:
        error_ratio: squared error of a layer's keys or values over what the profile predicts. Sound profiles stayed below
            1.25 on text unlike their calibration's.
        drift: share of the energy that left the profile's leading channels. Sound profiles stayed below .04; transposed or
            foreign bases began at .085, most at .2 (``docs/metrics.md``).
        kl: of the canary's predictions, nats per token.
    """

    error_ratio: float = 1.5
    drift: float = 0.08
    kl: float = 0.25


@dataclass(frozen=True)
class LayerState:
    """One layer over all ranks: means of the figures, the worst error ratio and drift. None: nothing measured yet."""

    layer: int
    samples: int
    time: float | None
    figures: dict[str, float]
    error_ratio: float | None
    key_drift: float | None
    value_drift: float | None
    moment_tokens: int

    @property
    def drift(self) -> float | None:
        """The larger of the two."""
        return max((d for d in (self.key_drift, self.value_drift) if d is not None), default=None)

    @classmethod
    def joined(cls, ranks: Sequence[dict[str, Any]]) -> LayerState:
        """From every rank's report of the layer."""
        seen = [rank for rank in ranks if rank["samples"]]

        def worst(values: Iterable[float | None]) -> float | None:
            return max((value for value in values if value is not None), default=None)

        return cls(
            layer=ranks[0]["layer"],
            samples=max(rank["samples"] for rank in ranks),
            time=worst([rank["time"] for rank in ranks]),
            figures={name: sum(r["means"][name] for r in seen) / len(seen) for name in _FIGURES} if seen else {},
            error_ratio=worst([rank["means"]["error_ratio"] for rank in seen]),
            key_drift=worst([rank["key_drift"] for rank in ranks]),
            value_drift=worst([rank["value_drift"] for rank in ranks]),
            moment_tokens=min(rank["moment_tokens"] for rank in ranks),
        )


class Monitor:
    """Asks the workers every other second, runs the canary, and keeps what they say.

    Args:
        engine: vLLM's engine.
        view: the schedulers' side.
        model: what the user called the model.
        profile: the active profile, or None for the stock cache: then memory is all there is to watch.
        limits: when to raise an alarm.
        canary_seconds: pause between two canaries; 0: none.

    Attributes:
        memory, layers, history, alarms, canary: what is known now.
        on_refresh: told when the workers have answered.
        every, sampled_steps, sampling_seconds: of the sampling; steps of the first rank, seconds of all.
    """

    def __init__(
        self,
        engine: Any,
        view: SchedulerView,
        model: str,
        profile: Profile | None,
        limits: Limits,
        canary_seconds: float,
    ) -> None:
        self.engine, self.view, self.model, self.profile, self.limits = engine, view, model, profile, limits
        self.canary = Canary(engine, self.ask, canary_seconds, limits.kl, limits.error_ratio, limits.drift)
        self.layers: list[LayerState] = []
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.alarms: list[Alarm] = []
        self.on_refresh: Callable[[], None] = lambda: None
        self.every = self.sampled_steps = 0
        self.sampling_seconds = 0.0
        self.exact_counters: dict[str, int] = {}
        self._workers: list[list[WorkerMemory]] = []
        self._canary_layers: dict[int, LayerCheck] = {}
        self._lock = asyncio.Lock()

    async def ask(self, method: str, *args: Any) -> list[list[Any]]:
        """Call a method of the workers: answers of every rank of every engine."""
        answers: list[list[Any]] = await self.engine.engine_core.call_utility_all_async(
            "collective_rpc", method, None, args, None
        )
        return answers

    @property
    def memory(self) -> MemoryReport:
        """What is resident, as the workers last said, and what of it is in use, as the schedulers last said."""
        engines = [
            EngineMemory(tuple(workers), view.used_blocks, view.cached_blocks)
            for workers, view in zip(self._workers, self.view.engines.values(), strict=True)
        ]
        return MemoryReport(self.engine.vllm_config.cache_config.block_size, tuple(engines))

    def held(self, num_tokens: int) -> dict[str, int]:
        """Tokens and page bytes of a request that holds so many tokens: whole blocks, shared prefixes included."""
        report = self.memory
        blocks = -(-num_tokens // report.block_size_tokens)
        return {"tokens": num_tokens, "bytes": blocks * report.block_size_tokens * report.bytes_per_token}

    @property
    def ready(self) -> tuple[bool, str]:
        """Whether answers are to be trusted, and why not."""
        if self.engine.errored:
            return False, "the engine has failed"
        if self.canary.state in ("failed", "pending"):
            return False, f"canary: {self.canary.message}"
        return True, "the engine runs" + (f"; canary: {self.canary.message}" if self.canary.state == "passed" else "")

    async def start(self) -> None:
        """What must be known before the first request."""
        if self.profile is None:
            self.canary.state, self.canary.message = "off", "the stock cache is served"
        elif not self.canary.every_seconds:
            self.canary.state, self.canary.message = "off", "switched off"
        else:
            await self.canary.record()
            if self.canary.state == "pending":
                await self.canary.run(self._look)
            (logger.error if self.canary.state == "failed" else logger.info)("canary: %s", self.canary.message)
        await self.refresh()

    async def refresh(self) -> None:
        """Ask the workers now."""
        async with self._lock:
            self._workers = [[WorkerMemory.from_wire(w) for w in ranks] for ranks in await self.ask("spectral_memory")]
            if self.profile is not None:
                await self._refresh_fidelity()
            self.on_refresh()

    async def _refresh_fidelity(self) -> None:
        reports = [report for ranks in await self.ask("spectral_fidelity") for report in ranks]
        first = reports[0]
        self.every, self.sampled_steps = first["every"], first["sampled_steps"]
        self.sampling_seconds = sum(report["seconds"] for report in reports)
        self.layers = [LayerState.joined(layer) for layer in zip(*(r["layers"] for r in reports), strict=True)]
        for entry in sorted((e for report in reports for e in report["history"]), key=lambda e: e["time"]):
            self.history.append(entry)
            if entry["canary"]:
                before = self._canary_layers.get(entry["layer"], LayerCheck(0.0, 0.0))
                # The worst of all ranks.
                self._canary_layers[entry["layer"]] = LayerCheck(
                    max(entry["error_ratio"], before.error_ratio), max(entry["drift"], before.drift)
                )
        totals = [counters for ranks in await self.ask("spectral_exact_counters") for counters in ranks]
        self.exact_counters = {name: sum(c[name] for c in totals) for name in totals[0]} if all(totals) else {}
        self._judge()

    async def _look(self) -> dict[int, LayerCheck]:
        async with self._lock:
            await self._refresh_fidelity()
            found, self._canary_layers = self._canary_layers, {}
        return found

    def _judge(self) -> None:
        found = [*self._canary_alarms(), *self._error_alarms(), *self._drift_alarms()]
        unique = {(alarm.kind, alarm.layer): alarm for alarm in reversed(found)}
        before = {(alarm.kind, alarm.layer) for alarm in self.alarms}
        for key in unique.keys() - before:
            logger.warning("%s", unique[key].message)
        self.alarms = [alarm for alarm in found if unique[alarm.kind, alarm.layer] is alarm]

    def _canary_alarms(self) -> Iterator[Alarm]:
        if self.canary.state != "failed":
            return
        bad = {layer: check for layer, check in self.canary.layers.items() if not self.canary.passes(check)}
        worst = max(bad, key=lambda layer: bad[layer].error_ratio, default=None)
        value, limit = self.canary.verdict.kl if self.canary.verdict else 0.0, self.limits.kl
        if value <= limit and worst is not None:
            value, limit = bad[worst].error_ratio, self.limits.error_ratio
        yield Alarm(kind="canary", layer=worst, value=value, limit=limit, message=self.canary.message)
        for layer, check in sorted(bad.items()):
            if not check.error_ratio <= self.limits.error_ratio:
                yield self._error_alarm(layer, check.error_ratio, "the canary's tokens")
            if not check.drift <= self.limits.drift:
                yield self._drift_alarm(layer, check.drift, "the canary's tokens, which are like the built-in prompts")

    def _error_alarms(self) -> Iterator[Alarm]:
        for state in self.layers:
            ratio = state.error_ratio
            if state.samples >= LEAST_PROBES and ratio is not None and not ratio <= self.limits.error_ratio:
                yield self._error_alarm(state.layer, ratio, "live traffic")

    def _drift_alarms(self) -> Iterator[Alarm]:
        for state in self.layers:
            if state.moment_tokens >= LEAST_TOKENS and state.drift is not None and not state.drift <= self.limits.drift:
                hint = "live traffic; vllm-spectral calibrate --from-traffic makes a profile for it"
                yield self._drift_alarm(state.layer, state.drift, hint)

    def _drift_alarm(self, layer: int, value: float, where: str) -> Alarm:
        return Alarm(
            kind="drift", layer=layer, value=value, limit=self.limits.drift,
            message=f"layer {layer}: {value:.0%} of the energy lies outside the channels that the profile was made for, in "
            f"{where}",
        )  # fmt: skip

    def _error_alarm(self, layer: int, ratio: float, where: str) -> Alarm:
        return Alarm(
            kind="error", layer=layer, value=ratio, limit=self.limits.error_ratio,
            message=f"layer {layer}: keys or values of {where} are stored with {ratio:.1f} times the error that the profile "
            "predicts",
        )  # fmt: skip

    async def live_moments(self) -> dict[str, torch.Tensor]:
        """Moments gathered from traffic: engines added up, ranks' heads joined; by ``layer.name``."""
        total: dict[str, torch.Tensor] = {}
        for ranks in await self.ask("spectral_live_moments"):
            # Where ranks outnumber heads, neighbours hold the same one.
            copies = max(len(ranks) // self.profile.fingerprint.num_kv_heads, 1) if self.profile else 1
            files = [load(data) for data in ranks[::copies]]
            for layer in sorted({int(name.split(".")[0]) for name in files[0]}):
                prefix = f"{layer}."
                parts = [
                    LayerMoments.from_tensors(
                        {n.removeprefix(prefix): t for n, t in file.items() if n.startswith(prefix)}
                    )
                    for file in files
                ]
                for name, tensor in LayerMoments.joined(parts).to_tensors().items():
                    total[prefix + name] = total[prefix + name] + tensor if prefix + name in total else tensor
        return total

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Watch until the end of the block."""
        tasks = [asyncio.create_task(self._poll()), asyncio.create_task(self._sing())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _poll(self) -> None:
        while not self.engine.errored:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.refresh()
            except Exception:
                logger.exception("the workers could not be asked")

    async def _sing(self) -> None:
        if self.canary.state == "off":
            return
        while not self.engine.errored:
            await asyncio.sleep(self.canary.every_seconds)
            before = self.canary.state
            try:
                await self.canary.run(self._look)
            except Exception:
                logger.exception("the canary could not be run")
                continue
            if self.canary.state != before:
                (logger.error if self.canary.state == "failed" else logger.info)("canary: %s", self.canary.message)

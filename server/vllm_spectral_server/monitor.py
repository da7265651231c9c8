"""The one place that knows the state of the cache: routes, metrics, page and log all show what it has."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load
from vllm.logger import init_logger

from vllm_spectral.profile.schema import Profile
from vllm_spectral.stats.memory import EngineMemory, MemoryReport, WorkerMemory
from vllm_spectral.stats.moments import LayerMoments
from vllm_spectral_server.canary import Canary, LayerCheck, Limits, worst
from vllm_spectral_server.scheduler_view import SchedulerView
from vllm_spectral_server.schemas import Alarm
from vllm_spectral_server.usage import held

logger = init_logger("vllm.spectral.monitor")

POLL_SECONDS = 10.0
"""Between two questions to the workers. Each holds the engine up, 5 to 12 ms on two cores: a thousandth of the time."""
IDLE_SECONDS = 60.0
"""Between two questions while nothing runs. A worker that has answered spins for a second, in wait for more."""
HISTORY = 3000
"""Probes shown: with 30 layers and a canary a minute, an hour and a half without traffic."""
LEAST_PROBES = 3
"""Probes of a layer before its mean can raise an alarm."""
STALE_RUNS, STALE_SECONDS = 5, 120.0
"""A canary that was not answered for so many of its periods, or so long, is no reason to be ready any more."""
LEAST_TOKENS = 2048
"""Tokens in a layer's live moments before its drift can."""
_FIGURES = ("output_error", "attention_kl", "fallback_share", "clipped_share")


@dataclass(frozen=True)
class LayerState:
    """One layer over all ranks. None: nothing measured yet.

    Figures are means over the heads, hence over the tensor-parallel ranks of an engine, which share the heads: so a limit
    means the same however many ranks there are. Of several engines, and of the kernels of several ranks, the worst counts.
    """

    layer: int
    samples: int
    time: float | None
    figures: dict[str, float]
    error_ratio: float | None
    kernel_error: float | None
    key_drift: float | None
    value_drift: float | None
    moment_tokens: int

    @property
    def drift(self) -> float | None:
        """The larger of the two."""
        return worst((self.key_drift, self.value_drift))

    @classmethod
    def joined(cls, engines: Sequence[Sequence[dict[str, Any]]]) -> LayerState:
        """From the reports of the layer by every rank of every engine."""
        ranks = [rank for engine in engines for rank in engine]
        # The ranks of an engine sample the same steps.
        seen = [engine for engine in engines if all(rank["samples"] for rank in engine)]
        return cls(
            layer=ranks[0]["layer"],
            samples=sum(engine[0]["samples"] for engine in engines),
            time=worst(rank["time"] for rank in ranks),
            figures={name: fmean(rank["means"][name] for e in seen for rank in e) for name in _FIGURES} if seen else {},
            error_ratio=worst(_mean(rank["means"]["error_ratio"] for rank in engine) for engine in seen),
            kernel_error=worst(rank["means"]["kernel_error"] for engine in seen for rank in engine),
            key_drift=worst(_mean(rank["key_drift"] for rank in engine) for engine in engines),
            value_drift=worst(_mean(rank["value_drift"] for rank in engine) for engine in engines),
            moment_tokens=max(min(rank["moment_tokens"] for rank in engine) for engine in engines),
        )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def join_probes(ranks: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The probes of an engine's tensor-parallel ranks as if one rank had all heads; see :class:`LayerState`."""
    if len({tuple((probe["layer"], probe["canary"]) for probe in probes) for probes in ranks}) > 1:
        # A rank where sampling failed has fewer; that is an alarm of its own, and nothing is hidden.
        return [probe for probes in ranks for probe in probes]
    return [
        parts[0]
        | {name: fmean(part[name] for part in parts) for name in (*_FIGURES, "error_ratio", "drift")}
        | {"kernel_error": worst(part["kernel_error"] for part in parts)}
        for parts in zip(*ranks, strict=True)
    ]


def _layer_alarms(
    layer: int, ratio: float | None, drift: float | None, kernel: float | None, where: str, limits: Limits
) -> Iterator[Alarm]:
    """What is past its limit in a layer. Limits of the canary's tokens are the profile's own."""
    # Not a number compares as false both ways, and must not pass.
    if ratio is not None and not ratio <= limits.error_ratio:
        yield Alarm(
            kind="error", layer=layer, value=ratio, limit=limits.error_ratio,
            message=f"layer {layer}: keys or values of {where} are stored with {ratio:.1f} times the error that the "
            "profile predicts",
        )  # fmt: skip
    if kernel is not None and not kernel <= limits.kernel_error:
        yield Alarm(
            kind="error", layer=layer, value=kernel, limit=limits.kernel_error,
            message=f"layer {layer}: the kernels' attention to {where} is {kernel:.1%} off the reference's",
        )  # fmt: skip
    if drift is not None and not drift <= limits.drift:
        yield Alarm(
            kind="drift", layer=layer, value=drift, limit=limits.drift,
            message=f"layer {layer}: {drift:.0%} of the energy of {where} lies outside the channels that the profile was "
            "made for; if it is the traffic, vllm-spectral calibrate --from-traffic makes a profile for it",
        )  # fmt: skip


class Monitor:
    """Asks the workers, every ten seconds while they work, runs the canary, and keeps what they say.

    Args:
        engine: vLLM's engine.
        view: the schedulers' side.
        model: what the user called the model.
        profile: the active profile, or None for the stock cache: then memory is all there is to watch.
        limits: when to raise an alarm.
        canary_seconds: pause between two canaries; 0: none; None: see :class:`Canary`.

    Attributes:
        memory, layers, history, alarms, canary: what is known now.
        on_scrape: told when another process is asked for metrics.
        every, sampled_steps, sampling_seconds: of the sampling; steps of every engine, seconds of every rank.
    """

    def __init__(
        self,
        engine: Any,
        view: SchedulerView,
        model: str,
        profile: Profile | None,
        limits: Limits,
        canary_seconds: float | None,
    ) -> None:
        self.engine, self.view, self.model, self.profile, self.limits = engine, view, model, profile, limits
        self.canary = Canary(engine, len(view.engines), self.ask, canary_seconds, limits, profile)
        self.layers: list[LayerState] = []
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.alarms: list[Alarm] = []
        self.on_scrape: Callable[[], None] = lambda: None
        self.every = self.sampled_steps = 0
        self.failures: list[str] = []
        self.sampling_seconds = 0.0
        self.exact_counters: dict[str, int] = {}
        self._workers: list[list[WorkerMemory]] = []
        self._canary_layers: dict[int, LayerCheck] = {}
        self._lock = asyncio.Lock()

    async def ask(self, method: str, *args: Any) -> list[list[Any]]:
        """Call a method of the workers: answers of every rank of every engine."""
        call = asyncio.ensure_future(
            self.engine.engine_core.call_utility_all_async("collective_rpc", method, None, args, None)
        )
        while not call.done():
            # An engine that dies never answers, and vLLM does not tell the call.
            await asyncio.wait({call}, timeout=1.0)
            if self.engine.errored and not call.done():
                call.cancel()
                raise RuntimeError("the engine has failed")
        answers: list[list[Any]] = call.result()
        return answers

    @property
    def memory(self) -> MemoryReport:
        """What is resident, as the workers last said, and what of it is in use, as the schedulers last said."""
        engines = [
            EngineMemory(tuple(workers), *view.blocks, rank)
            for workers, (rank, view) in zip(self._workers, self.view.engines.items(), strict=True)
        ]
        return MemoryReport(self.engine.vllm_config.cache_config.block_size, tuple(engines))

    def held(self, num_tokens: int) -> dict[str, int]:
        """See :func:`vllm_spectral_server.usage.held`."""
        report = self.memory
        return held(num_tokens, report.block_size_tokens, report.bytes_per_token)

    @property
    def ready(self) -> tuple[bool, str]:
        """Whether answers are to be trusted, and why not."""
        if self.engine.stopping:
            return False, "the server is stopping"
        if self.engine.errored:
            return False, "the engine has failed"
        if self.canary.state in ("failed", "pending"):
            return False, f"canary: {self.canary.message}"
        silence = time.monotonic() - self.canary.answered
        if self.canary.state != "off" and silence > max(STALE_RUNS * self.canary.pause, STALE_SECONDS):
            if not self._full:
                return False, f"canary: not answered for {silence:.0f} s"
            return True, "the engine runs; canary: waits until one of as many requests as may run at once has ended"
        return True, f"the engine runs; canary: {self.canary.message}"

    @property
    def _full(self) -> bool:
        """Whether an engine is at work on as many requests as it may: then the canary, though first in the queue, waits."""
        most = self.engine.vllm_config.scheduler_config.max_num_seqs
        working = time.monotonic() - self.view.stepped < STALE_SECONDS
        return working and any(engine.running >= most for engine in self.view.engines.values())

    async def start(self) -> None:
        """What must be known before the first request."""
        if self.profile is None:
            self.canary.state, self.canary.message = "off", "the stock cache is served"
        elif self.canary.every_seconds == 0:
            self.canary.state, self.canary.message = "off", "switched off"
        elif not any(any(ranks) for ranks in await self.ask("spectral_fidelity")):
            self.canary.state, self.canary.message = "off", "every layer is exempt from compression"
        else:
            await self.canary.record()
            if self.canary.state == "pending":
                await self.canary.run(self._look)
            (logger.error if self.canary.state == "failed" else logger.info)("canary: %s", self.canary.message)
        await self.refresh()

    async def refresh(self) -> None:
        """Ask the workers now."""
        async with self._lock:
            answers: list[list[dict[str, Any]]] = await self.ask("spectral_state")
            self._workers = [[WorkerMemory.from_wire(rank["memory"]) for rank in ranks] for ranks in answers]
            if self.profile is not None:
                # The ranks of an engine have equal directories.
                totals = [ranks[0]["exact"] for ranks in answers]
                self.exact_counters = {name: sum(c[name] for c in totals) for name in totals[0]} if all(totals) else {}
                self._take_fidelity([[rank["fidelity"] for rank in ranks] for ranks in answers])

    def _take_fidelity(self, engines: list[list[dict[str, Any]]]) -> None:
        if not all(all(ranks) for ranks in engines):
            return  # every layer is exempt
        reports = [report for ranks in engines for report in ranks]
        self.every = reports[0]["every"]
        self.failures = sorted({report["failure"] for report in reports if report["failure"]})
        # The ranks of an engine sample the same steps.
        self.sampled_steps = sum(ranks[0]["sampled_steps"] for ranks in engines)
        self.sampling_seconds = sum(report["seconds"] for report in reports)
        self.layers = [
            LayerState.joined([[rank["layers"][index] for rank in ranks] for ranks in engines])
            for index in range(len(reports[0]["layers"]))
        ]
        probes = [probe for ranks in engines for probe in join_probes([rank["history"] for rank in ranks])]
        for entry in sorted(probes, key=lambda e: e["time"]):
            self.history.append(entry)
            if entry["canary"]:
                before = self._canary_layers.get(entry["layer"])
                self._canary_layers[entry["layer"]] = LayerCheck(
                    **{
                        name: worst((entry[name], getattr(before, name, None))) or 0.0
                        for name in ("error_ratio", "drift", "kernel_error")
                    }
                )
        self._judge()

    async def _look(self) -> dict[int, LayerCheck]:
        await self.refresh()
        found, self._canary_layers = self._canary_layers, {}
        return found

    def _judge(self) -> None:
        found = [*self._canary_alarms(), *self._live_alarms()]
        unique = {(alarm.kind, alarm.layer): alarm for alarm in reversed(found)}
        before = {(alarm.kind, alarm.layer) for alarm in self.alarms}
        for key in unique.keys() - before:
            logger.warning("%s", unique[key].message)
        self.alarms = [alarm for alarm in found if unique[alarm.kind, alarm.layer] is alarm]

    def _canary_alarms(self) -> Iterator[Alarm]:
        if self.canary.state != "failed":
            return
        bad = self.canary.failing
        first = max(bad, key=lambda layer: bad[layer].error_ratio, default=None)
        value, limit = self.canary.verdict.kl if self.canary.verdict else 0.0, self.limits.kl
        if value <= limit and first is not None:
            value, limit = bad[first].error_ratio, self.canary.limits_of(first).error_ratio
        yield Alarm(kind="canary", layer=first, value=value, limit=limit, message=self.canary.message)
        for layer, check in sorted(bad.items()):
            yield from _layer_alarms(
                layer, check.error_ratio, check.drift, check.kernel_error, "the canary's tokens",
                self.canary.limits_of(layer),
            )  # fmt: skip

    def _live_alarms(self) -> Iterator[Alarm]:
        for state in self.layers:
            enough = state.samples >= LEAST_PROBES
            yield from _layer_alarms(
                state.layer,
                state.error_ratio if enough else None,
                state.drift if state.moment_tokens >= LEAST_TOKENS else None,
                state.kernel_error if enough else None,
                "live traffic",
                self.limits,
            )
        for failure in self.failures:
            yield Alarm(kind="error", layer=None, value=1.0, limit=0.0, message=failure)

    async def live_moments(self) -> dict[str, torch.Tensor]:
        """Moments gathered from traffic: engines added up, ranks' heads joined; by ``layer.name``."""
        total: dict[str, torch.Tensor] = {}
        for ranks in await self.ask("spectral_live_moments"):
            # Where ranks outnumber heads, neighbours hold the same one.
            copies = max(len(ranks) // self.profile.fingerprint.num_kv_heads, 1) if self.profile else 1
            files = [await asyncio.to_thread(load, data) for data in ranks[::copies]]
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
        steps, asked = -1, 0.0
        while not self.engine.errored:
            await asyncio.sleep(POLL_SECONDS)
            if self.engine.stopping:
                return
            if self.view.steps == steps and time.monotonic() < asked + IDLE_SECONDS:
                continue
            steps, asked = self.view.steps, time.monotonic()
            try:
                await self.refresh()
            except Exception:
                logger.exception("the workers could not be asked")

    async def _sing(self) -> None:
        if self.canary.state == "off":
            return
        while not self.engine.errored:
            await asyncio.sleep(self.canary.pause)
            if self.engine.stopping:
                return
            before = self.canary.state
            try:
                await asyncio.wait_for(self.canary.run(self._look), max(STALE_RUNS * self.canary.pause, STALE_SECONDS))
            except Exception:
                logger.exception("the canary could not be run")
                continue
            if self.canary.state != before:
                (logger.error if self.canary.state == "failed" else logger.info)("canary: %s", self.canary.message)

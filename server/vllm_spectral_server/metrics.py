"""Our Prometheus metrics, in vLLM's registry, under the prefix ``vllm_spectral:``.

:data:`METRICS` is the one list: the exporter below and ``docs/metrics.md`` are both made from it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import REGISTRY, Counter, Gauge
from prometheus_client import Metric as PrometheusMetric
from prometheus_client.registry import Collector

from vllm_spectral.stats.memory import EngineMemory, MemoryReport, WorkerMemory
from vllm_spectral_server.monitor import LayerState, Monitor

PREFIX = "vllm_spectral:"
Values = Iterable[tuple[tuple[str, ...], float | None]]
Read = Callable[[Monitor, MemoryReport], Values]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without the prefix; counters end in ``_total``.
        kind: its type.
        labels: beside ``model_name``.
        help: what it says; units are in the name.
        read: label values and value of every series; None: nothing to say yet.
    """

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    read: Read
    labels: tuple[str, ...] = ()


def _memory(name: str) -> Read:
    return lambda _, memory: [((), getattr(memory, name))]


def _rank(read: Callable[[WorkerMemory], float]) -> Read:
    return lambda _, memory: [
        ((str(engine.rank), str(worker.rank)), read(worker)) for engine in memory.engines for worker in engine.workers
    ]


def _rank_pages(blocks: Callable[[EngineMemory], int]) -> Read:
    return lambda _, memory: [
        ((str(engine.rank), str(worker.rank)), blocks(engine) * memory.block_size_tokens * worker.bytes_per_token)
        for engine in memory.engines
        for worker in engine.workers
    ]


def _layer(read: Callable[[LayerState], float | None]) -> Read:
    return lambda monitor, _: [((str(state.layer),), read(state)) for state in monitor.layers]


def _figure(name: str) -> Read:
    return _layer(lambda state: state.figures.get(name))


def _exact(name: str) -> Read:
    return lambda monitor, _: [((), monitor.exact_counters.get(name))]


def _one(read: Callable[[Monitor], float | None]) -> Read:
    return lambda monitor, _: [((), read(monitor))]


def _info(monitor: Monitor, memory: MemoryReport) -> Values:
    profile = monitor.profile
    return [((profile.name, profile.digest, memory.kernels), 1.0)] if profile else []


def _alarms(monitor: Monitor, _: MemoryReport) -> Values:
    kinds = [alarm.kind for alarm in monitor.alarms]
    return [((kind,), kinds.count(kind)) for kind in ("canary", "error", "drift")]


_L = ("layer",)
_R = ("engine", "rank")
METRICS = (
    Metric("pool_bytes", "gauge", "All pages of the KV cache, measured from the allocated tensors.", _memory("pool_bytes")),
    Metric("used_bytes", "gauge", "Pages held by requests.", _memory("used_bytes")),
    Metric("cached_bytes", "gauge", "Pages held by no request that still serve prefix hits.", _memory("cached_bytes")),
    Metric("free_bytes", "gauge", "Pages that hold nothing; pool = used + cached + free.", _memory("free_bytes")),
    Metric("exact_tier_bytes", "gauge", "Pool of exact copies beside the pages.", _memory("exact_tier_bytes")),
    Metric("exact_tier_used_bytes", "gauge", "The part of it assigned to tokens.", _memory("exact_tier_used_bytes")),
    Metric("workspace_bytes", "gauge", "Scratch of the attention kernels.", _memory("workspace_bytes")),
    Metric(
        "profile_bytes", "gauge", "Bases, spectra and tables held resident, and the moments of live traffic.",
        _memory("profile_bytes"),
    ),
    Metric("resident_bytes", "gauge", "Pool, exact tier, workspace and profile.", _memory("resident_bytes")),
    Metric("capacity_tokens", "gauge", "Tokens that the pages hold.", _memory("capacity_tokens")),
    Metric("used_tokens", "gauge", "Token slots in pages held by requests.", _memory("used_tokens")),
    Metric(
        "uncompressed_capacity_tokens", "gauge", "Tokens that bf16 pages would hold in pool and exact tier.",
        _memory("uncompressed_capacity_tokens"),
    ),
    Metric("fp8_capacity_tokens", "gauge", "Tokens that fp8 pages would hold there.", _memory("fp8_capacity_tokens")),
    Metric("compression_ratio", "gauge", "bf16 bytes of a token over its page bytes.", _memory("compression_ratio")),
    Metric(
        "effective_compression_ratio", "gauge", "bf16 bytes of a full cache over resident_bytes.",
        _memory("effective_compression_ratio"),
    ),
    Metric("rank_pool_bytes", "gauge", "All pages on one rank.", _rank(lambda w: w.pool_bytes), _R),
    Metric(
        "rank_used_bytes", "gauge", "Its part of the pages held by requests.", _rank_pages(lambda e: e.used_blocks), _R
    ),
    Metric(
        "rank_cached_bytes", "gauge", "Its part of the pages that still serve prefix hits.",
        _rank_pages(lambda e: e.cached_blocks), _R,
    ),
    Metric("rank_exact_tier_bytes", "gauge", "Its exact copies.", _rank(lambda w: w.exact_tier_bytes), _R),
    Metric("rank_workspace_bytes", "gauge", "Its kernels' scratch.", _rank(lambda w: w.workspace_bytes), _R),
    Metric("rank_profile_bytes", "gauge", "Its part of the profile.", _rank(lambda w: w.profile_bytes), _R),
    Metric(
        "rank_resident_page_bytes", "gauge", "The part of its pages that the kernel holds in memory.",
        _rank(lambda w: w.resident_page_bytes), _R,
    ),
    Metric(
        "rank_process_bytes", "gauge", "Resident memory of its whole process, weights included.",
        _rank(lambda w: w.process_bytes), _R,
    ),
    Metric("exact_tokens_wanted_total", "counter", "Earlier tokens in steps' exact windows.", _exact("wanted")),
    Metric("exact_tokens_found_total", "counter", "Those of them that had an exact copy.", _exact("found")),
    Metric("exact_entries_evicted_total", "counter", "Groups of exact copies given to other tokens.", _exact("evicted")),
    Metric(
        "fidelity_sampled_steps_total", "counter", "Steps whose attention was sampled.", _one(lambda m: m.sampled_steps)
    ),
    Metric(
        "fidelity_sampling_seconds_total", "counter", "Time that sampling took, all ranks.",
        _one(lambda m: m.sampling_seconds),
    ),
    Metric(
        "layer_output_error_ratio", "gauge", "Norm of attention's error over the norm of its output, recent mean.",
        _figure("output_error"), _L,
    ),
    Metric(
        "layer_attention_kl_nats", "gauge", "KL divergence of the attention weights, recent mean.",
        _figure("attention_kl"), _L,
    ),
    Metric(
        "layer_error_ratio", "gauge", "Squared error of keys and values over what the profile predicts, recent mean.",
        _layer(lambda state: state.error_ratio), _L,
    ),
    Metric(
        "layer_kernel_error_ratio", "gauge", "Kernels' attention against the reference's over the same pages, recent mean.",
        _layer(lambda state: state.kernel_error), _L,
    ),
    Metric("layer_fallback_ratio", "gauge", "Share of vectors coded flat, recent mean.", _figure("fallback_share"), _L),
    Metric("layer_clipped_ratio", "gauge", "Share of clipped codes, recent mean.", _figure("clipped_share"), _L),
    Metric(
        "layer_drift_ratio", "gauge", "Share of energy that left the profile's leading channels.",
        _layer(lambda state: state.drift), _L,
    ),
    Metric("canary_runs_total", "counter", "Canaries run.", _one(lambda m: m.canary.runs)),
    Metric("canary_failures_total", "counter", "Canaries that failed.", _one(lambda m: m.canary.failures)),
    Metric(
        "canary_kl_nats", "gauge", "KL of the canary's predictions from the exact cache's, per token.",
        _one(lambda m: m.canary.verdict.kl if m.canary.verdict else None),
    ),
    Metric(
        "canary_top1_ratio", "gauge", "Share of the canary's positions with the same most likely token.",
        _one(lambda m: m.canary.verdict.top1 if m.canary.verdict else None),
    ),
    Metric("canary_last_run_timestamp_seconds", "gauge", "When it last ran.", _one(lambda m: m.canary.time)),
    Metric("ready", "gauge", "1 if GET /ready answers 200.", _one(lambda m: float(m.ready[0]))),
    Metric("alarms", "gauge", "Alarms now, by kind.", _alarms, ("kind",)),
    Metric("profile_info", "gauge", "1; the active profile and kernels in its labels.", _info, ("name", "digest", "kernels")),
)  # fmt: skip


class Exporter(Collector):
    """Keeps the metrics equal to what a monitor knows, at every scrape, here or elsewhere.

    Args:
        monitor: the monitor.
        model_name: the name the model is served under.
    """

    _instruments: dict[str, Any] = {}  # noqa: RUF012 - the registry is the process's, and so are these

    def __init__(self, monitor: Monitor, model_name: str) -> None:
        self._monitor, self._model_name = monitor, model_name
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._lock = threading.Lock()
        monitor.on_scrape = self.update
        # Registered before the instruments, hence asked before them. With several processes a scrape reads files of theirs
        # instead, and has to ask for an update first.
        REGISTRY.register(self)
        for metric in METRICS:
            if metric.name not in self._instruments:
                self._instruments[metric.name] = _instrument(metric)

    def describe(self) -> Iterable[PrometheusMetric]:
        """Nothing: the instruments speak for themselves."""
        return []

    def collect(self) -> Iterable[PrometheusMetric]:
        """No metrics of its own; a scrape begins here."""
        self.update()
        return []

    def update(self) -> None:
        """Bring all metrics up to date, to one moment's figures. Scrapes come in threads of their own."""
        memory = self._monitor.memory
        with self._lock:
            for metric in METRICS:
                self._set(metric, memory)

    def _set(self, metric: Metric, memory: MemoryReport) -> None:
        for labels, value in metric.read(self._monitor, memory):
            if value is None:
                continue
            series = self._instruments[metric.name].labels(self._model_name, *labels)
            if metric.kind == "gauge":
                series.set(value)
            else:
                key = (metric.name, labels)
                series.inc(max(value - self._counted.get(key, 0.0), 0.0))
                self._counted[key] = value


def _instrument(metric: Metric) -> Any:
    labels = ("model_name", *metric.labels)
    if metric.kind == "counter":
        return Counter(PREFIX + metric.name.removesuffix("_total"), metric.help, labels)
    # Where there are several processes, only the one that watches ever sets them: its word is the last and the only one.
    return Gauge(PREFIX + metric.name, metric.help, labels, multiprocess_mode="mostrecent")


def document() -> str:
    """``docs/metrics.md``'s table."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in ("model_name", *metric.labels))
        lines.append(f"| `{PREFIX}{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"

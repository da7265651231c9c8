"""The metrics' documentation is generated and stays so."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_spectral_server.metrics import METRICS, Metric, document

from vllm_spectral.stats.memory import EngineMemory, LayerMemory, MemoryReport, WorkerMemory

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
BASE_UNITS = ("_bytes", "_tokens", "_seconds", "_ratio", "_nats", "_total", "_info")


def test_the_documentation_is_generated() -> None:
    found = re.search(r"<!-- generated -->\n(.*)<!-- /generated -->", DOCS.read_text(), re.DOTALL)
    assert found
    assert found[1] == document()


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.name.endswith(BASE_UNITS) or metric.name in ("ready", "alarms")
    assert metric.help.endswith(".")


def test_ranks_add_up_to_the_totals() -> None:
    """Two engines of two tensor-parallel ranks, unequally full."""
    layers = tuple(LayerMemory(f"layer{i}", 48, 2, 64, 3.0, 3.0, True, 48 * 2 * 32 * 10, 7, 5, 11) for i in range(3))
    workers = tuple(WorkerMemory(layers, 10, 48 * 2 * 32 * 30, 13, rank=rank) for rank in range(2))
    memory = MemoryReport(32, (EngineMemory(workers, 4, 1, 0), EngineMemory(workers, 0, 9, 1)))
    monitor: Any = SimpleNamespace()
    by_rank = {
        metric.name: dict(metric.read(monitor, memory)) for metric in METRICS if metric.labels == ("engine", "rank")
    }
    for name in ("pool_bytes", "used_bytes", "cached_bytes", "exact_tier_bytes", "workspace_bytes", "profile_bytes"):
        series = by_rank[f"rank_{name}"]
        assert list(series) == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
        assert sum(value or 0 for value in series.values()) == getattr(memory, name)
    assert by_rank["rank_used_bytes"]["1", "0"] == 0 < (by_rank["rank_used_bytes"]["0", "0"] or 0)

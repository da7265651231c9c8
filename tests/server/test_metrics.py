"""The metrics' documentation is generated and stays so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from vllm_spectral_server.metrics import METRICS, Metric, document

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

"""What Prometheus and Grafana are given, read the way that tests need it: expressions, and the metrics they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

COMPOSE = Path(__file__).parent / "compose"
DASHBOARD = COMPOSE / "grafana" / "dashboards" / "vllm-spectral.json"
ALERTS = COMPOSE / "prometheus" / "alerts.yml"
_METRIC = re.compile(r"\b(?:vllm|vllm_spectral):\w+")
_MACROS = {"$__rate_interval": "1m", "$__range": "10m", "$model": ".*"}


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression of every query of the dashboard, Grafana's variables filled in as for all models."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for macro, value in _MACROS.items():
                expression = expression.replace(macro, value)
            yield panel["title"], expression


def alerts() -> Iterator[tuple[str, str]]:
    """Name and expression of every alert."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def metrics(expression: str) -> set[str]:
    """Names of the metrics in an expression."""
    return set(_METRIC.findall(expression))

"""What Prometheus and Grafana are given: names that exist, rules that fire when they should, files that belong together.

``make compose-test`` evaluates the same expressions on a live Prometheus.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from vllm_spectral_server.metrics import METRICS, PREFIX

from deploy.monitoring import ALERTS, COMPOSE, DASHBOARD, alerts, metrics, panels

QUERIES = [*panels(), *alerts()]
OURS = {PREFIX + metric.name for metric in METRICS}


def vllms() -> set[str]:
    """The names under which vLLM exports its metrics, read from its source: importing the loggers imports an engine."""
    spec = importlib.util.find_spec("vllm")
    assert spec and spec.origin
    names: set[str] = set()
    for file in (Path(spec.origin).parent / "v1" / "metrics").glob("*.py"):
        for name in re.findall(r'"(vllm:\w+)"', file.read_text()):
            names |= {name, f"{name}_total", f"{name}_bucket"}
    return names


@pytest.mark.parametrize(("title", "expression"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_every_metric_exists(title: str, expression: str) -> None:
    named = metrics(expression)
    assert named or 'up{job="vllm-spectral"}' in expression
    assert not named - OURS - vllms()
    assert not re.search(r"\$\w+", expression), "a variable of Grafana that the tests do not fill in"


def test_the_dashboard_has_no_overlaps_and_each_panel_says_what_it_is() -> None:
    shown = json.loads(DASHBOARD.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in shown:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"].endswith(".")
    assert len({panel["id"] for panel in shown}) == len(shown)


def test_grafana_finds_what_it_is_given() -> None:
    common = yaml.safe_load((COMPOSE / "common.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in common["grafana"]["volumes"])
    provider = yaml.safe_load((COMPOSE / "grafana/provisioning/dashboards/files.yaml").read_text())["providers"][0]
    assert COMPOSE / next(host for host, at in mounts.items() if at == provider["options"]["path"]) == DASHBOARD.parent
    assert Path(common["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).name == DASHBOARD.name
    source = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][
        0
    ]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt-get install prometheus")
@pytest.mark.parametrize("argv", ["check config prometheus.yml", "test rules alerts.test.yml"])
def test_promtool_agrees(argv: str) -> None:
    done = subprocess.run(["promtool", *argv.split()], cwd=ALERTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_both_ways() -> None:
    cases = yaml.safe_load((ALERTS.parent / "alerts.test.yml").read_text())["tests"]
    fired = {rule["alertname"] for case in cases for rule in case["alert_rule_test"] if rule["exp_alerts"]}
    silent = {rule["alertname"] for case in cases for rule in case["alert_rule_test"] if not rule["exp_alerts"]}
    assert fired == silent == {name for name, _ in alerts()}

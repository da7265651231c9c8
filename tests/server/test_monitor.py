"""What readiness depends on, and on what not."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from vllm_spectral_server.canary import Limits
from vllm_spectral_server.monitor import STALE_SECONDS, Monitor
from vllm_spectral_server.scheduler_view import SchedulerView


@pytest.fixture
def monitor() -> Monitor:
    """Of a server whose canary has just passed."""
    engine = SimpleNamespace(errored=False, stopping=False)
    monitor = Monitor(engine, SchedulerView(), "demo", None, Limits(), 60.0)
    monitor.canary.state, monitor.canary.message = "passed", "answers as the exact cache does"
    monitor.canary.time, monitor.canary.answered = time.time(), time.monotonic()
    return monitor


def test_a_clock_that_jumps_makes_nobody_unready(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time()
    for jump in (-86400.0, 86400.0, 1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: real + jump)
        assert monitor.ready[0]


def test_a_canary_that_falls_silent_does(monitor: Monitor) -> None:
    monitor.canary.answered -= 5 * 60 + STALE_SECONDS
    ready, reason = monitor.ready
    assert not ready and "not answered for" in reason


def test_a_stopping_server_is_not_ready(monitor: Monitor) -> None:
    monitor.engine.stopping = True
    assert monitor.ready == (False, "the server is stopping")

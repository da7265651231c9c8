"""What many ranks say, as one."""

from __future__ import annotations

import asyncio
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_spectral_server.monitor as monitoring
from vllm_spectral_server.canary import Limits
from vllm_spectral_server.monitor import LayerState, Monitor, join_probes
from vllm_spectral_server.scheduler_view import EngineView, SchedulerView

from vllm_spectral.stats.memory import WorkerMemory

FIGURES = {"output_error": 0.1, "attention_kl": 0.02, "fallback_share": 0.0, "clipped_share": 0.0}


def report(ratio: float, drift: float, kernel_error: float = 0.002, samples: int = 5) -> dict[str, Any]:
    means = FIGURES | {"error_ratio": ratio, "kernel_error": kernel_error}
    return {
        "layer": 3, "samples": samples, "time": 1.0 if samples else None, "means": means if samples else {},
        "key_drift": drift, "value_drift": drift / 2, "moment_tokens": 4096,
    }  # fmt: skip


def probe(layer: int, ratio: float, canary: bool = True, kernel_error: float = 0.002) -> dict[str, Any]:
    rest = {"error_ratio": ratio, "drift": 0.03 * ratio, "kernel_error": kernel_error}
    return FIGURES | {"time": float(layer), "layer": layer, "canary": canary} | rest


def test_heads_on_several_ranks_are_judged_like_heads_on_one() -> None:
    """The limits were chosen for means over a layer's heads; one head alone scatters past them."""
    heads = [(1.0, 0.02), (1.1, 0.03), (1.8, 0.09)]
    state = LayerState.joined([[report(*head) for head in heads]])
    assert state.error_ratio == pytest.approx(1.3)
    assert state.drift == pytest.approx(0.14 / 3)
    (joined,) = join_probes([[probe(0, ratio)] for ratio, _ in heads])
    assert joined["error_ratio"] == pytest.approx(1.3)
    assert joined["drift"] == pytest.approx(0.03 * 1.3)


def test_the_worst_engine_and_the_worst_kernel_count() -> None:
    sound, damaged = report(1.0, 0.02), report(3.0, 0.3)
    state = LayerState.joined([[sound, sound], [damaged, damaged]])
    assert (state.error_ratio, state.key_drift, state.samples) == (3.0, 0.3, 10)
    assert LayerState.joined([[sound, report(1.0, 0.02, kernel_error=0.5)]]).kernel_error == 0.5
    (joined,) = join_probes([[probe(0, 1.0)], [probe(0, 1.0, kernel_error=0.5)]])
    assert joined["kernel_error"] == 0.5


def test_what_is_no_number_on_one_rank_is_none_in_sum() -> None:
    assert math.isnan(LayerState.joined([[report(1.0, 0.02), report(math.nan, 0.02)]]).error_ratio or 0)
    (joined,) = join_probes([[probe(0, 1.0)], [probe(0, math.nan)]])
    assert math.isnan(joined["error_ratio"])


def test_an_engine_without_traffic_says_nothing() -> None:
    state = LayerState.joined([[report(1.2, 0.02)], [report(0.0, 0.0, samples=0)]])
    assert (state.error_ratio, state.figures["output_error"]) == (1.2, 0.1)
    assert LayerState.joined([[report(0.0, 0.0, samples=0)]]).error_ratio is None


def test_ranks_that_saw_different_steps_are_not_mixed() -> None:
    assert [p["error_ratio"] for p in join_probes([[probe(0, 1.0), probe(1, 1.0)], [probe(1, 3.0)]])] == [1.0, 1.0, 3.0]


class _Workers:
    """Stands for an engine whose workers keep nothing, and counts how often they are asked."""

    def __init__(self) -> None:
        self.engine_core, self.errored, self.stopping, self.asked = self, False, False, 0

    async def call_utility_all_async(self, *_: Any) -> list[list[dict[str, Any]]]:
        self.asked += 1
        memory = WorkerMemory((), 0, 0, 0, 0, 0, 0, "", 0).to_wire()
        return [[{"memory": memory, "fidelity": None, "exact": {}}]]


def test_workers_are_left_alone_while_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks an idle worker has it spin for a second: every other second, that was half a core for nothing."""
    monkeypatch.setattr(monitoring, "POLL_SECONDS", 0.01)
    workers, view = _Workers(), SchedulerView(engines={0: EngineView()})
    monitor = Monitor(workers, view, "demo", None, Limits(), 0)

    async def polls(steps: int) -> int:
        before = workers.asked
        for _ in range(20):
            view.steps += steps
            await asyncio.sleep(0.02)
        return workers.asked - before

    async def watch() -> tuple[int, int, int]:
        await monitor.start()
        async with monitor.running():
            return await polls(1), await polls(0), await polls(1)

    busy, idle, again = asyncio.run(watch())
    assert busy >= 5 and again >= 5
    assert idle <= 1, "once more after the last step, and then no more"


@pytest.mark.parametrize(("running", "stepped", "ready"), [(4, 0.0, True), (3, 0.0, False), (4, 600.0, False)])
def test_a_canary_that_finds_no_place_is_no_reason_to_distrust_answers(
    running: int, stepped: float, ready: bool
) -> None:
    """A few long answers may take all places for long; but not if nothing moves, or a place is free."""
    workers: Any = _Workers()
    workers.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    view = SchedulerView(engines={0: EngineView(running=running)}, stepped=time.monotonic() - stepped)
    monitor = Monitor(workers, view, "demo", None, Limits(), 60.0)
    monitor.canary.state, monitor.canary.answered = "passed", time.monotonic() - 3600
    assert monitor.ready[0] is ready, monitor.ready[1]

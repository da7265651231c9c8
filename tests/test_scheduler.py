"""The canary does not queue, and one front end hears of every step."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from vllm_spectral.backend.scheduler import CANARY_PREFIX, _Spectral


class Request:
    """As much of vLLM's as the queues look at."""

    def __init__(self, request_id: str, arrival: int) -> None:
        self.request_id, self.priority, self.arrival = request_id, 0, arrival

    def __lt__(self, other: Request) -> bool:
        return (self.priority, self.arrival) < (other.priority, other.arrival)


class Queue:
    """As much of vLLM's scheduler as it takes to queue."""

    def __init__(self, waiting: Any) -> None:
        self.waiting = waiting

    def add_request(self, request: Any) -> None:
        self.waiting.add_request(request)


class Scheduler(_Spectral, Queue):
    """Ours on top."""


@pytest.mark.parametrize("kind", [FCFSRequestQueue, PriorityRequestQueue])
def test_the_canary_goes_first(kind: type) -> None:
    scheduler = Scheduler(kind())
    names = ["a", "b", f"{CANARY_PREFIX}7-1f3a", "c"]
    for arrival, name in enumerate(names):
        scheduler.add_request(Request(name, arrival))  # type: ignore[arg-type]
    order = [scheduler.waiting.pop_request().request_id for _ in names]
    assert order == [names[2], "a", "b", "c"]


class Steps:
    """As much of vLLM's scheduler as gives a step's outputs: the statistics go to who comes first."""

    def update_from_output(self, clients: list[int]) -> dict[int, EngineCoreOutputs]:
        outputs = {client: EngineCoreOutputs(finished_requests={f"of {client}"}) for client in clients}
        next(iter(outputs.values())).scheduler_stats = SchedulerStats(num_running_reqs=7)
        return outputs


class Stepping(_Spectral, Steps):
    """Ours on top."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("clients", [[0], [1], [2, 0, 1], [0, 1], [1, 2]])
def test_the_watching_front_end_hears_of_every_step(clients: list[int]) -> None:
    """Once, and first; everybody's own part stays as it was."""
    outputs = Stepping().update_from_output(clients)
    assert next(iter(outputs)) == 0
    told = {client: output.scheduler_stats for client, output in outputs.items() if output.scheduler_stats}
    assert list(told) == [0] and told[0].num_running_reqs == 7
    assert {c: o.finished_requests for c, o in outputs.items() if o.finished_requests} == {
        client: {f"of {client}"} for client in clients
    }

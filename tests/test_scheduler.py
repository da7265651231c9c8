"""The canary does not queue."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import FCFSRequestQueue, PriorityRequestQueue

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

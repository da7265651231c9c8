"""What clients are told when there is no room, and when the server is stopping."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from vllm_spectral_server.overload import MOST_SECONDS, Overload


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    def complete(status: int = 200) -> Response:
        return Response("{}", status)

    @app.get("/health")
    def health() -> Response:
        return Response(status_code=503)

    app.state.spectral = SimpleNamespace(engine=SimpleNamespace(stopping=False))
    app.add_middleware(Overload)
    return app


def test_answers_pass_unchanged(app: FastAPI) -> None:
    client = TestClient(app)
    for status in (200, 400, 500):
        answer = client.post("/v1/completions", params={"status": status})
        assert answer.status_code == status and "retry-after" not in answer.headers


def test_a_full_queue_says_when_to_come_again(app: FastAPI) -> None:
    answer = TestClient(app).post("/v1/completions", params={"status": 503})
    assert answer.status_code == 503
    assert 1 <= int(answer.headers["retry-after"]) <= MOST_SECONDS


def test_a_stopping_server_takes_nothing_new_but_still_tells_its_state(app: FastAPI) -> None:
    app.state.spectral.engine.stopping = True
    client = TestClient(app)
    answer = client.post("/v1/completions")
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.headers["connection"] == "close", (
        "a client that keeps its connection would meet the same server again"
    )
    assert "stopping" in answer.json()["error"]["message"]
    assert client.get("/health").text == ""


def test_the_pause_follows_the_rate() -> None:
    overload = Overload(FastAPI())
    assert overload.retry_seconds() == MOST_SECONDS // 2, "nothing is known yet"
    now = time.monotonic()
    overload._in_flight = 100
    overload._ended.extend(now - 10 + index / 2 for index in range(20))
    assert overload.retry_seconds() in (25, 26), "half of 100, at two a second"
    overload._in_flight = 1
    assert overload.retry_seconds() == 1
    overload._in_flight = 10_000
    assert overload.retry_seconds() == MOST_SECONDS

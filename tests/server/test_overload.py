"""What clients are told when there is no room, and when the server is stopping."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from vllm_spectral_server.engine import CUT_SHORT
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

    @app.post("/breaks")
    def break_down() -> Response:
        raise RuntimeError("cannot schedule new futures after shutdown")

    @app.post("/late")
    def late() -> Response:
        engine = app.state.spectral.engine
        assert engine.working == 1
        engine.stopping = engine.over = True
        return Response("{}", 500)

    app.state.spectral = SimpleNamespace(engine=SimpleNamespace(stopping=False, over=False, working=0))
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


@pytest.mark.parametrize("path", ["/late", "/breaks"])
def test_what_fails_because_time_is_over_is_refused_like_the_rest(app: FastAPI, path: str) -> None:
    engine = app.state.spectral.engine
    engine.over = path == "/breaks"
    answer = TestClient(app).post(path)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["message"] == CUT_SHORT
    assert engine.working == 0


def test_what_fails_before_fails_as_ever(app: FastAPI) -> None:
    assert TestClient(app, raise_server_exceptions=False).post("/breaks").status_code == 500


def test_a_reader_that_takes_its_time_is_not_waited_for() -> None:
    engine = SimpleNamespace(stopping=False, over=False, working=0)
    app = SimpleNamespace(state=SimpleNamespace(spectral=SimpleNamespace(engine=engine)))
    working: list[int] = []

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        working.append(engine.working)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(_message: Any) -> None:
        working.append(engine.working)

    asyncio.run(Overload(answer)({"type": "http", "method": "POST", "app": app}, None, send))  # type: ignore[arg-type]
    assert working == [1, 0] and engine.working == 0


def test_only_the_last_half_minute_is_remembered(app: FastAPI) -> None:
    overload = Overload(app)
    overload._ended.extend([time.monotonic() - 60] * 1000)
    overload._note_end()
    assert len(overload._ended) == 1


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

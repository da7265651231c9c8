"""What a request held, for clients that ask; and nothing changed for those that do not."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm_spectral_server.usage import CacheUsage

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
ASKING = {"vllm_xargs": {"kv_cache_usage": 1}}
HELD = {"tokens": 14, "bytes": 1400}


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        if request.headers.get("authorization") == "wrong":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)  # unread
        try:
            asked = await request.json()
            assert isinstance(asked, dict) and not asked.get("bad")
        except (ValueError, AssertionError, RecursionError):
            return JSONResponse({"error": {"message": "bad"}}, status_code=400)
        if not asked.get("stream"):
            return {"choices": [{"text": "größe"}], "usage": USAGE, "echo": asked}

        async def chunks() -> Any:
            yield 'data: {"choices":[{"text":"a"}],"usage":null}\n\nda'
            yield 'ta: {"choices":[],"usage":' + json.dumps(USAGE) + "}\n"
            yield "\ndata: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    app.state.spectral = SimpleNamespace(held=lambda tokens: {"tokens": tokens, "bytes": tokens * 100})
    app.add_middleware(CacheUsage)
    return app


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(application())


def test_who_does_not_ask_sees_what_vllm_says(client: TestClient) -> None:
    answer = client.post("/v1/completions", json={"prompt": "kv_cache_usage"}).json()
    assert answer["usage"] == USAGE


def test_who_asks_is_told(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"prompt": "x"} | ASKING)
    answer = response.json()
    assert answer["usage"] == USAGE | {"kv_cache": HELD}
    assert answer["choices"][0]["text"] == "größe"
    assert answer["echo"] == {"prompt": "x"} | ASKING, "the request itself passes unchanged"
    assert int(response.headers["content-length"]) == len(response.content)


def test_a_stream_says_it_at_its_end(client: TestClient) -> None:
    text = client.post("/v1/completions", json={"stream": True} | ASKING).text
    first, last, done = text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {"choices": [{"text": "a"}], "usage": None}
    assert done == "data: [DONE]"
    usage = json.loads(last.removeprefix("data: "))["usage"]
    assert usage["kv_cache"] == {"tokens": 14, "bytes": 1400}


def test_errors_pass(client: TestClient) -> None:
    response = client.post("/v1/completions", json={"bad": True} | ASKING)
    assert (response.status_code, response.json()) == (400, {"error": {"message": "bad"}})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"kv_cache_usage",
        b'["kv_cache_usage"]',
        b'{"vllm_xargs": "kv_cache_usage"}',
        b'["kv_cache_usage",' + b"[" * 100_000,
    ],
)
def test_nonsense_is_left_to_vllm(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/completions", content=content)
    if content.startswith(b"{"):
        assert answer.json()["usage"] == USAGE
    else:
        assert (answer.status_code, answer.json()) == (400, {"error": {"message": "bad"}})


@pytest.mark.parametrize("several", [{"n": 2}, {"prompt": ["a", "b"]}, {"prompt": [[1, 2], [3]]}])
def test_several_sequences_are_not_summed_up(client: TestClient, several: dict[str, Any]) -> None:
    """They share the prompt's pages, or do not: no one figure is each one's."""
    assert client.post("/v1/completions", json=several | ASKING).json()["usage"] == USAGE
    assert "kv_cache" in client.post("/v1/completions", json={"prompt": [1, 2, 3]} | ASKING).json()["usage"]


def test_a_request_is_not_read_before_the_application_reads_it(client: TestClient) -> None:
    """Who has no key must not make the server hold what they send."""

    def endless() -> Iterator[bytes]:
        yield b"x" * 1000
        raise RuntimeError("read on")

    with contextlib.suppress(RuntimeError):
        answer = client.post("/v1/completions", content=endless(), headers={"authorization": "wrong"})
        assert answer.status_code == 401


def test_a_recorded_span_gets_the_figures_unasked() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    class Traced:
        """What an instrumentation puts around an application."""

        def __init__(self, app: Any) -> None:
            self._app = app

        async def __call__(self, *args: Any) -> None:
            with provider.get_tracer("test").start_as_current_span("request"):
                await self._app(*args)

    app = application()
    app.add_middleware(Traced)
    answer = TestClient(app).post("/v1/completions", json={"prompt": "x"}).json()
    assert answer["usage"] == USAGE
    (span,) = [span for span in exporter.get_finished_spans() if span.attributes]
    assert dict(span.attributes or {}) == {f"vllm_spectral.kv_cache.{name}": value for name, value in HELD.items()}

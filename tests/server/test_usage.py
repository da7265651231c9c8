"""What a request held, for clients that ask; and nothing changed for those that do not."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from vllm_spectral_server.usage import CacheUsage

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
ASKING = {"vllm_xargs": {"kv_cache_usage": 1}}
HELD = {"tokens": 14, "bytes": 1400}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        asked = await request.json()
        if asked.get("bad"):
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
    return TestClient(app)


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
    "content", [b"", b"kv_cache_usage", b'["kv_cache_usage"]', b'{"vllm_xargs": "kv_cache_usage"}']
)
def test_nonsense_is_left_to_vllm(client: TestClient, content: bytes) -> None:
    # The application's own complaint, as without us.
    with contextlib.suppress(ValueError, AttributeError):
        client.post("/v1/completions", content=content)

"""What strangers may ask for, how much and how slowly; and what they are told when something breaks."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.websockets import WebSocketDisconnect
from vllm_spectral_server import limits
from vllm_spectral_server.limits import Gate, PatientProtocol, RequestLimits, Rules, Stackless, hide_paths

from vllm_spectral.errors import ConfigError

SECRET = "what nobody else may read: /root/models/private"
KEY = {"authorization": "Bearer k3y"}


class Prompt(BaseModel):
    prompt: str


def application(rules: Rules, root_path: str = "") -> FastAPI:
    app = FastAPI(root_path=root_path)

    @app.post("/v1/completions")
    async def complete(prompt: Prompt) -> int:
        return len(prompt.prompt)

    @app.post("/v1/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.post("/v1/json")
    async def parsed(request: Request) -> bool:
        return bool(await request.json())

    @app.get("/v1/fails")
    @app.get("/ready")
    async def fails(request: Request) -> None:
        if request.url.path.endswith("fails"):
            raise KeyError(SECRET)

    @app.get("/v1/streams")
    async def streams() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "data: 1\n\n"
            raise RuntimeError(SECRET)

        return StreamingResponse(parts(), media_type="text/event-stream")

    @app.websocket("/v1/realtime")
    async def realtime(connection: WebSocket) -> None:
        await connection.accept()
        await connection.send_text("in")

    for path in ("/health", "/metrics", "/dashboard", "/dashboard/dashboard.js", "/invocations", "/new-in-vllm"):
        app.add_api_route(path, lambda: "here", methods=["GET", "POST"], include_in_schema=False)
    app.state.rules = rules
    app.add_middleware(Gate)
    return app


def client(
    *, protect_all: bool = False, key: str | None = "k3y", most: int = 1000, log_stacks: bool = False
) -> TestClient:
    rules = Rules.of(RequestLimits(most, protect_all), [key] if key else [], log_stacks)
    return TestClient(application(rules), raise_server_exceptions=True)


# Keys -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/dashboard", "/dashboard/dashboard.js", "/openapi.json"]
)
def test_probes_and_pages_are_read_without_a_key(path: str) -> None:
    assert client().get(path).status_code == 200
    protected = client(protect_all=True).get(path).status_code
    assert protected == (200 if path == "/health" else 401)
    assert client(protect_all=True).get(path, headers=KEY).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"), ("GET", "/v1/fails"), ("GET", "/v1"), ("POST", "/invocations"), ("GET", "/invocations"),
        ("GET", "/new-in-vllm"), ("POST", "/metrics"), ("POST", "/dashboard"), ("GET", "/nothing"),
        ("GET", "/dashboardx"), ("GET", "/%76%31/fails"), ("DELETE", "/ready"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer k3y ", "k3y", "Basic k3y", "Basic !!!", "Bearer \xff", "Bearer"]
)
def test_everything_else_needs_it(method: str, path: str, given: str | None) -> None:
    headers = {"authorization": given.encode("latin-1")} if given else {}
    response = client().request(method, path, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json() == {"error": "Unauthorized"}
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_key_is_a_bearer_token_or_a_password() -> None:
    basic = "Basic " + base64.b64encode(b"anybody:k3y").decode()
    for header in ("Bearer k3y", "bearer k3y", basic):
        assert client(protect_all=True).get("/metrics", headers={"authorization": header}).status_code == 200
    assert "Basic" in client(protect_all=True).get("/dashboard").headers["www-authenticate"]


def test_without_a_key_all_is_open_and_cannot_be_protected() -> None:
    assert client(key=None).post("/invocations").status_code == 200
    with pytest.raises(ConfigError, match="--api-key"):
        client(key=None, protect_all=True)


def test_a_prefix_opens_nothing() -> None:
    rules = Rules.of(RequestLimits(), ["k3y"], False)
    prefixed = TestClient(application(rules, "/llm"))
    assert prefixed.get("/llm/metrics").status_code == 200
    for path in ("/llm/invocations", "/llm/v1/fails", "/llm/llm/metrics", "/llmmetrics"):
        assert prefixed.get(path).status_code == 401


def test_a_websocket_needs_it_too() -> None:
    with pytest.raises(WebSocketDisconnect), client().websocket_connect("/v1/realtime"):
        pass
    with client().websocket_connect("/v1/realtime", headers=KEY) as connection:
        assert connection.receive_text() == "in"


# Bodies ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/raw", "/v1/completions"])
def test_a_body_is_bounded(path: str, chunked: bool) -> None:
    def answer(size: int) -> Any:
        body = b'{"prompt": "' + b"x" * (size - 14) + b'"}'
        parts = (body[i : i + 100] for i in range(0, size, 100))
        return client().post(
            path, content=parts if chunked else body, headers=KEY | {"content-type": "application/json"}
        )

    assert answer(1000).status_code == 200
    refused = answer(1001)
    assert refused.status_code == 413
    assert refused.json()["error"]["message"] == "the body is larger than 1000 bytes (--max-body-size)"
    assert refused.headers["connection"] == "close"


# What breaks ----------------------------------------------------------------------------------------------------------------


def test_a_failure_is_a_number_to_the_client_and_a_place_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    response = client().get("/v1/fails", headers=KEY)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == 500
    number = error["message"].split()[-1]
    assert number in caplog.text
    assert "KeyError in tests.server.test_limits" in caplog.text
    for text in (response.text, caplog.text):
        assert SECRET not in text and "Traceback" not in text and "/root" not in text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/json"])
def test_a_body_that_is_nested_too_deeply(path: str, caplog: pytest.LogCaptureFixture) -> None:
    headers = KEY | {"content-type": "application/json"}
    response = client(most=1 << 20).post(path, content=b"[" * 100_000, headers=headers)
    assert response.status_code == 400
    assert not caplog.text


def test_the_whole_stack_is_logged_to_who_asks(caplog: pytest.LogCaptureFixture) -> None:
    response = client(log_stacks=True).get("/v1/fails", headers=KEY)
    assert SECRET in caplog.text and "Traceback" in caplog.text
    assert SECRET not in response.text


def test_what_others_log_of_exceptions_is_cut_to_their_place() -> None:
    """vLLM logs the stacks of some errors that clients cause."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    other = logging.getLogger("vllm")
    other.addHandler(handler)
    try:
        Stackless.install()
        try:
            raise RuntimeError(SECRET)
        except RuntimeError:
            other.exception("Error in %s", "count_tokens")
        other.error("plain", stack_info=True)
    finally:
        other.removeHandler(handler)
    assert "Error in count_tokens (RuntimeError in tests.server.test_limits, line " in stream.getvalue()
    assert stream.getvalue().endswith("plain\n")
    assert SECRET not in stream.getvalue() and "Traceback" not in stream.getvalue()


def test_models_are_not_named_by_their_directories() -> None:
    class Models:
        async def show_available_models(self) -> Any:
            return SimpleNamespace(data=[SimpleNamespace(id="demo", root="/root/models/demo")])

    app = SimpleNamespace(state=SimpleNamespace(openai_serving_models=Models()))
    hide_paths(app)  # type: ignore[arg-type]
    with pytest.raises(StopIteration) as stop:
        app.state.openai_serving_models.show_available_models().send(None)
    assert stop.value.value.data[0].root == "demo"


# The wire -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A real server with little patience."""
    patch = pytest.MonkeyPatch()
    patch.setattr(limits, "HEADER_SECONDS", 0.5)
    patch.setattr(limits, "BODY_SECONDS", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
    config = uvicorn.Config(
        application(Rules.of(RequestLimits(1 << 20), [], False)), "127.0.0.1", number, http=PatientProtocol,
        h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES, log_level="critical",
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield number
    server.should_exit = True
    thread.join(10)
    patch.undo()


def converse(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send parts, and read what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while piece := connection.recv(1 << 16):
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
        return answer


def test_headers_have_to_arrive_in_time(port: int) -> None:
    start = time.monotonic()
    assert converse(port) == b""
    assert converse(port, b"GET /health HTTP/1.1\r\nHost: x\r\n", b"A: b\r\n", b"C: d\r\n", pause=0.3) == b""
    assert time.monotonic() - start < 5


def test_the_second_request_of_a_connection_has_no_more_time(port: int) -> None:
    start = time.monotonic()
    answer = converse(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /health HTTP/1.1\r\n", pause=0.2)
    assert answer.count(b"200 OK") == 1
    assert time.monotonic() - start < 4


def test_an_answer_may_take_longer_than_headers_may(port: int) -> None:
    request = b"POST /v1/raw HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"
    assert b"200 OK" in converse(port, request, b"1234", pause=0.3)


def test_a_body_has_to_arrive_in_time(port: int) -> None:
    request = b"POST /v1/raw HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n1"
    answer = converse(port, request)
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == 408


def test_headers_are_bounded(port: int) -> None:
    assert converse(port, b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 200_000).startswith(b"HTTP/1.1 400")
    for hostile in (
        b"GET /" + b"x" * (1 << 20),
        b"GET / HTTP/1.1\r\nA: " + b"x" * (1 << 20),
        b"\0" * 70_000,
        b"\x16\x03\x01\x02" * 9,
    ):
        assert b"200 OK" not in converse(port, hostile)
    assert b"200 OK" in converse(port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")


def test_a_body_that_breaks_the_rules(port: int, caplog: pytest.LogCaptureFixture) -> None:
    """The refusal has a body, which the answer to a HEAD may not have: h11 raised, and the event loop logged a stack."""
    for method in (b"HEAD", b"POST"):
        start = method + b" /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert b" 500 " not in converse(port, start + b"FFFFFFFFFFFFFFFFFFFFFF\r\nx")
        assert b" 500 " not in converse(port, start, b"nonsense\r\n", pause=0.1)
    assert "Traceback" not in caplog.text and "LocalProtocolError" not in caplog.text


def test_a_stream_that_breaks_ends_without_an_end(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "vllm.spectral"):
        answer = converse(port, b"GET /v1/streams HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"data: 1" in answer
    assert not answer.endswith(b"0\r\n\r\n"), "the client can tell that something is missing"
    assert SECRET.encode() not in answer
    assert "RuntimeError in tests.server.test_limits" in caplog.text


@pytest.mark.parametrize("protect_all", [True, False])
@pytest.mark.parametrize(
    ("headers", "admitted"),
    [
        ((), False),
        (((b"origin", b"https://a"),), False),
        (((b"origin", b"https://a"), (b"access-control-request-method", b"GET")), True),
    ],
)
def test_options_that_are_no_preflight_need_the_key(
    headers: tuple[tuple[bytes, bytes], ...], admitted: bool, protect_all: bool
) -> None:
    """A mounted application, as that of metrics is, may answer OPTIONS as it does GET."""
    rules = Rules.of(RequestLimits(protect_all=protect_all), ["k3y"], False)
    assert rules.admits({"method": "OPTIONS", "path": "/metrics", "headers": list(headers)}) is admitted

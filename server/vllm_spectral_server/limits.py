"""What the server takes from strangers: how much, how slowly, with which key; and what it tells them when something breaks.

vLLM asks for the API key under four prefixes alone. Other paths generate text as well (``/invocations``), or change the
server (``/scale_elastic_ep``), so that here a key that is set is asked for everywhere but where probes, scrapers and
browsers read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import logging
import secrets
import time
import traceback
from asyncio import TimerHandle, Transport
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h11
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vllm_spectral.errors import ConfigError

MIDDLEWARE = f"{__name__}.Gate"
ALWAYS_OPEN = frozenset({"/health", "/ping"})
"""They say that the process lives, and nothing else."""
OPEN_TO_READ = frozenset({
    "/ready", "/metrics", "/version", "/load", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/dashboard",
})  # fmt: skip
"""What probes, scrapers and browsers read without a key, unless ``--protect-all`` is given; of the page also its files."""
MAX_BODY_BYTES = 32 << 20
"""A prompt of a million tokens has some 5 MiB as text, and 8 MiB as token ids."""
BODY_SECONDS = 120.0
"""In which a request's body has to arrive."""
HEADER_SECONDS = 20.0
"""In which a request's headers have to arrive."""
MAX_HEADER_BYTES = 64 << 10
"""Of all headers of a request together, the request line included."""

logger = logging.getLogger("vllm.spectral")


@dataclass(frozen=True)
class RequestLimits:
    """What the user wants kept.

    Attributes:
        max_body_bytes: of a request's body.
        protect_all: ask for the key also where probes, scrapers and browsers read.
    """

    max_body_bytes: int = MAX_BODY_BYTES
    protect_all: bool = False


@dataclass(frozen=True)
class Rules:
    """The limits of a running server.

    Attributes:
        limits: what the user wants kept.
        keys: SHA-256 of the API keys; none: everybody may ask for everything.
        log_stacks: log stack traces, which may hold what clients sent.
    """

    limits: RequestLimits
    keys: tuple[bytes, ...] = ()
    log_stacks: bool = False

    @classmethod
    def of(cls, limits: RequestLimits, keys: Sequence[str], log_stacks: bool) -> Rules:
        """The rules for such keys.

        Raises:
            ConfigError: if everything is to be protected, and there is no key.
        """
        if limits.protect_all and not keys:
            raise ConfigError("--protect-all needs a key: give --api-key KEY, or set VLLM_API_KEY")
        return cls(limits, tuple(_digest(key) for key in keys), log_stacks)

    def admits(self, scope: Scope) -> bool:
        """Whether a request may pass: it needs no key, or has one."""
        headers = Headers(scope=scope)
        # A preflight carries no credentials, and nothing but CORS answers it.
        preflight = (
            scope.get("method") == "OPTIONS" and "access-control-request-method" in headers and "origin" in headers
        )
        if not self.keys or preflight or self._is_open(scope):
            return True
        given = _digest(_credentials(headers.get("authorization", "")))
        # All are compared, so that time says nothing.
        return sum(secrets.compare_digest(given, key) for key in self.keys) > 0

    def _is_open(self, scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in ALWAYS_OPEN:
            return True
        if self.limits.protect_all or scope.get("method") not in ("GET", "HEAD"):
            return False
        return path.rstrip("/") in OPEN_TO_READ or path.startswith("/dashboard/")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _credentials(header: str) -> str:
    """The key in an ``Authorization`` header: a bearer token, or the password of browsers and scrapers."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() == "bearer":
        return rest
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(rest, validate=True).decode().partition(":")[2]
    return ""


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in the shape of vLLM's own."""
    error: dict[str, Any] = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


class _Refused(Exception):  # noqa: N818 - it ends a request, and is no error of ours
    def __init__(self, answer: JSONResponse) -> None:
        super().__init__()
        self.answer = answer


class Gate:
    """Middleware, for vLLM's ``--middleware``, outside all others: the application's rules are found in its state.

    Args:
        app: what comes after.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        rules: Rules = scope["app"].state.rules
        if not rules.admits(scope):
            await self._ask_for_key(rules, scope, receive, send)
        elif scope["type"] == "websocket":
            await self._app(scope, receive, send)
        else:
            await self._pass(rules, scope, receive, send)

    async def _ask_for_key(self, rules: Rules, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: an answer of 403
            return
        # A browser asks its user for a password where it is told of that scheme, which would come between the page and its
        # own question for the key.
        schemes = 'Basic realm="vllm-spectral", charset="UTF-8"' if rules.limits.protect_all else "Bearer"
        headers = {"www-authenticate": schemes, "connection": "close"}
        await JSONResponse({"error": "Unauthorized"}, 401, headers)(scope, receive, send)

    async def _pass(self, rules: Rules, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def told(message: Message) -> None:
            nonlocal started
            if body.refused is not None and not started:
                # Whoever reads a body catches what it raises, and makes an answer of its own of it.
                raise _Refused(body.refused)
            started = started or message["type"] == "http.response.start"
            await send(message)

        body = _Body(rules.limits.max_body_bytes, receive)
        try:
            body.require_announced(Headers(scope=scope).get("content-length"))
            await self._app(scope, body, told)
            return
        except _Refused as refused:
            answer = refused.answer
        except (ClientDisconnect, h11.LocalProtocolError):
            return  # the client has left, or broke the rules of the body after its headers were right
        except RecursionError as error:
            # Python's JSON parser goes no deeper than a thousand.
            deep = _place(error).startswith("RecursionError in json.")
            answer = (
                refusal(400, "Bad Request", "the body is nested too deeply")
                if deep
                else _failure(error, rules.log_stacks)
            )
        except Exception as error:
            answer = body.refused or _failure(error, rules.log_stacks)
        if not started:
            await answer(scope, receive, send)
        # Otherwise the server sees an answer without an end, and breaks the connection off.


class _Body:
    """A request's body, counted and timed while it is read."""

    def __init__(self, most: int, receive: Receive) -> None:
        self._most, self._receive = most, receive
        self._read = 0
        self._complete = False
        self._deadline = time.monotonic() + BODY_SECONDS
        self.refused: JSONResponse | None = None

    def require_announced(self, length: str | None) -> None:
        """Refuse a body that says itself that it is too large, unread."""
        if length is not None and length.isdecimal() and int(length) > self._most:
            raise _Refused(self._too_large())

    async def __call__(self) -> Message:
        """As ASGI has it."""
        if self._complete:
            return await self._receive()  # it waits for the client to leave, as long as the answer takes
        try:
            message = await asyncio.wait_for(self._receive(), max(self._deadline - time.monotonic(), 0))
        except TimeoutError:
            self.refused = refusal(
                408, "Request Timeout", f"the body did not arrive within {BODY_SECONDS:g} s", {"connection": "close"}
            )
            raise _Refused(self.refused) from None
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._read > self._most:
                self.refused = self._too_large()
                raise _Refused(self.refused)
        return message

    def _too_large(self) -> JSONResponse:
        return refusal(
            413, "Request Entity Too Large", f"the body is larger than {self._most} bytes (--max-body-size)",
            {"connection": "close"},
        )  # fmt: skip


def _failure(error: Exception, log_stacks: bool) -> JSONResponse:
    """Log what broke, by place and kind: messages of exceptions may quote what clients sent. Clients are told a number."""
    number = secrets.token_hex(6)
    if log_stacks:
        logger.error("request %s failed", number, exc_info=error)
    else:
        logger.error("request %s failed: %s (--log-error-stack logs the whole)", number, _place(error))
    message = f"the server could not answer this request; its log says more about failure {number}"
    return refusal(500, "Internal Server Error", message)


def _place(error: BaseException) -> str:
    """The kind of an exception and where it was raised, without what it says."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return type(error).__name__
    frame, line = frames[-1]
    return f"{type(error).__name__} in {frame.f_globals.get('__name__', '?')}, line {line}"


class Stackless(logging.Filter):
    """Has log records name the place of an exception where they would have shown the stack."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Never drops a record."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            record.msg, record.args = f"{record.getMessage()} ({_place(error)})", ()
        record.exc_info = record.exc_text = record.stack_info = None
        return True

    @classmethod
    def install(cls) -> None:
        """On everything that logs in this process: what clients can bring about ends up in the log of vLLM or uvicorn."""
        for handler in {handler for name in ("", "vllm") for handler in logging.getLogger(name).handlers}:
            handler.addFilter(cls())
        # Its handlers are made anew when it starts.
        logging.getLogger("uvicorn.error").addFilter(cls())


def hide_paths(app: FastAPI) -> None:
    """Have ``/v1/models`` name models where vLLM names their directories on this machine."""
    models = app.state.openai_serving_models
    listed = models.show_available_models

    async def without_paths() -> Any:
        answer = await listed()
        for card in answer.data:
            card.root = card.id
        return answer

    models.show_available_models = without_paths


class PatientProtocol(H11Protocol):
    """HTTP whose headers have to arrive in time, and are bounded; the faster parser that uvicorn prefers knows neither."""

    _late: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """The clock starts with the connection."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stopped when the headers are complete; started again by the first byte of the next ones."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()
        elif self._late is None and not self.transport.is_closing():
            self._start_clock()

    def handle_events(self) -> None:
        """A body that breaks the rules when an answer has begun is refused once more by uvicorn, which h11 does not allow."""
        try:
            super().handle_events()
        except h11.LocalProtocolError:
            self.transport.close()

    def _start_clock(self) -> None:
        self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()

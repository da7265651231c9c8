"""What a request held in the cache, in its response's ``usage``, for clients that ask.

A client asks with ``"vllm_xargs": {"kv_cache_usage": 1}``, for one prompt and one answer; ``usage`` then has one more object,
``kv_cache``, in the response or in the stream's last chunk (with ``stream_options.include_usage``). Clients that do not ask
see vLLM's bytes untouched. Where an OpenTelemetry instrumentation of the application records a span of the HTTP request, the
span gets the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = ("/v1/chat/completions", "/v1/completions")
ASKED_BY = "kv_cache_usage"
Held = Callable[[int], dict[str, int]]
"""Tokens and bytes of pages that so many tokens hold."""
MIDDLEWARE = f"{__name__}.CacheUsage"


def held(num_tokens: int, block_size_tokens: int, bytes_per_token: int) -> dict[str, int]:
    """Tokens and page bytes of a request that holds so many tokens: whole blocks, shared prefixes included."""
    blocks = -(-num_tokens // block_size_tokens)
    return {"tokens": num_tokens, "bytes": blocks * block_size_tokens * bytes_per_token}


class CacheUsage:
    """Middleware, for vLLM's ``--middleware``: the application's monitor is found in its state.

    Args:
        app: what comes after.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        # A proxy's prefix comes first.
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        parts: list[bytes] = []

        async def read() -> Message:
            # Nothing is read that the application does not read: it may refuse a request unread.
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
            return message

        def wanted() -> bool:
            body = b"".join(parts)
            parts.clear()
            return _asks(body)

        held_by: Held = scope["app"].state.spectral.held
        await self._app(scope, read, _Editor(held_by, send, wanted, trace.get_current_span()))


class _Editor:
    """Passes a response on, with what is added to its usage."""

    def __init__(self, held: Held, send: Send, wanted: Callable[[], bool], span: trace.Span) -> None:
        self._held, self._send, self._wanted, self._span = held, send, wanted, span
        self._asked = self._active = self._stream = False
        self._start: Message | None = None
        self._rest = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            # The application has read the request by now, or will not.
            self._asked = self._wanted()
            self._active = self._asked or self._span.is_recording()
        if not self._active:
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._stream = b"".join(kinds).startswith(b"text/event-stream")
            if self._stream:
                await self._send(message)
            else:
                self._start = message  # its length is not known yet
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._rest += message.get("body", b"")
        more = message.get("more_body", False)
        if self._stream:
            # Events end with an empty line; one may arrive in pieces.
            *events, self._rest = self._rest.split(b"\n\n")
            body = b"".join(self._edit_event(event) + b"\n\n" for event in events)
            if not more:
                body, self._rest = body + self._rest, b""
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        elif not more:
            body = self._edit(self._rest)
            assert self._start is not None
            headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self._send({**self._start, "headers": headers})
            await self._send({"type": "http.response.body", "body": body})

    def _edit_event(self, event: bytes) -> bytes:
        if not event.startswith(b"data: {"):
            return event
        return b"data: " + self._edit(event.removeprefix(b"data: "))

    def _edit(self, body: bytes) -> bytes:
        try:
            answer = json.loads(body)
            usage = answer.get("usage")
            # The last token of an answer was never read back: it has no keys and values.
            tokens = usage["prompt_tokens"] + (usage["completion_tokens"] or 0) - 1
        except (ValueError, AttributeError, TypeError, KeyError):
            return body  # an error, or a chunk without usage
        pages = self._held(max(tokens, 0))
        self._span.set_attributes({f"vllm_spectral.kv_cache.{name}": value for name, value in pages.items()})
        if not self._asked:
            return body
        usage["kv_cache"] = pages
        return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()


def _asks(body: bytes) -> bool:
    """Whether a request asks, and for one sequence: several share pages, and no one figure is each one's."""
    if ASKED_BY.encode() not in body:
        return False
    try:
        request: Any = json.loads(body)
        extra = request.get("vllm_xargs")
    except (ValueError, AttributeError, RecursionError):
        return False  # vLLM will say what is wrong with it
    prompt = request.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not all(isinstance(part, int) for part in prompt)
    return isinstance(extra, dict) and bool(extra.get(ASKED_BY)) and request.get("n") in (None, 1) and not several

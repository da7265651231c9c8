"""What a client is told when there is no room for its request, or when the server is about to stop.

How many requests may be unfinished is vLLM's ``--max-num-queued-reqs``, and so is the 503 past that number. Added here are
``Retry-After``, which clients and routers obey, and the same answer while requests in flight are brought to their end.
"""

from __future__ import annotations

import math
import time
from collections import deque

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_spectral_server.engine import CUT_SHORT
from vllm_spectral_server.limits import refusal

MIDDLEWARE = f"{__name__}.Overload"
WINDOW_SECONDS = 30.0
MOST_SECONDS = 60
STOPPING = "The server is stopping and takes no new requests. Please try again later or on a different instance."


class Overload:
    """Middleware, for vLLM's ``--middleware``: the application's monitor is found in its state.

    Args:
        app: what comes after.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._in_flight = 0
        self._ended: deque[float] = deque()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        engine = scope["app"].state.spectral.engine
        if engine.stopping:
            await _refused(STOPPING)(scope, receive, send)
            return
        status = 0
        cut_short = False

        async def told(message: Message) -> None:
            nonlocal status, cut_short
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 503:
                    MutableHeaders(scope=message).setdefault("retry-after", str(self.retry_seconds()))
                # Whatever went wrong then went wrong because of it.
                cut_short = engine.over and status == 500
                if cut_short:
                    await _refused(CUT_SHORT)(scope, receive, send)
            if cut_short:
                return
            engine.working -= 1
            try:
                await send(message)
            finally:
                engine.working += 1

        engine.working += 1
        self._in_flight += 1
        try:
            await self._app(scope, receive, told)
        except Exception:
            if status or not engine.over:
                raise
            await _refused(CUT_SHORT)(scope, receive, send)
        finally:
            engine.working -= 1
            self._in_flight -= 1
            if status == 200:
                self._note_end()

    def _note_end(self) -> None:
        now = time.monotonic()
        self._ended.append(now)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._ended and self._ended[0] < now - WINDOW_SECONDS:
            self._ended.popleft()

    def retry_seconds(self) -> int:
        """In how many seconds about half of the requests in flight will have been answered, at the rate of late."""
        now = time.monotonic()
        self._forget(now)
        if not self._ended:
            return MOST_SECONDS // 2
        rate = len(self._ended) / max(now - self._ended[0], 1.0)
        return min(max(math.ceil(self._in_flight / 2 / rate), 1), MOST_SECONDS)


def _refused(why: str) -> JSONResponse:
    headers = {"retry-after": str(MOST_SECONDS // 2), "connection": "close"}
    return refusal(503, "Service Unavailable", why, headers)

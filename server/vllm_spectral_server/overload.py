"""What a client is told when there is no room for its request, or when the server is about to stop.

How many requests may be unfinished is vLLM's ``--max-num-queued-reqs``, and so is the 503 past that number. Added here are
``Retry-After``, which clients and routers obey, and the same answer while requests in flight are brought to their end.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
        if scope["app"].state.spectral.engine.stopping:
            await self._refuse(send)
            return
        served = False

        async def told(message: Message) -> None:
            nonlocal served
            if message["type"] == "http.response.start":
                served = message["status"] == 200
                if message["status"] == 503:
                    MutableHeaders(scope=message).setdefault("retry-after", str(self.retry_seconds()))
            await send(message)

        self._in_flight += 1
        try:
            await self._app(scope, receive, told)
        finally:
            self._in_flight -= 1
            if served:
                self._ended.append(time.monotonic())

    def retry_seconds(self) -> int:
        """In how many seconds about half of the requests in flight will have been answered, at the rate of late."""
        now = time.monotonic()
        while self._ended and self._ended[0] < now - WINDOW_SECONDS:
            self._ended.popleft()
        if not self._ended:
            return MOST_SECONDS // 2
        rate = len(self._ended) / max(now - self._ended[0], 1.0)
        return min(max(math.ceil(self._in_flight / 2 / rate), 1), MOST_SECONDS)

    async def _refuse(self, send: Send) -> None:
        # The shape of vLLM's own errors.
        error: dict[str, Any] = {"message": STOPPING, "type": "Service Unavailable", "param": None, "code": 503}
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(MOST_SECONDS // 2).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})

"""A server that answers the page and canned bodies behind a prefix, and that can be stopped and started again."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn
from fastapi import FastAPI, Request, Response
from vllm_spectral_server.routes import dashboard

from tests.server.bodies import Bodies

PREFIX = "/some/prefix"


class PretendedServer:
    """``with PretendedServer(bodies) as server``: runs in a thread on a port of its own, the same after a restart."""

    def __init__(self, bodies: Bodies) -> None:
        self.bodies = bodies
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.page = f"http://127.0.0.1:{self.port}{PREFIX}/dashboard"
        self._app = FastAPI()
        self._app.include_router(dashboard.router, prefix=PREFIX)
        self._app.add_api_route(PREFIX + "/{path:path}", self._answer, include_in_schema=False)

    def _answer(self, path: str, request: Request) -> Response:
        status, body = self.bodies.answer(path, request.headers.get("authorization"))
        return Response(body, status, media_type="application/json")

    def start(self) -> None:
        """Start, or start again."""
        config = uvicorn.Config(self._app, "127.0.0.1", self.port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the pretended server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop answering."""
        self._server.should_exit = True
        self._thread.join(20)

    def __enter__(self) -> PretendedServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

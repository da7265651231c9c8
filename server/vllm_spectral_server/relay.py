"""The figures of the one front end that watches, answered by all of a server's.

Where several processes serve HTTP (``--api-server-count``), the first runs the monitor: probes are drained by who asks for
them, and one canary is enough. It answers the others over a Unix domain socket in a folder that only this user may enter.
Keys are checked before, by the process that a client reached.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from aiohttp import ClientError, ClientSession, ClientTimeout, UnixConnector
from fastapi import FastAPI, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_spectral_server.limits import refusal
from vllm_spectral_server.monitor import Monitor
from vllm_spectral_server.routes import kv_cache, ready
from vllm_spectral_server.usage import held

MIDDLEWARE = f"{__name__}.Forward"
PARTS = (kv_cache, ready)
WATCHED = frozenset(route.path for part in PARTS for route in part.router.routes if isinstance(route, APIRoute))
"""Paths that the watching process answers."""
METRICS = "/metrics"
"""Answered by every process, from files that the watching one writes."""
UPDATE = "/update"
"""Where that one is asked to write them; on the socket alone."""
ANSWER_SECONDS = 60.0
RETRY_SECONDS = 0.2
SILENT = "The process of this server that watches the cache does not answer, and no other knows its state."


class SilentError(Exception):
    """The process that watches is gone, or does not answer."""


@asynccontextmanager
async def answering(monitor: Monitor, socket: Path) -> AsyncIterator[None]:
    """Answer the other processes until the end of the block.

    Args:
        monitor: what is known; started.
        socket: path of the socket; made here.
    """
    from vllm.entrypoints.launchers.launcher import NoSignalServer

    app = FastAPI(openapi_url=None)
    app.state.spectral = monitor
    for part in PARTS:
        app.include_router(part.router)

    @app.get(UPDATE, status_code=204)
    async def update() -> None:
        monitor.on_scrape()

    config = uvicorn.Config(app, uds=str(socket), lifespan="off", access_log=False, log_config=None)
    server = NoSignalServer(config)
    task = asyncio.create_task(server.serve())
    try:
        yield
    finally:
        server.should_exit = True
        await task


class Relay:
    """Stands where the monitor does, in a process that asks the one that has it.

    Args:
        engine: this process's way to the engines.
        session: connected to the socket.

    Attributes:
        engine: as given.
    """

    def __init__(self, engine: Any, session: ClientSession) -> None:
        self.engine, self._session = engine, session
        self._block_size_tokens = self._bytes_per_token = 0

    async def ask(self, path: str) -> Response:
        """What the watching process answers to a GET.

        Raises:
            SilentError: if it does not.
        """
        if self._session.closed:
            raise SilentError(SILENT)  # this process is about to end
        try:
            async with self._session.get(path) as answer:
                return Response(await answer.read(), answer.status, media_type=answer.headers.get("content-type"))
        except (ClientError, OSError, TimeoutError) as error:
            raise SilentError(SILENT) from error

    def held(self, num_tokens: int) -> dict[str, int]:
        """See :func:`vllm_spectral_server.usage.held`; needs nobody: what pages cost does not change."""
        return held(num_tokens, self._block_size_tokens, self._bytes_per_token)

    async def wait(self) -> None:
        """Until the watching process has recorded the canary: no request may be let in before.

        Raises:
            RuntimeError: if the engine fails first.
        """
        while True:
            try:
                report = json.loads(bytes((await self.ask("/v1/kv_cache/memory")).body))
                break
            except SilentError:
                if self.engine.errored:
                    raise RuntimeError("the engine has failed") from None
                await asyncio.sleep(RETRY_SECONDS)
        self._block_size_tokens, self._bytes_per_token = report["block_size_tokens"], report["bytes_per_token"]


@asynccontextmanager
async def relaying(engine: Any, socket: Path) -> AsyncIterator[Relay]:
    """A relay, connected and told what it must know before the first request.

    Raises:
        RuntimeError: if the engine fails first.
    """
    timeout = ClientTimeout(total=ANSWER_SECONDS)
    async with ClientSession("http://watcher", connector=UnixConnector(str(socket)), timeout=timeout) as session:
        relay = Relay(engine, session)
        await relay.wait()
        yield relay


class Forward:
    """Middleware, for vLLM's ``--middleware``: the relay is found in the application's state.

    Args:
        app: what comes after.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        scraped = path.rstrip("/") == METRICS
        if scope["type"] != "http" or scope["method"] != "GET" or not (scraped or path in WATCHED):
            await self._app(scope, receive, send)
            return
        relay: Relay = scope["app"].state.spectral
        answer: Response
        try:
            answer = await relay.ask(UPDATE if scraped else path)
        except SilentError as error:
            answer = refusal(503, "Service Unavailable", str(error))
        else:
            if scraped:
                await self._app(scope, receive, send)
                return
        await answer(scope, receive, send)

"""An engine ends with its server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

import pytest


def _engine(told: Connection) -> None:
    from vllm_spectral.backend.orphan import end_with_parent

    end_with_parent()
    told.send(os.getpid())
    time.sleep(60)


def _server(told: Connection, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    context.Process(target=_engine, args=(told,)).start()
    time.sleep(60)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_engine_ends_when_its_server_is_killed(method: str) -> None:
    """A server's engine is spawned by it, an evaluation's is forked by a third process."""
    context = multiprocessing.get_context("spawn")
    hear, told = context.Pipe(duplex=False)
    server = context.Process(target=_server, args=(told, method))
    server.start()
    assert hear.poll(60)
    engine = hear.recv()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server.join()
    told.close()
    deadline = time.monotonic() + 20
    # Whoever holds the other end of the pipe is alive.
    while time.monotonic() < deadline:
        try:
            if not hear.poll(0.2):
                continue
            hear.recv()
        except EOFError:
            return
    os.kill(engine, signal.SIGKILL)
    raise AssertionError("the engine outlived its server")

"""A server as a child process: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 300
STOP_SECONDS = 60
_LOG_TAIL = 8000


@dataclass(frozen=True)
class ServerProcess:
    """A running server.

    Attributes:
        url: its address.
        log: what it writes.
        process: the process, leader of a group of its own.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Any:
        """What it answers to a GET, from JSON; raises ``HTTPError`` if that is an error."""
        with urllib.request.urlopen(self.url + path) as response:
            return json.load(response)

    def descendants(self) -> list[psutil.Process]:
        """All processes below it."""
        return self.family()[1:]

    def family(self) -> list[psutil.Process]:
        """It and all processes below it."""
        leader = psutil.Process(self.process.pid)
        return [leader, *leader.children(recursive=True)]

    def resident_bytes(self) -> int:
        """Of it and all below; pages that several of them share are counted for each."""
        sizes = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(process.memory_info().rss)
        return sum(sizes)

    def signal(self, number: int) -> None:
        """Send a signal to it and all its workers."""
        os.killpg(self.process.pid, number)


def command(*argv: str) -> list[str]:
    """``vllm-spectral ...`` with this interpreter."""
    return [sys.executable, "-m", "vllm_spectral.cli.main", *argv]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def running(
    argv: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, port: int = 0
) -> Iterator[ServerProcess]:
    """Start a server on this machine, wait for ``/health``, and stop it at the end of the block.

    Args:
        argv: the command; ``--host`` and ``--port`` are added.
        log: where its output goes.
        environment: variables added to ours.
        port: where it listens; 0: a free one.

    Raises:
        RuntimeError: if it stops or is not healthy in time; the message holds the end of its log.
    """
    port = port or free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*argv, "--host", "127.0.0.1", "--port", str(port)],
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | (environment or {}),
        )  # fmt: skip
    server = ServerProcess(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.signal(signal.SIGKILL)
            raise


@contextlib.contextmanager
def asleep(servers: Collection[ServerProcess]) -> Iterator[None]:
    """Stop servers (SIGSTOP) until the end of the block, so that they can be measured in turn; see :func:`awake`."""
    for server in servers:
        server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            server.signal(signal.SIGCONT)


@contextlib.contextmanager
def awake(server: ServerProcess) -> Iterator[ServerProcess]:
    """Let one that is asleep run until the end of the block."""
    server.signal(signal.SIGCONT)
    try:
        yield server
    finally:
        server.signal(signal.SIGSTOP)


def _wait(server: ServerProcess) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        code = server.process.poll()
        if code is not None or time.monotonic() > deadline:
            end = server.log.read_text(errors="replace")[-_LOG_TAIL:]
            what = "was not ready in time" if code is None else f"stopped with code {code}"
            raise RuntimeError(f"the server {what}; the end of its log:\n{end}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if urllib.request.urlopen(f"{server.url}/health").status == 200:
                return
        time.sleep(0.5)

"""Asks a real server thousands of hostile requests. No crash, no hang, no growth, and nothing told that is nobody's business.

    python -m tests.fuzz.server --requests 10000 --seed 1

The server is the real one with the embedded model. Requests come from its own OpenAPI document by schemathesis, from sound
requests with something wrong in them, from bytes that are hardly HTTP, and from clients without a key, while others hold
connections without a word. Every answer, the log and the metrics are searched for paths of this machine, stack traces and
other clients' prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from requests.adapters import HTTPAdapter
from schemathesis.core.failures import Failure, FailureGroup

from deploy.process import ServerProcess, command, running
from tests.fuzz.hostile_http import (
    BATCH,
    GENERATING,
    MARK,
    TRAP,
    Ask,
    almost_sound,
    brief,
    junk,
    odd_body,
    tamed,
    without_key,
)
from vllm_spectral.models.demo import demo_model

KEY = {"Authorization": "Bearer secret"}
ASK_SECONDS = 60
THREADS = 4
IDLE = 100
"""Connections that say nothing, or only half of what they have to say."""
MOST_GROWTH = 400 << 20
"""What all processes of the server may take more at the end: caches fill, and compiled grammars are kept."""
OURS = ("/v1/kv_cache", "/ready", "/dashboard")
SKIPPED = {"/scale_elastic_ep"}
"""It changes the engine for whoever has the key, and is meant to."""
OPEN = ("/health", "/ping", "/ready", "/metrics", "/version", "/load", "/docs", "/redoc", "/openapi.json", "/dashboard")
TRACE = re.compile(r'Traceback \(most recent call last\)|File "[^"]+", line \d+')
SHARES = {"schema": 0.25, "almost": 0.4, "odd": 0.1, "junk": 0.25}


class Findings:
    """What was asked, what came back, and what should not have."""

    def __init__(self, private: tuple[str, ...]) -> None:
        self.private = private
        self.asked: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        """5xx of vLLM's own routes, by route; ours are escapes."""
        self.escapes: list[str] = []
        self.slowest = 0.0
        self._lock = threading.Lock()

    def escape(self, what: str) -> None:
        """Something that should not have happened."""
        with self._lock:
            self.escapes.append(what[:1500])

    def leaks(self, text: str, mark: str = "") -> Iterator[str]:
        """What a text tells that is nobody's business."""
        for path in self.private:
            if path in text:
                yield f"the path {path}"
        if found := TRACE.search(text):
            yield f"a stack trace: {found[0]}"
        if others := set(re.findall(MARK + r"\d+", text)) - {mark}:
            yield f"another prompt: {others.pop()}"

    def judge(self, ask: Ask, status: int, headers: Any, text: str, seconds: float) -> None:
        """Look at one answer."""
        where = f"{ask.method} {ask.path[:120]}"
        with self._lock:
            self.asked[ask.kind] += 1
            self.statuses[f"{status // 100}xx"] += 1
            self.slowest = max(self.slowest, seconds)
            if status >= 500 and not (status == 503 and "retry-after" in headers):
                self.failed[f"{status} {ask.method} {ask.path.split('?')[0][:60]}"] += 1
        for leak in self.leaks(text, ask.mark):
            self.escape(f"{where}: {status} tells {leak}; asked: {(ask.body or b'')[:300]!r}")
        if "access-control-allow-origin" in headers:
            self.escape(f"{where}: CORS is open")
        if status >= 500 and ask.path.startswith(OURS) and status != 503:
            self.escape(f"{where}: {status} {text[:300]}")
        if ask.kind == "no key" and status != 401 and not ask.path.startswith(OPEN):
            self.escape(f"{where}: {status} without a key, {ask.headers}")
        if (
            ask.kind == "no key"
            and status not in (401, 404, 405)
            and ask.method == "POST"
            and not ask.path.startswith("/ping")
        ):
            self.escape(f"{where}: {status} without a key, {ask.headers}")


class Fuzzer:
    """Asks one server.

    Args:
        server: running, with the key ``secret``.
        start: the seed.
        findings: where answers are judged.
        progress: told of every request.
    """

    def __init__(
        self, server: ServerProcess, start: int, findings: Findings, progress: Callable[[], None] = lambda: None
    ) -> None:
        self.server, self.findings, self._progress = server, findings, progress
        self.draw = random.Random(start)
        self.start = start
        self._local = threading.local()
        host, port = server.url.removeprefix("http://").split(":")
        self._address = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.trap = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        threading.Thread(target=self._watch_trap, daemon=True).start()

    def _watch_trap(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._listener.accept()[0] as visitor:
                    visitor.settimeout(2)
                    with contextlib.suppress(OSError):
                        self.findings.escape(f"the server fetches what a client names: {visitor.recv(300)!r}")

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.mount("http://", HTTPAdapter(max_retries=0))
        session: requests.Session = self._local.session
        return session

    def ask(self, ask: Ask, *, key: bool = True) -> None:
        """Ask, and judge the answer."""
        headers: dict[str, Any] = (KEY if key else {}) | {k: v.encode("latin-1") for k, v in ask.headers.items()}
        begin = time.monotonic()
        try:
            request = requests.Request(ask.method, self.server.url + "/", headers=headers, data=ask.body).prepare()
            request.url = self.server.url + ask.path  # as it stands
            response = self._session().send(request, timeout=ASK_SECONDS)
        except requests.Timeout:
            self.findings.escape(f"{ask.method} {ask.path[:120]} hangs; asked: {(ask.body or b'')[:300]!r}")
        except requests.ConnectionError as error:
            # A refused body may be cut off before the answer is read: the server is alive all the same.
            if not self._alive():
                self.findings.escape(
                    f"{ask.method} {ask.path[:120]}: the server is gone: {error}; asked: {(ask.body or b'')[:300]!r}"
                )
            self.findings.asked[ask.kind] += 1
        except (ValueError, requests.RequestException):
            self.findings.asked[ask.kind] += 1  # the client itself will not send it
        else:
            self.findings.judge(ask, response.status_code, response.headers, response.text, time.monotonic() - begin)
        self._progress()

    def _alive(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.server.url}/health", timeout=ASK_SECONDS).status_code == 200
        return False

    def by_schema(self, count: int) -> None:
        """What schemathesis makes of the server's document, to its letter and against it; answers of ours are validated."""
        document = requests.get(f"{self.server.url}/openapi.json", headers=KEY, timeout=ASK_SECONDS).json()
        operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
        wordy = [op for op in operations if op.body or op.path_parameters or op.query]
        for operation in operations:
            if operation.path in SKIPPED:
                continue
            most = max(count // (2 * len(wordy)), 1) if operation in wordy else 1
            # Nested messages take schemathesis a third of a second each.
            most = max(most // 8, 1) if operation.path == BATCH else most
            for mode in schemathesis.GenerationMode:
                if operation in wordy or mode is schemathesis.GenerationMode.POSITIVE:
                    self._operation(operation, mode, most)

    def _operation(self, operation: Any, mode: Any, most: int) -> None:
        @seeded(self.start)
        @settings(
            max_examples=most,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def asked(case: Any) -> None:
            case.body = tamed(case.body)
            if isinstance(case.body, dict):
                case.body = brief(operation.path, case.body)
                if operation.path in GENERATING and case.body.get("model") is not None:
                    case.body["model"] = "demo"
            begin = time.monotonic()
            body = str(case.body).encode("utf-8", "replace")
            ask = Ask(case.method, operation.path, body, kind=f"schema, {mode.value}")
            try:
                response = case.call(base_url=self.server.url, headers=KEY, timeout=ASK_SECONDS)
            except requests.Timeout:
                self.findings.escape(f"{operation.label} hangs; asked: {body[:300]!r}")
                return
            except (requests.RequestException, ValueError, UnicodeError):
                self.findings.asked[ask.kind] += 1
                return
            finally:
                self._progress()
            headers = {name.lower(): value for name, value in response.headers.items()}
            self.findings.judge(
                ask,
                response.status_code,
                headers,
                response.content.decode("utf-8", "replace"),
                time.monotonic() - begin,
            )
            if operation.path.startswith(OURS):
                try:
                    case.validate_response(response)
                except (FailureGroup, Failure) as error:
                    self.findings.escape(f"{operation.label} does not answer as its schema says: {error}")

        with contextlib.suppress(Exception):  # there may be nothing to generate: no parameters to get wrong
            asked()

    def many(self, make: Callable[[random.Random], Ask], count: int) -> None:
        """Requests from several clients at once."""
        asks = [make(self.draw) for _ in range(count)]
        for ask in asks:
            if ask.body:
                ask.body = ask.body.replace(TRAP.encode(), self.trap.encode())
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self.ask, asks))

    def keyless(self) -> int:
        """Every route without a key; how many requests."""
        document = requests.get(f"{self.server.url}/openapi.json", timeout=ASK_SECONDS).json()
        more = {"/docs": {"get": {}}, "/dashboard": {"get": {}}, "/v2/x": {"get": {}}, "/inference/v1/generate": {"post": {}},
                "/inference/v1/abort_requests": {"post": {}}, "/v1/chat/completions/render": {"post": {}}}  # fmt: skip
        asks = list(without_key(document["paths"] | more))
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda ask: self.ask(ask, key=False), asks))
        return len(asks)

    def junk(self, count: int) -> None:
        """Bytes that are hardly HTTP."""
        pieces = [junk(self.draw) for _ in range(count)]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(self._write, pieces))

    def _write(self, content: bytes) -> None:
        answer = b""
        try:
            with socket.create_connection(self._address, timeout=ASK_SECONDS) as connection:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.sendall(content)
                    connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while piece := connection.recv(1 << 16):
                        answer += piece
        except TimeoutError:
            self.findings.escape(f"a connection hangs after {content[:200]!r}")
        except OSError as error:
            self.findings.escape(f"no connection: {error}; wanted to write {content[:200]!r}")
        self.findings.asked["junk"] += 1
        for status in re.findall(rb"^HTTP/1\.1 (\d)\d\d", answer, re.MULTILINE):
            self.findings.statuses[f"{status.decode()}xx"] += 1
        if re.match(rb"HTTP/1\.1 5", answer):
            self.findings.escape(f"{answer[:200]!r} after {content[:300]!r}")
        for leak in self.findings.leaks(answer.decode("utf-8", "replace")):
            self.findings.escape(f"the answer to {content[:200]!r} tells {leak}")
        if b"access-control-allow-origin" in answer.lower():
            self.findings.escape(f"CORS is open to {content[:200]!r}")
        self._progress()

    @contextlib.contextmanager
    def idlers(self, count: int) -> Iterator[None]:
        """Clients that hold connections; at the end the server must have hung up on every one."""
        held = []
        for index in range(count):
            connection = socket.create_connection(self._address, timeout=ASK_SECONDS)
            connection.sendall((b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"POST /v1/comple")[index % 3])
            held.append(connection)
        yield
        for connection in held:
            with contextlib.closing(connection):
                try:
                    connection.recv(1)
                except ConnectionResetError:
                    pass
                except TimeoutError:
                    self.findings.escape("a connection that never said what it wants is held for ever")


def _resident_bytes(group: int) -> int:
    """Resident memory of a process group."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
    return total


def _check_the_end(fuzzer: Fuzzer, log: str, before: int) -> int:
    """What has to hold when all is asked; how much memory grew."""
    findings, url = fuzzer.findings, fuzzer.server.url
    body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    answer = requests.post(f"{url}/v1/completions", headers=KEY, json=body, timeout=ASK_SECONDS)
    if answer.status_code != 200 or "Paris" not in answer.text:
        findings.escape(f"it does not answer as before: {answer.status_code} {answer.text[:300]}")
    deadline = time.monotonic() + 30
    while True:
        memory = requests.get(f"{url}/v1/kv_cache/memory", headers=KEY, timeout=ASK_SECONDS).json()
        traffic = requests.get(f"{url}/v1/kv_cache/traffic", headers=KEY, timeout=ASK_SECONDS).json()
        if not (memory["used_bytes"] or traffic["running"] or traffic["waiting"]):
            break
        if time.monotonic() > deadline:
            findings.escape(f"requests are left over: {memory['used_bytes']} bytes, {traffic}")
            break
        time.sleep(0.5)
    ready = requests.get(f"{url}/ready", timeout=ASK_SECONDS)
    if ready.status_code != 200:
        findings.escape(f"it is no longer ready: {ready.text[:300]}")
    for what, text in (("the log", log), ("/metrics", requests.get(f"{url}/metrics", timeout=ASK_SECONDS).text)):
        for leak in findings.leaks(text):
            findings.escape(f"{what} tells {leak}")
    grown = _resident_bytes(fuzzer.server.process.pid) - before
    if grown > MOST_GROWTH:
        findings.escape(f"memory grew by {grown >> 20} MiB")
    return grown


def fuzz(
    server: ServerProcess, count: int, start: int, progress: Callable[[], None] = lambda: None, *, idle: bool = True
) -> tuple[Findings, int]:
    """Ask a server ``count`` requests or a few more.

    Args:
        server: running, with the key ``secret``.
        count: how many.
        start: the seed.
        progress: told of every request.
        idle: hold connections meanwhile, and wait at the end until the server has hung up.

    Returns:
        What was found, and by how much the server's memory grew, in bytes.
    """
    findings = Findings(
        private=(str(demo_model(progress=False)), str(Path(__file__).parents[2]), sys.prefix, str(Path.home()) + "/")
    )
    fuzzer = Fuzzer(server, start, findings, progress)
    # Warm: what is loaded once is not growth.
    fuzzer.many(almost_sound, 40)
    before = _resident_bytes(server.process.pid)
    seen = server.log.stat().st_size
    with fuzzer.idlers(IDLE if idle else 0):
        left = count - fuzzer.keyless() if count > 2000 else count
        fuzzer.by_schema(int(left * SHARES["schema"]))
        fuzzer.junk(int(left * SHARES["junk"]))
        fuzzer.many(odd_body, int(left * SHARES["odd"]))
        fuzzer.many(almost_sound, max(count - findings.asked.total(), int(left * SHARES["almost"])))
    log = server.log.read_bytes()[seen:].decode("utf-8", "replace")
    return findings, _check_the_end(fuzzer, log, before)


def serve_command(profile: Path) -> list[str]:
    """The server that is asked: small, so that hostile requests can fill it."""
    return command(
        "serve", "demo", "--profile", str(profile), "--api-key", "secret", "--max-model-len", "512", "--max-body-size", "1M",
        "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "16",
    )  # fmt: skip


def main() -> int:
    """Run, show progress, say in one line what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run; by default a new one")
    parser.add_argument("--profile", type=Path, required=True, help="of the embedded model; `make fuzz` makes one")
    parser.add_argument(
        "--log", type=Path, default=Path("build/fuzz/server.log"), help="the server's log (%(default)s)"
    )
    arguments = parser.parse_args()
    start = secrets.randbits(32) if arguments.seed is None else arguments.seed
    # Whoever ends this process ends the server. Hypothesis takes other exceptions for a failing example.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    print(f"fuzzing the server, seed {start}: it starts, which takes half a minute", file=sys.stderr)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        running(serve_command(arguments.profile), arguments.log) as server,
        Progress(*columns, console=Console(stderr=True)) as bar,
    ):
        task = bar.add_task("", total=arguments.requests)
        findings, grown = fuzz(server, arguments.requests, start, lambda: bar.advance(task))
    kinds = ", ".join(f"{count} {name}" for name, count in findings.asked.most_common())
    statuses = ", ".join(f"{count} {name}" for name, count in sorted(findings.statuses.items()))
    verdict = "nothing escaped" if not findings.escapes else f"{len(findings.escapes)} ESCAPED"
    failed = f"; of vLLM's own routes {sum(findings.failed.values())} answers of 5xx" if findings.failed else ""
    print(
        f"fuzz server: {findings.asked.total()} requests, seed {start}: {verdict}; {kinds}; answers: {statuses}{failed}; "
        f"slowest {findings.slowest:.1f} s, memory grew by {grown / 2**20:.0f} MiB"
    )
    for name, number in findings.failed.most_common():
        print(f"  5xx: {number} x {name}", file=sys.stderr)
    for escape in dict.fromkeys(findings.escapes):
        print(f"  escaped: {escape}", file=sys.stderr)
    return bool(findings.escapes)


if __name__ == "__main__":
    sys.exit(main())

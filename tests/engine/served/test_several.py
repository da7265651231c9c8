"""The real server with several processes that serve HTTP: one watches, and whichever a client meets says the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import Server, serving

STEADY = ("pool_bytes", "used_bytes", "cached_bytes", "free_bytes", "capacity_tokens", "profile_bytes")
START_SECONDS, SETTLE_SECONDS = 30, 10
BUSY_TOKENS, LONG_TOKENS = 200, 400
KEPT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
"""A connection may rest for more than vLLM's five seconds where two engines share a core."""


class FrontEnd:
    """One kept connection, hence one of the processes.

    Attributes:
        pid, name: of the process that answers.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection = HTTPConnection(urlsplit(server.url).netloc, timeout=120)
        assert self.get("/health", key=False)[0] == 200
        port = self._connection.sock.getsockname()[1]
        (self.pid,) = [c.pid for c in psutil.net_connections("tcp4") if c.raddr and c.raddr.port == port]
        names = {int(pid): name for name, pid in re.findall(r"\((ApiServer_\d) pid=(\d+)\)", server.log.read_text())}
        self.name = names[self.pid]

    def _ask(self, method: str, path: str, body: Any = None, key: bool = True) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {self._server.key}"
        self._connection.request(method, path, json.dumps(body) if body else None, headers)
        response = self._connection.getresponse()
        data = response.read()
        is_json = "json" in response.headers.get("content-type", "")
        return response.status, json.loads(data) if is_json else data.decode(errors="replace")

    def get(self, path: str, key: bool = True) -> tuple[int, Any]:
        """Status and body."""
        return self._ask("GET", path, key=key)

    def ask(self, prompt: str, tokens: int) -> tuple[int, Any]:
        """Status and body of a greedy completion of so many tokens."""
        body = {
            "model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "vllm_xargs": {"kv_cache_usage": 1},
        }  # fmt: skip
        return self._ask("POST", "/v1/completions", body)

    def complete(self, prompt: str, tokens: int = 16) -> Any:
        """A greedy answer of so many tokens, with its usage."""
        status, answer = self.ask(prompt, tokens)
        assert status == 200, answer
        return answer

    def memory(self) -> dict[str, Any]:
        """The report."""
        status, report = self.get("/v1/kv_cache/memory")
        assert status == 200
        return {name: report[name] for name in STEADY}

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every series of ``/metrics``; none of them twice."""
        found = [
            ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
            for family in text_string_to_metric_families(self.get("/metrics")[1])
            for sample in family.samples
        ]
        twice = [series for series, count in Counter(series for series, _ in found).items() if count > 1]
        assert not twice
        return dict(found)


def front_ends(server: Server) -> list[FrontEnd]:
    """A connection to each, the watching one first. A new connection goes where there are fewest."""
    found: dict[str, FrontEnd] = {}
    deadline = time.monotonic() + START_SECONDS
    while len(found) < 2:
        assert time.monotonic() < deadline, "one of the processes never answers"
        front_end = FrontEnd(server)
        found.setdefault(front_end.name, front_end)
    assert sorted(found) == ["ApiServer_0", "ApiServer_1"]
    return [found[name] for name in sorted(found)]


def agreed(ends: list[FrontEnd]) -> dict[str, Any]:
    """The report, the same from both, of an idle server."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        first, second = (end.memory() for end in ends)
        if first == second and not first["used_bytes"]:
            return first
        assert time.monotonic() < deadline, (first, second)
        time.sleep(0.1)


def ours(samples: dict[Any, float]) -> dict[Any, float]:
    """Our series, but those that change with every look."""
    moving = ("process_bytes", "resident_page_bytes", "seconds_total")
    return {s: v for s, v in samples.items() if s[0].startswith("vllm_spectral:") and not s[0].endswith(moving)}


def check_load(ends: list[FrontEnd]) -> None:
    """Requests through both; every token is counted once, every page is given back, and both say so."""
    before = [end.get("/v1/kv_cache/traffic")[1] for end in ends]
    most: list[float] = [0, 0]
    with ThreadPoolExecutor(8) as pool:
        prompts = [f"{index}. The capital of France is" for index in range(8)]
        extra = [FrontEnd(ends[0]._server) for _ in prompts]
        assert len({end.pid for end in extra}) == 2
        running = [pool.submit(end.complete, prompt, BUSY_TOKENS) for end, prompt in zip(extra, prompts, strict=True)]
        while not all(future.done() for future in running):
            most = [max(value, end.memory()["used_bytes"]) for value, end in zip(most, ends, strict=True)]
        answers = [future.result() for future in running]
    assert min(most) > 0, "both saw the load while it was there"
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    report = agreed(ends)
    assert report["pool_bytes"] == report["cached_bytes"] + report["free_bytes"] and report["cached_bytes"] > 0
    for end, was in zip(ends, before, strict=True):
        now = end.get("/v1/kv_cache/traffic")[1]
        assert now["generated_tokens"] - was["generated_tokens"] == generated == 8 * BUSY_TOKENS
        assert (now["running"], now["waiting"]) == (0, 0)
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(ends[1].complete, "Nobody asks the watching process to generate", BUSY_TOKENS)
        most = [0]
        while not alone.done():
            most.append(ends[0].memory()["used_bytes"])
        alone.result()
    assert max(most) > 0, "the watching process hears of what others serve"
    held = {json.dumps(end.complete(prompts[0])["usage"]["kv_cache"]) for end in ends}
    assert len(held) == 1 and json.loads(held.pop())["bytes"] > 0
    agreed(ends)


def check_metrics(ends: list[FrontEnd]) -> None:
    """Ours are the same from both, each series once, and what the report says; vLLM's counters are whole."""
    report = agreed(ends)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        first, second = (end.samples() for end in ends)
        if ours(first) == ours(second):
            break
        # The workers may have been asked in between.
        assert time.monotonic() < deadline
    values = {name: value for (name, labels), value in ours(first).items() if len(labels) == 1}
    for name in ("pool_bytes", "used_bytes", "cached_bytes", "free_bytes", "capacity_tokens"):
        assert values[f"vllm_spectral:{name}"] == report[name]
    assert values["vllm_spectral:ready"] == values["vllm_spectral:canary_runs_total"] == 1
    traffic = ends[1].get("/v1/kv_cache/traffic")[1]
    for samples in (first, second):
        tokens = sum(value for (name, _), value in samples.items() if name == "vllm:generation_tokens_total")
        assert tokens == traffic["generated_tokens"]


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: those of sockets are bounded."""
    folder = Path(tempfile.mkdtemp(prefix="vs-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_two_processes_say_the_same_and_finish_what_they_have(calibrated: Path, work: Path, sockets: Path) -> None:
    with serving(
        calibrated, work / "several.log", "--api-server-count", "2", "--canary-seconds", "600",
        environment=KEPT | {"VLLM_RPC_BASE_PATH": str(sockets)},
    ) as server:  # fmt: skip
        ends = front_ends(server)
        (folder,) = sockets.glob("vllm-spectral-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for end in ends:
            assert end.get("/v1/kv_cache/memory", key=False)[0] == 401
            status, ready = end.get("/ready", key=False)
            assert (status, ready["canary"]["state"], ready["canary"]["runs"]) == (200, "passed", 1)
            assert end.get("/v1/kv_cache/profile")[1]["digest"]
        check_load(ends)
        check_metrics(ends)
        assert server.log.read_text().count("canary: answers as the exact cache does") == 1, "one canary, not two"

        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(end.complete, "Once upon a time", LONG_TOKENS) for end in ends]
            watching = FrontEnd(server)
            while watching.get("/v1/kv_cache/traffic")[1]["running"] < 2:
                assert not any(future.done() for future in running)
            server.process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in running]
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [LONG_TOKENS] * 2
        assert server.process.wait(60) == 0
    assert not list(sockets.glob("vllm-spectral-*")), "nothing is left behind"


@pytest.mark.slow
def test_two_processes_in_front_of_two_engines_end_when_the_watching_one_is_killed(
    calibrated: Path, work: Path, sockets: Path
) -> None:
    environment = KEPT | {"VLLM_RPC_BASE_PATH": str(sockets), "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with serving(
        calibrated, work / "several-dp.log", "--api-server-count", "2", "--data-parallel-size", "2",
        "--canary-seconds", "600", environment=environment,
    ) as server:  # fmt: skip
        ends = front_ends(server)
        check_load(ends)
        check_metrics(ends)
        series = {labels for name, labels in ends[1].samples() if name == "vllm_spectral:rank_pool_bytes"}
        assert {dict(labels)["engine"] for labels in series} == {"0", "1"}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ends[1].complete, "Once upon a time", LONG_TOKENS)
            # On a busy core this process may rest for longer than the request takes; then it has nothing to lose.
            while not (ends[0].get("/v1/kv_cache/traffic")[1]["running"] or running.done()):
                pass
            os.kill(ends[0].pid, signal.SIGKILL)
            assert running.result()["usage"]["completion_tokens"] == LONG_TOKENS, "it lost nothing but its neighbour"
        assert server.process.wait(60) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(ends[1].pid, 0)
    assert "ApiServer_0" in server.log.read_text().split("died with exit code")[0].splitlines()[-1]


@pytest.mark.slow
def test_when_the_engine_is_killed_clients_of_all_processes_are_told(
    calibrated: Path, work: Path, sockets: Path
) -> None:
    with serving(
        calibrated, work / "several-dead.log", "--api-server-count", "2", "--canary-seconds", "600",
        environment=KEPT | {"VLLM_RPC_BASE_PATH": str(sockets)},
    ) as server:  # fmt: skip
        ends = front_ends(server)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(end.ask, "Once upon a time", 4 * LONG_TOKENS) for end in ends]
            watching = FrontEnd(server)
            while watching.get("/v1/kv_cache/traffic")[1]["running"] < 2:
                assert not any(future.done() for future in running)
            killed = time.monotonic()
            (core,) = [
                process
                for process in psutil.Process(server.process.pid).children(recursive=True)
                if "EngineCore" in "".join(process.cmdline())
            ]
            core.kill()
            answers = [future.result() for future in running]
        assert [status for status, _ in answers] == [503] * 2, answers
        assert time.monotonic() - killed < SETTLE_SECONDS
        assert server.process.wait(60) != 0

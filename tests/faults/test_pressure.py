"""Too much at once, and clients that behave badly."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from deploy.process import ServerProcess
from tests.faults.conftest import ANSWER_TOKENS, Account, Serving
from tests.faults.traffic import CLIENT, Load, ask, company, prompts, wait_until

QUEUE = 32
OVERLOAD = 10 * QUEUE


def body(server: ServerProcess, name: str) -> Any:
    return httpx.get(f"{server.url}/v1/kv_cache/{name}", timeout=30).json()


def used(server: ServerProcess) -> int:
    """Bytes of pages that requests hold."""
    count: int = body(server, "memory")["used_bytes"]
    return count


def test_clients_that_hang_up_free_their_pages(serve: Serving, account: Account, texts: list[str]) -> None:
    with serve() as server:
        wait_until(lambda: used(server) == 0, 30, "nothing is held at rest")
        with company(server.url, 24):
            wait_until(lambda: body(server, "traffic")["running"] >= 20, 60, "the streams run")
            held = used(server)
        start = time.monotonic()
        wait_until(lambda: used(server) == 0, 20, "the pages are free")
        seconds = time.monotonic() - start
        assert held > 0
        with company(server.url):
            answers = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
    account.add("24 streaming clients hang up", f"{held} bytes of pages freed", [answers], seconds)


def test_a_slow_reader_holds_up_nobody(serve: Serving, account: Account, texts: list[str]) -> None:
    """A client that asks for a stream and never reads it."""
    with serve() as server, company(server.url):
        host, port = server.url.removeprefix("http://").split(":")
        lazy = []
        for _ in range(4):
            connection = socket.create_connection((host, int(port)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            request = '{"model":"demo","prompt":"Once","max_tokens":1500,"ignore_eos":true,"stream":true}'
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n{request}".encode())
            lazy.append(connection)
        answers = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
        for connection in lazy:
            connection.close()
    assert all(outcome.status == 200 for outcome in answers)
    slowest = max(outcome.seconds for outcome in answers)
    account.add("4 streams that nobody reads", f"others answered, the slowest in {slowest:.1f} s", [answers])


def test_a_pool_that_is_too_small_preempts_and_loses_nothing(
    serve: Serving, account: Account, texts: list[str]
) -> None:
    # Six blocks' worth of tokens per request do not fit for all of 24 requests: they must take turns.
    with serve("--kv-cache-memory-bytes", "16M", "--no-enable-prefix-caching", "--watermark", "0") as server:
        capacity = body(server, "memory")["capacity_tokens"]
        with company(server.url, 2):
            outcomes = Load(server.url, texts, ANSWER_TOKENS).outcomes()
            extra = Load(server.url, prompts(12, (3000,)), 2 * ANSWER_TOKENS).outcomes()
        preempted = body(server, "traffic")["preemptions"]
        wait_until(lambda: used(server) == 0, 20, "all pages are free in the end")
    assert preempted > 0, f"{capacity} tokens were enough: the test shows nothing"
    assert not [outcome for outcome in (*outcomes, *extra) if outcome.status != 200]
    account.add("pool exhaustion", f"{preempted} preemptions, every request answered", [outcomes])


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long the overload lasts."""
    given: float = request.config.getoption("--overload-seconds")
    return given


def test_overload(serve: Serving, account: Account, texts: list[str], seconds: float) -> None:
    """Ten times as many clients as there are places, each asking again at once when it is refused."""
    flags = ("--max-num-queued-reqs", str(QUEUE), "--max-num-seqs", "16")
    with serve(*flags) as server:
        with company(server.url):
            alone = [ask(server.url, text, ANSWER_TOKENS).seconds for text in texts[:4]]
        end, found, lock = time.monotonic() + seconds, Counter[str](), threading.Lock()
        waits: list[int] = []
        ready: list[tuple[int, float]] = []

        def insist(index: int) -> None:
            while time.monotonic() < end:
                outcome = ask(server.url, texts[index % len(texts)], ANSWER_TOKENS)
                with lock:
                    found[str(outcome.status or outcome.error)] += 1
                    if outcome.status == 503:
                        waits.append(int(outcome.retry_after or -1))
                # A tenth of what it is told: clients that obey would be no overload.
                time.sleep(0.1 * max(waits[-1] if waits else 1, 1))

        def look() -> None:
            """As a probe does, beside what is measured: its answer may take a while."""
            while time.monotonic() < end:
                begin = time.monotonic()
                status = CLIENT.get(f"{server.url}/ready").status_code
                ready.append((status, time.monotonic() - begin))
                time.sleep(min(5.0, seconds / 10))

        clients = [threading.Thread(target=insist, args=(index,)) for index in range(OVERLOAD)]
        clients.append(threading.Thread(target=look))
        for client in clients:
            client.start()
        sizes = []
        while time.monotonic() < end:
            time.sleep(min(5.0, seconds / 10))
            sizes.append(server.resident_bytes())
        for client in clients:
            client.join()
        start = time.monotonic()
        with company(server.url):
            wait_until(lambda: ask(server.url, texts[0], ANSWER_TOKENS).seconds < 1.5 * max(alone), 30, "full speed")
            recovery = time.monotonic() - start
            answers = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
    assert set(found) == {"200", "503"}, found
    assert min(waits) >= 1, "every refusal says when to come again"
    assert {status for status, _ in ready} == {200}, "a full queue is no reason to take a server out of service"
    half = len(sizes) // 2
    growth = max(sizes[half:]) / max(sizes[:half])
    assert growth < 1.05, sizes
    account.add(
        f"{OVERLOAD} clients for {QUEUE} places, {seconds:.0f} s",
        f"{found['200']} x 200, {found['503']} x 503 with Retry-After {min(waits)} to {max(waits)} s, "
        f"/ready within {max(took for _, took in ready):.1f} s, memory x {growth:.3f}", [answers], recovery,
    )  # fmt: skip

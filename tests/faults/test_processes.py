"""Processes that die, and one that is told to stop."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from deploy.process import ServerProcess, command, free_port
from tests.faults.conftest import ANSWER_TOKENS, FLAGS, Account, Serving, named
from tests.faults.traffic import SECONDS, Load, Outcome, company, status, wait_until

HANG_SECONDS = 30.0
"""In which every client must have been told that its request is lost."""
PATIENCE = 600
PATIENT = ("--shutdown-timeout", str(PATIENCE))
"""However slow the machine: the time is not what is looked at."""


def summary(outcomes: list[Outcome]) -> str:
    """What the clients saw, counted."""
    kinds = Counter(str(outcome.status or outcome.error) for outcome in outcomes)
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def again(
    serve: Serving, port: int, texts: list[str], *flags: str, **options: dict[str, str]
) -> tuple[float, list[Outcome]]:
    """Restart on the same port, as a supervisor does, and ask again; seconds to readiness, and the answers."""
    start = time.monotonic()
    with serve(*flags, port=port, **options) as server:
        wait_until(lambda: status(f"{server.url}/ready") == 200, 60, "ready again")
        seconds = time.monotonic() - start
        with company(server.url):
            return seconds, Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()


def running_requests(server: ServerProcess) -> int:
    """Requests in the batch, as the server says."""
    count: int = httpx.get(f"{server.url}/v1/kv_cache/traffic").json()["running"]
    return count


def busy(load: Load) -> None:
    """Wait until some requests are answered and most are in flight."""
    total = load.in_flight
    wait_until(lambda: load.in_flight < total, 120, "a first answer")
    assert load.in_flight > total // 4, "the load must not be over before the fault"


def check_kill(
    title: str,
    serve: Serving,
    account: Account,
    texts: list[str],
    *flags: str,
    clients: int = 8,
    **options: dict[str, str],
) -> None:
    """``kill -9`` under load: everyone is told, the server stops with an error, and a restarted one answers as before."""
    port = free_port()
    with serve(*flags, port=port, **options) as server, company(server.url):
        family = server.family()
        load = Load(server.url, texts, ANSWER_TOKENS, clients)
        busy(load)
        named(server, title).kill()
        killed = time.monotonic()
        outcomes = load.outcomes()
        told = time.monotonic() - killed
        code = server.process.wait(HANG_SECONDS)
    assert told < HANG_SECONDS
    assert code not in (0, -signal.SIGKILL), "a supervisor that restarts on failure must see one"
    lost = [outcome for outcome in outcomes if outcome.status != 200]
    assert lost and all(outcome.status in (0, 500, 503) for outcome in lost)
    psutil.wait_procs(family, 20)
    assert not [process for process in family if process.is_running()], "no process is left behind"
    seconds, answers = again(serve, port, texts, *flags, **options)
    assert all(outcome.status == 200 for outcome in answers)
    account.add(f"kill -9 of the {title}", f"{summary(outcomes)} within {told:.1f} s", [outcomes, answers], seconds)


def test_kill_of_the_engine_core(serve: Serving, account: Account, texts: list[str]) -> None:
    check_kill("EngineCore", serve, account, texts)


def test_kill_of_a_worker(serve: Serving, texts: list[str]) -> None:
    """One of three tensor-parallel ranks."""
    flags, environment = ("--tensor-parallel-size", "3"), {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0"}
    texts = texts[:12]
    # Ranks add their shares in another order than one rank does: the undisturbed answers are these ranks' own.
    with serve(*flags, environment=environment) as server, company(server.url):
        undisturbed = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
    account = Account([outcome.text for outcome in undisturbed])
    # Requests that began together end together, and three ranks on two cores leave their clients little time to notice.
    check_kill("Worker", serve, account, texts, *flags, clients=4, environment=environment)


def test_kill_of_the_server(serve: Serving, account: Account, texts: list[str]) -> None:
    """``kill -9`` of the process that clients talk to: the engine does not outlive it."""
    port = free_port()
    with serve(port=port) as server, company(server.url):
        engine = server.descendants()
        load = Load(server.url, texts, ANSWER_TOKENS, 8)
        busy(load)
        server.process.send_signal(signal.SIGKILL)
        outcomes = load.outcomes()
        assert engine
        alone = psutil.wait_procs(engine, 30)[1]
        assert not alone, "an engine without a server holds memory for nobody"
    seconds, answers = again(serve, port, texts)
    account.add("kill -9 of the API server", summary(outcomes), [outcomes, answers], seconds)


def test_sigterm_finishes_what_is_in_flight(serve: Serving, account: Account, texts: list[str]) -> None:
    with serve(*PATIENT) as server:
        others = Load(server.url, ["Once upon a time", "In the beginning"], 5 * ANSWER_TOKENS)
        load = Load(server.url, texts[:8], ANSWER_TOKENS)
        wait_until(lambda: running_requests(server) == 10, 30, "all requests run")
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        wait_until(lambda: status(f"{server.url}/ready") == 503, 5, "not ready while stopping")
        late = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": "x"}, timeout=10)
        assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
        outcomes = load.outcomes()
        assert server.process.wait(PATIENCE) == 0
        seconds = time.monotonic() - start
    finished = [*outcomes, *others.outcomes()]
    assert [outcome.status for outcome in finished] == [200] * 10, "nothing that was in flight is lost"
    padded = [*outcomes, *(Outcome(None, 0, 0.0) for _ in texts[8:])]
    account.add("SIGTERM", f"10 in flight all answered, a new one 503; stopped after {seconds:.1f} s", [padded])


def test_sigterm_waits_for_what_no_engine_knows_of(serve: Serving, account: Account, texts: list[str]) -> None:
    """A request that many steps serve, one after the other, and one whose prompt is still on its way."""
    with serve(*PATIENT) as server:
        beams = {
            "model": "demo",
            "prompt": texts[0],
            "max_tokens": 48,
            "use_beam_search": True,
            "n": 2,
            "temperature": 0,
        }
        late = json.dumps({"model": "demo", "prompt": texts[1], "max_tokens": 8}).encode()
        with (
            ThreadPoolExecutor(1) as pool,
            socket.create_connection(("127.0.0.1", urlsplit(server.url).port)) as upload,
        ):
            searching = pool.submit(httpx.post, f"{server.url}/v1/completions", json=beams, timeout=SECONDS)
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
            upload.sendall(f"{head}Content-Length: {len(late)}\r\n\r\n".encode() + late[:20])
            # No step is so long that somebody who asks would find it running.
            wait_until(lambda: server.get("/v1/kv_cache/traffic")["generated_tokens"] > 4, 60, "the search runs")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(f"{server.url}/ready") == 503, 5, "not ready while stopping")
            assert not searching.done()
            upload.sendall(late[20:])
            answer = upload.makefile("rb").read()
            found = searching.result()
        assert server.process.wait(PATIENCE) == 0
    assert answer.startswith(b"HTTP/1.1 200 ") and b'"completion_tokens":8' in answer, answer
    assert found.status_code == 200, found.text
    assert [choice["finish_reason"] for choice in found.json()["choices"]] == ["length"] * 2, found.text
    account.add("SIGTERM", "a beam search and half a body in flight, both answered", [])


def test_sigterm_while_it_starts(profile: Path, tmp_path: Path) -> None:
    """The engine, which loads the model in a process of its own, does not outlive it, and nobody waits for a minute."""
    argv = command("serve", "demo", "--profile", str(profile), *FLAGS, "--port", str(free_port()))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
    leader = psutil.Process(process.pid)
    wait_until(
        lambda: any("EngineCore" in "".join(c.cmdline()) for c in leader.children()), 120, "an engine is started"
    )
    family = leader.children(recursive=True)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(family, 20)[1], "no process is left behind"


def test_sigterm_leaves_nobody_waiting(serve: Serving, account: Account, texts: list[str]) -> None:
    """Requests that take longer than ``--shutdown-timeout``, and a stream whose client does not read: all is over in time."""
    with serve("--shutdown-timeout", "3") as server:
        asked = {"model": "demo", "prompt": texts[2], "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=60):
            load = Load(server.url, texts[:2], 1900)
            wait_until(lambda: running_requests(server) == 3, 30, "all requests run")
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            outcomes = load.outcomes()
            assert server.process.wait(30) == 0
            seconds = time.monotonic() - start
    assert [outcome.status for outcome in outcomes] == [503, 503] and all(o.retry_after for o in outcomes), outcomes
    account.add("SIGTERM, no time", f"{summary(outcomes)} with Retry-After; stopped after {seconds:.1f} s", [])

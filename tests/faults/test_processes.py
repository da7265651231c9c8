"""Processes that die, and one that is told to stop."""

from __future__ import annotations

import signal
import time
from collections import Counter

import httpx
import psutil

from deploy.process import ServerProcess, free_port
from tests.faults.conftest import ANSWER_TOKENS, Account, Serving, named
from tests.faults.traffic import Load, Outcome, company, status, wait_until

HANG_SECONDS = 30.0
"""In which every client must have been told that its request is lost."""


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
    with serve() as server:
        others = Load(server.url, ["Once upon a time", "In the beginning"], 5 * ANSWER_TOKENS)
        load = Load(server.url, texts[:8], ANSWER_TOKENS)
        wait_until(lambda: running_requests(server) == 10, 30, "all requests run")
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        wait_until(lambda: status(f"{server.url}/ready") == 503, 5, "not ready while stopping")
        late = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": "x"}, timeout=10)
        assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
        outcomes = load.outcomes()
        assert server.process.wait(60) == 0
        seconds = time.monotonic() - start
    finished = [*outcomes, *others.outcomes()]
    assert [outcome.status for outcome in finished] == [200] * 10, "nothing that was in flight is lost"
    padded = [*outcomes, *(Outcome(None, 0, 0.0) for _ in texts[8:])]
    account.add("SIGTERM", f"10 in flight all answered, a new one 503; stopped after {seconds:.1f} s", [padded])


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

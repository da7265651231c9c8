"""Requests in flight, and what became of each."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from benchmarks.texts import prose

SECONDS = 900.0
"""After so long without an answer a request counts as hung; on a slow machine with other work, 240 were too few."""
CLIENT = httpx.Client(timeout=SECONDS, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))
"""A connection for every request, but one TLS context: to make one for each kept 320 clients busy with themselves."""


@dataclass(frozen=True)
class Outcome:
    """What a client saw.

    Attributes:
        text: of a complete answer, else None.
        status: HTTP status; 0: the connection broke.
        seconds: from the request to the end.
        retry_after: what the header said.
        error: what went wrong, in short.
    """

    text: str | None
    status: int
    seconds: float
    retry_after: str | None = None
    error: str = ""


def prompts(count: int, characters: Sequence[int] = (300, 800, 1500)) -> list[str]:
    """Different pieces of prose, of lengths that take turns; none is another's prefix."""
    text = prose("held-out")
    step = (len(text) - max(characters)) // count
    return [text[index * step :][: characters[index % len(characters)]] for index in range(count)]


def ask(url: str, prompt: str, max_tokens: int) -> Outcome:
    """One greedy completion."""
    start = time.monotonic()
    body = {
        "model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
    }  # fmt: skip
    try:
        answer = CLIENT.post(f"{url}/v1/completions", json=body)
    except httpx.HTTPError as error:
        return Outcome(None, 0, time.monotonic() - start, error=type(error).__name__)
    seconds = time.monotonic() - start
    if answer.status_code != 200:
        return Outcome(None, answer.status_code, seconds, answer.headers.get("retry-after"), answer.text[:200])
    return Outcome(answer.json()["choices"][0]["text"], 200, seconds)


class Load:
    """Requests sent at once by as many clients, each request once.

    Args:
        url: the server.
        texts: the prompts.
        max_tokens: of every answer.
        clients: at once; default: all.
    """

    def __init__(self, url: str, texts: Sequence[str], max_tokens: int = 64, clients: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(clients or len(texts))
        self._futures: list[Future[Outcome]] = [self._pool.submit(ask, url, text, max_tokens) for text in texts]

    @property
    def in_flight(self) -> int:
        """Requests that have no answer yet."""
        return sum(not future.done() for future in self._futures)

    def outcomes(self) -> list[Outcome]:
        """What became of each, in the order of the prompts; waits for the last."""
        found = [future.result() for future in self._futures]
        self._pool.shutdown()
        return found


@contextlib.contextmanager
def company(url: str, count: int = 3) -> Iterator[None]:
    """Streams that keep other requests company until the end of the block, and then hang up.

    All have begun before the block does, or were refused. The model's own arithmetic sums in another order for a batch of
    one row, in stock vLLM as well, and from one bit on two greedy answers may part: compared are answers that never were
    alone.
    """
    stop = threading.Event()
    begun = [threading.Event() for _ in range(count)]

    def stream(index: int) -> None:
        text = f"Company {index}. " + prose("tuning")[index * 500 :][:400]
        # The first answers end at different times, and so all after them: never is nobody there.
        tokens = 1500 * (index + 1) // count
        while not stop.is_set():
            body = {"model": "demo", "prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True}
            try:
                with CLIENT.stream("POST", f"{url}/v1/completions", json=body) as answer:
                    broken = answer.status_code != 200
                    for line in answer.iter_lines():
                        begun[index].set()
                        if stop.is_set():
                            return
                        # What breaks after the headers is told in the stream.
                        broken |= line.startswith('data: {"error"')
            except httpx.HTTPError:
                broken = True
            begun[index].set()
            if broken:
                stop.wait(0.2)
            else:
                tokens = 1500

    threads = [threading.Thread(target=stream, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    try:
        for each in begun:
            each.wait(SECONDS)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for a condition; the seconds it took.

    Raises:
        AssertionError: naming ``what``, if it does not come true in time.
    """
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not in {seconds:g} s: {what}"
        threading.Event().wait(0.1)
    return time.monotonic() - start


def status(url: str) -> int:
    """HTTP status of a GET; 0 if there is no server."""
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0

"""What watching itself costs a server, in output tokens per second: enlarged until a noisy machine can tell.

Two servers that are alike differ by 1 to 4 % on a shared machine, and one server by a tenth from second to second; what is
to be told apart here is below 1 %. So one server, under steady load, does one kind of watching many times as often as it
should, or none, in turn, for slices of some seconds (:mod:`benchmarks.switched`): it samples every step instead of one
in 200, asks its workers all the time, sings its canary again and again. What one such event takes from the tokens per
second, times how often it happens by default, is what it costs. This takes for granted that an event costs what it costs
however rare it is.

Rounds have every kind once, in an order drawn anew for each; what is under way when a slice ends is waited for, so that it
counts where it began. The interval is a bootstrap over rounds, of everything together. Clients ask for long answers and
begin at different places of theirs, because slices with and without a prefill cannot be compared.

What cannot be switched is timed by itself: what the middleware that adds to ``usage`` costs for each chunk of a stream, on
the core that serves HTTP.

    python -m benchmarks.overhead balanced.spectral --rounds 60
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from openai import OpenAI
from rich.progress import track
from vllm_spectral_server.monitor import POLL_SECONDS
from vllm_spectral_server.usage import CacheUsage

from benchmarks.measure import save
from benchmarks.switched import PAUSES
from benchmarks.texts import prose
from deploy.process import ServerProcess, running
from vllm_spectral.config import SpectralConfig

FLAGS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "256M")
PROMPT_CHARACTERS, ANSWER_TOKENS = 100, 1900
WARM_UP_SECONDS = 20
REDRAWS = 2000
FEWEST_ROUNDS = 10
"""With fewer, rounds can be drawn in which no canary ended, and of which no cost can be told."""
CHUNKS = 20_000

STATES = ("off", "sampling", *PAUSES)
SAMPLED_EVERY = SpectralConfig.fidelity_every
"""Steps, by default."""

Slice = dict[str, float]
"""Tokens, seconds, processor seconds, steps; and events, except of sampling."""


class Load:
    """A closed loop of clients, until the end of the block."""

    def __init__(self, server: ServerProcess, clients: int) -> None:
        self._client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600)
        self._over = False
        self._threads = [threading.Thread(target=self._work, args=(index, clients)) for index in range(clients)]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._over = True
        for thread in self._threads:
            thread.join()

    def _work(self, index: int, clients: int) -> None:
        text, turn = prose("held-out"), 0
        # The first answer is shorter, so that the clients' prompts are spread over time.
        length = ANSWER_TOKENS * (index + 1) // clients
        while not self._over:
            start = (index * 7919 + turn * 1543) % (len(text) - PROMPT_CHARACTERS)
            stream = self._client.completions.create(
                model="demo", prompt=text[start : start + PROMPT_CHARACTERS], max_tokens=length, temperature=0,
                stream=True, extra_body={"ignore_eos": True},
            )  # fmt: skip
            with stream:
                for _ in stream:
                    if self._over:
                        break
            turn, length = turn + 1, ANSWER_TOKENS


def turn(server: ServerProcess, state: str) -> dict[str, Any]:
    """Switch; what the server says of the moment before and the moment after."""
    url = f"{server.url}/v1/kv_cache/watching/{state}"
    answer: dict[str, Any] = json.load(urllib.request.urlopen(urllib.request.Request(url, method="POST")))
    return answer


def sampled_steps(server: ServerProcess) -> int:
    """So far, as the workers last said."""
    count: int = server.get("/v1/kv_cache/fidelity")["sampled_steps"]
    return count


def measure(server: ServerProcess, rounds: int, seconds: float) -> dict[str, list[Slice]]:
    """One slice of every state per round."""
    draw, slices = random.Random(0), {state: list[Slice]() for state in STATES}
    order = [state for _ in range(rounds) for state in draw.sample(STATES, len(STATES))]
    begin = turn(server, order[0])["after"]
    for state, following in track(zip(order, [*order[1:], "off"], strict=True), "slices", len(order), transient=True):
        time.sleep(seconds)
        figures = turn(server, following)
        end = figures["before"]
        found: Slice = {name: end[name] - begin[name] for name in ("tokens", "seconds", "processor_seconds", "steps")}
        found["events"] = end["events"].get(state, 0) - begin["events"].get(state, 0)
        slices[state].append(found)
        begin = figures["after"]
    return slices


def costs(
    slices: dict[str, list[Slice]], figure: str, sampled: float, pause: float, chosen: Sequence[int]
) -> dict[str, float]:
    """Part of the time that each kind of event takes when it is as frequent as by default, and their sum; what one takes.

    Args:
        slices: of every state, by round.
        figure: by which clock.
        sampled: share of the steps that are sampled in that state.
        pause: seconds between two canaries, by default.
        chosen: the rounds.
    """

    def total(state: str, name: str) -> float:
        return sum(slices[state][index][name] for index in chosen)

    rate = total("off", "tokens") / total("off", figure)
    steps_per_second = total("off", "steps") / total("off", "seconds")
    clock = total("off", figure) / total("off", "seconds")
    found = {}
    for state, per_second in (
        ("sampling", steps_per_second / SAMPLED_EVERY),
        ("questions", 1 / POLL_SECONDS),
        ("canaries", 1 / pause),
    ):
        lost = total(state, figure) - total(state, "tokens") / rate
        events = total(state, "events") if state != "sampling" else sampled * total(state, "steps")
        found[state] = lost / events * per_second / clock
        found[f"{state}, seconds each"] = lost / events
    return found | {"all": sum(found[state] for state in STATES[1:])}


async def middleware_seconds() -> float:
    """Of a chunk of a stream, for a client that does not ask for ``usage``."""
    message = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}

    async def application(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(CHUNKS):
            await send(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(_message: Any) -> None:
        pass

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions"}
    scope["app"] = SimpleNamespace(state=SimpleNamespace(spectral=SimpleNamespace(held=None)))
    taken = {"with": list[float](), "without": list[float]()}
    for _ in range(9):
        for side, app in (("with", CacheUsage(application)), ("without", application)):
            start = time.perf_counter()
            await app(scope, receive, send)
            taken[side].append(time.perf_counter() - start)
    return (min(taken["with"]) - min(taken["without"])) / CHUNKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--rounds", type=int, default=60, help=f"at least {FEWEST_ROUNDS} (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a slice")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds {arguments.rounds}: an interval wants at least {FEWEST_ROUNDS}")
    argv = [sys.executable, "-m", "benchmarks.switched", "serve", "demo", "--profile", arguments.profile, *FLAGS]
    # The workers are told by a function of the benchmark's.
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    with tempfile.TemporaryDirectory() as folder, running(argv, Path(folder) / "log", environment) as server:
        assert server.get("/ready")["ready"]
        with Load(server, arguments.clients):
            turn(server, "questions")
            time.sleep(WARM_UP_SECONDS)
            turn(server, "off")
            before = sampled_steps(server)
            slices = measure(server, arguments.rounds, arguments.seconds)
            # A last question tells of what was sampled.
            turn(server, "questions")
            # By then the server knows what a canary takes.
            pause = turn(server, "off")["after"]["canary_pause"]
            sampled = sampled_steps(server) - before
        assert server.get("/ready")["ready"]
    share = sampled / sum(each["steps"] for each in slices["sampling"])
    rounds, generator = range(arguments.rounds), random.Random(0)
    result: dict[str, Any] = {}
    for figure in ("seconds", "processor_seconds"):
        told = costs(slices, figure, share, pause, rounds)
        redrawn = [
            costs(slices, figure, share, pause, generator.choices(rounds, k=len(rounds))) for _ in range(REDRAWS)
        ]
        result[figure] = {
            name: (value, *(sorted(each[name] for each in redrawn)[place] for place in (REDRAWS // 40, -REDRAWS // 40)))
            for name, value in told.items()
        }
        for name, (value, low, high) in result[figure].items():
            form = ".4f" if name.endswith("each") else ".2%"
            print(f"{figure.replace('_', ' ')}: {name} {value:{form}} ({low:{form}} to {high:{form}}, 95 %)")
    for state, found in slices.items():
        tokens, seconds, steps, events = (
            sum(each[name] for each in found) for name in ("tokens", "seconds", "steps", "events")
        )
        print(
            f"{state}: {tokens / seconds:.1f} tokens/s, {steps / seconds:.1f} steps/s, {events:g} events in {seconds:.0f} s"
        )
    print(f"sampled: {sampled} steps; by default a canary every {pause:.0f} s")
    chunk = 1e6 * asyncio.run(middleware_seconds())
    print(f"middleware: {chunk:.2f} microseconds a chunk")
    told = {"costs": result, "sampled_steps": sampled, "canary_pause": pause, "middleware_microseconds": chunk}
    save(arguments.json, told | {"slices": slices})


if __name__ == "__main__":
    main()

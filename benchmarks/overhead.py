"""What watching itself costs a server: output tokens per second with it and without, in slices of a second.

Without it is vLLM's own server with the plugin, sampling off: no monitor, no canary, no metrics of ours, no middleware,
vLLM's scheduler. Both servers are under the same load all the time; they run in turn, the other one stopped (SIGSTOP), for
slices so short that what else happens on the machine happens to both. All tokens of one side are compared with all of the
other, once by the wall's clock and once by the processors' time that the server's processes took: what a neighbour on the
machine does to the first, it hardly does to the second. A step that a slice's end cuts through is counted in the next
slice of its side; so the interval is a bootstrap over runs of ten pairs, which share such a step at most at their ends.

Clients ask for long answers and begin at different places of theirs, because slices with and without a prefill cannot be
compared (prompts of 400 tokens and answers of 100, in step: 0.977, from 0.87 to 1.09, in 320 pairs).

The defaults are measured: one step in 200, workers asked every two seconds, a canary a minute. A server that is stopped half
of the time has two minutes for a minute of its own, so that the pause between canaries is doubled.

    python -m benchmarks.overhead balanced.spectral --seconds 1 --rounds 600
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI
from rich.progress import track

from benchmarks.measure import save
from benchmarks.serving import stock_server
from benchmarks.texts import prose
from deploy.process import ServerProcess, asleep, awake, command, running
from vllm_spectral.config import CONFIG_KEY

FLAGS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "256M")
PROMPT_CHARACTERS, ANSWER_TOKENS = 100, 1900
WARM_UP_SECONDS = 20
REDRAWS = 2000
BLOCK = 10  # pairs of slices drawn together

Slices = dict[str, list[float]]
"""Of each side, one figure per slice."""


def get(server: ServerProcess, path: str) -> Any:
    return json.load(urllib.request.urlopen(server.url + path))


class Load:
    """A closed loop of clients; counts the tokens that have come."""

    def __init__(self, server: ServerProcess, clients: int) -> None:
        self._client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600)
        self._counts = [0] * clients
        self._over = False
        self._threads = [threading.Thread(target=self._work, args=(index,)) for index in range(clients)]

    @property
    def tokens(self) -> int:
        """Of all clients so far."""
        return sum(self._counts)

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Let every client hang up."""
        self._over = True
        for thread in self._threads:
            thread.join()

    def _work(self, index: int) -> None:
        text, turn = prose("held-out"), 0
        # The first answer is shorter, so that the clients' prompts are spread over time.
        length = ANSWER_TOKENS * (index + 1) // len(self._counts)
        while not self._over:
            start = (index * 7919 + turn * 1543) % (len(text) - PROMPT_CHARACTERS)
            stream = self._client.completions.create(
                model="demo", prompt=text[start : start + PROMPT_CHARACTERS], max_tokens=length, temperature=0,
                stream=True, extra_body={"ignore_eos": True},
            )  # fmt: skip
            with stream:
                for _ in stream:
                    self._counts[index] += 1
                    if self._over:
                        break
            turn, length = turn + 1, ANSWER_TOKENS


def processor_seconds(server: ServerProcess) -> float:
    """That the server's processes have taken so far, in user and kernel mode."""
    parent = psutil.Process(server.process.pid)
    return sum(sum(each.cpu_times()[:2]) for each in [parent, *parent.children(recursive=True)])


def measure(servers: dict[str, ServerProcess], arguments: argparse.Namespace) -> dict[str, Slices]:
    """Tokens, seconds and processor seconds of every slice of both sides."""
    loads = {name: Load(server, arguments.clients) for name, server in servers.items()}
    slices: dict[str, Slices] = {
        figure: {name: [] for name in servers} for figure in ("tokens", "seconds", "processor_seconds")
    }
    try:
        with asleep(servers.values()):
            for load in loads.values():
                load.start()
            for server in servers.values():
                with awake(server):
                    time.sleep(WARM_UP_SECONDS)
            for turn in track(range(arguments.rounds), "rounds", transient=True):
                for name in ("on", "off") if turn % 2 else ("off", "on"):
                    before, busy, start = loads[name].tokens, processor_seconds(servers[name]), time.perf_counter()
                    with awake(servers[name]):
                        time.sleep(arguments.seconds)
                    slices["seconds"][name].append(time.perf_counter() - start)
                    slices["processor_seconds"][name].append(processor_seconds(servers[name]) - busy)
                    # What the sockets still hold belongs to the slice that made it.
                    time.sleep(0.05)
                    slices["tokens"][name].append(loads[name].tokens - before)
    finally:
        for load in loads.values():
            load.finish()
    return slices


def interval(tokens: Slices, seconds: Slices) -> tuple[float, float, float]:
    """Tokens per second with it over those without, and the 2.5th and 97.5th of a hundred of its redrawn values."""
    rounds = len(tokens["on"])

    def ratio(starts: Sequence[int]) -> float:
        def total(figures: list[float]) -> float:
            return sum(sum(figures[start : start + BLOCK]) for start in starts)

        on, off = (total(tokens[name]) / total(seconds[name]) for name in ("on", "off"))
        return on / off

    starts, generator = range(0, rounds, BLOCK), random.Random(0)
    redrawn = sorted(ratio(generator.choices(starts, k=len(starts))) for _ in range(REDRAWS))
    return ratio(starts), redrawn[REDRAWS // 40], redrawn[-REDRAWS // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a slice")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    on = command("serve", "demo", "--profile", arguments.profile, *FLAGS, "--canary-seconds", "120")
    config = {CONFIG_KEY: {"profile": str(Path(arguments.profile).absolute()), "fidelity_every": 0}}
    off = [*stock_server(), "--additional-config", json.dumps(config), *FLAGS]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            name: stack.enter_context(running(argv, Path(folder) / name))
            for name, argv in {"on": on, "off": off}.items()
        }
        assert get(servers["on"], "/ready")["ready"]
        before = get(servers["on"], "/v1/kv_cache/fidelity")
        slices = measure(servers, arguments)
        after = get(servers["on"], "/v1/kv_cache/fidelity")
        assert get(servers["on"], "/ready")["ready"]
    canaries = after["canary"]["runs"] - before["canary"]["runs"]
    ratios = {kind: interval(slices["tokens"], slices[kind]) for kind in ("seconds", "processor_seconds")}
    for kind, (ratio, low, high) in ratios.items():
        print(f"tokens per {kind[:-1].replace('_', ' ')}, on / off: {ratio:.4f} ({low:.4f} to {high:.4f}, 95 %)")
    print(f"{arguments.rounds} pairs of {arguments.seconds:g} s, {canaries} canaries")
    save(arguments.json, {"ratios": ratios, "canaries": canaries, "slices": slices})


if __name__ == "__main__":
    main()

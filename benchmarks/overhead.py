"""What watching itself costs a server: output tokens per second with it and without, in slices of a second.

Without it is vLLM's own server with the plugin, sampling off: no monitor, no canary, no metrics of ours, no middleware,
vLLM's scheduler. Two servers that are alike are not equally fast, by where their memory and threads happen to lie; so there
are several of each side, and what alike ones differ by is told beside what the sides differ by.

All servers are under the same load all the time; they run in turn, the others stopped (SIGSTOP), for slices so short that
what else happens on the machine happens to all. All tokens of one side are compared with all of the other, once by the
wall's clock and once by the processors' time that the servers' processes took: what a neighbour on the machine does to the
first, it hardly does to the second. A step that a slice's end cuts through is counted in the next slice of its server; so
the interval is a bootstrap over runs of ten rounds, which share such a step at most at their ends.

Clients ask for long answers and begin at different places of theirs, because slices with and without a prefill cannot be
compared (prompts of 400 tokens and answers of 100, in step: 0.977, from 0.87 to 1.09, in 320 pairs).

The defaults are measured: one step in 200, workers asked every two seconds, which is once per slice, a canary a minute. A
server that runs a fourth of the time has four minutes for a minute of its own, so that the pause between canaries is four
times as long.

    python -m benchmarks.overhead balanced.spectral --rounds 120
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
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
BLOCK = 10  # rounds drawn together

Slices = dict[str, list[float]]
"""Of each server, one figure per slice."""


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


def processor_seconds(server: ServerProcess) -> Counter[str]:
    """What the server's processes have taken so far, in user and kernel mode, by name; ``python`` serves HTTP."""
    parent = psutil.Process(server.process.pid)
    taken: Counter[str] = Counter()
    for each in [parent, *parent.children(recursive=True)]:
        taken[each.name()] += sum(each.cpu_times()[:2])
    return taken


def measure(
    servers: dict[str, ServerProcess], arguments: argparse.Namespace
) -> tuple[dict[str, Slices], dict[str, Counter[str]]]:
    """Tokens, seconds and processor seconds of every slice of all servers; the latter summed, by process and server."""
    loads = {name: Load(server, arguments.clients) for name, server in servers.items()}
    slices: dict[str, Slices] = {
        figure: {name: [] for name in servers} for figure in ("tokens", "seconds", "processor_seconds")
    }
    spent: dict[str, Counter[str]] = defaultdict(Counter)
    try:
        with asleep(servers.values()):
            for load in loads.values():
                load.start()
            for server in servers.values():
                with awake(server):
                    time.sleep(WARM_UP_SECONDS)
            draw = random.Random(0)
            for _ in track(range(arguments.rounds), "rounds", transient=True):
                for name in draw.sample(sorted(servers), len(servers)):
                    before, busy, start = loads[name].tokens, processor_seconds(servers[name]), time.perf_counter()
                    with awake(servers[name]):
                        time.sleep(arguments.seconds)
                    slices["seconds"][name].append(time.perf_counter() - start)
                    taken = processor_seconds(servers[name]) - busy
                    slices["processor_seconds"][name].append(taken.total())
                    for process in taken:
                        spent[process][name] += taken[process]
                    # What the sockets still hold belongs to the slice that made it.
                    time.sleep(0.05)
                    slices["tokens"][name].append(loads[name].tokens - before)
    finally:
        for load in loads.values():
            load.finish()
    return slices, dict(spent)


def interval(tokens: Slices, seconds: Slices, some: Sequence[str], others: Sequence[str]) -> tuple[float, float, float]:
    """Tokens per second of some servers over those of others, and the 2.5th and 97.5th of a hundred of its redrawn values."""
    rounds = len(tokens[some[0]])

    def ratio(starts: Sequence[int]) -> float:
        def total(figures: Slices, names: Sequence[str]) -> float:
            return sum(sum(figures[name][start : start + BLOCK]) for name in names for start in starts)

        first, second = (total(tokens, names) / total(seconds, names) for names in (some, others))
        return first / second

    starts, generator = range(0, rounds, BLOCK), random.Random(0)
    redrawn = sorted(ratio(generator.choices(starts, k=len(starts))) for _ in range(REDRAWS))
    return ratio(starts), redrawn[REDRAWS // 40], redrawn[-REDRAWS // 40]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a slice")
    parser.add_argument("--servers", type=int, default=2, help="of each side")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pause = str(60 * 2 * arguments.servers)
    on = command("serve", "demo", "--profile", arguments.profile, *FLAGS, "--canary-seconds", pause)
    config = {CONFIG_KEY: {"profile": str(Path(arguments.profile).absolute()), "fidelity_every": 0}}
    off = [*stock_server(), "--additional-config", json.dumps(config), *FLAGS]
    sides = {side: [f"{side} {number}" for number in range(1, arguments.servers + 1)] for side in ("with", "without")}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {
            name: stack.enter_context(running(on if side == "with" else off, Path(folder) / name))
            for side, names in sides.items()
            for name in names
        }
        watched = [servers[name] for name in sides["with"]]
        assert all(get(server, "/ready")["ready"] for server in watched)
        before = [get(server, "/v1/kv_cache/fidelity") for server in watched]
        slices, spent = measure(servers, arguments)
        after = [get(server, "/v1/kv_cache/fidelity") for server in watched]
        assert all(get(server, "/ready")["ready"] for server in watched)
    pairs = [("with over without", sides["with"], sides["without"])]
    pairs += [(f"{name} over {names[0]}", [name], names[:1]) for names in sides.values() for name in names[1:]]
    ratios = {
        kind: {label: interval(slices["tokens"], slices[kind], some, others) for label, some, others in pairs}
        for kind in ("seconds", "processor_seconds")
    }
    for kind, found in ratios.items():
        for label, (ratio, low, high) in found.items():
            print(f"tokens per {kind[:-1].replace('_', ' ')}, {label}: {ratio:.4f} ({low:.4f} to {high:.4f}, 95 %)")
    tokens = {side: sum(sum(slices["tokens"][name]) for name in names) for side, names in sides.items()}
    processes = {
        process: {side: 1e6 * sum(taken[name] for name in names) / tokens[side] for side, names in sides.items()}
        for process, taken in spent.items()
    }
    for process, found in processes.items():
        print(f"{process}: " + ", ".join(f"{side} {value:.0f} us" for side, value in found.items()) + " a token")
    canaries = [b["canary"]["runs"] - a["canary"]["runs"] for a, b in zip(before, after, strict=True)]
    sampling = sum(b["sampling_seconds"] - a["sampling_seconds"] for a, b in zip(before, after, strict=True))
    # Warm-up is in what was sampled, too.
    awake_seconds = sum(sum(slices["seconds"][name]) + WARM_UP_SECONDS for name in sides["with"])
    print(f"sampling and the canary's probes: {sampling / awake_seconds:.2%} of the time")
    print(f"{arguments.rounds} rounds of {arguments.seconds:g} s for each server, canaries: {canaries}")
    save(
        arguments.json,
        {
            "ratios": ratios,
            "canaries": canaries,
            "sampling": sampling / awake_seconds,
            "processes": processes,
            "slices": slices,
        },
    )


if __name__ == "__main__":
    main()

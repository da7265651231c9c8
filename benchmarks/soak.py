"""A healthy server under mixed traffic for hours: does its memory grow, does it slow down, does it ever raise an alarm?

Clients ask short questions and long ones, in chats and completions, some hang up in the middle and some ask what is refused.

Usage: ``python -m benchmarks.soak balanced.spectral --minutes 120 --json soak.json --plot soak.png``
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.measure import save
from benchmarks.texts import code, prose
from deploy.process import ServerProcess, command, running
from vllm_spectral.progress import token_bar

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain recursion.",
    "Translate 'good morning'.",
)
WARM_UP = 0.1
"""Of the time: what comes first, and does not count when growth is looked for (allocators, caches and JIT fill up)."""
SAMPLE_SECONDS = 10.0


@dataclass(frozen=True)
class Sample:
    """The server at one moment.

    Attributes:
        seconds: since the traffic began.
        resident_bytes: of all its processes.
        output_tokens, preemptions: since its start.
        pages_used: part of the pool, 0 to 1.
    """

    seconds: float
    resident_bytes: int
    output_tokens: float
    preemptions: float
    pages_used: float


class Traffic:
    """Clients that go on until ``end`` on the monotonic clock, and what became of their requests.

    Attributes:
        seen: how many requests ended how; "answered", "hung up", "refused" are as they should be.
    """

    def __init__(self, url: str, clients: int, end: float) -> None:
        self.seen: collections.Counter[str] = collections.Counter()
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self._texts, self._end = (prose("held-out"), code("held-out")), end
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._visit, args=(index,)) for index in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()

    def _visit(self, index: int) -> None:
        draw = random.Random(index)
        while time.monotonic() < self._end:
            try:
                outcome = self._ask(draw)
            except (openai.APIError, httpx.HTTPError) as error:
                outcome = type(error).__name__
            with self._lock:
                self.seen[outcome] += 1
            time.sleep(draw.random() * 2)

    def _ask(self, draw: random.Random) -> str:
        kind = draw.random()
        if kind < 0.3:
            question: Any = [{"role": "user", "content": draw.choice(QUESTIONS)}]
            self._client.chat.completions.create(model="demo", messages=question, max_tokens=100)
            return "answered"
        text = draw.choice(self._texts)
        start = draw.randrange(len(text) - 8000)
        prompt = text[start : start + draw.choice((200, 1500, 8000))]
        if kind < 0.4:
            stream = self._client.completions.create(model="demo", prompt=prompt, max_tokens=500, stream=True)
            for _, _ in zip(range(draw.randrange(1, 40)), stream, strict=False):
                pass
            stream.close()
            return "hung up"
        if kind < 0.45:
            try:
                self._client.completions.create(model="demo", prompt=text[:40000], max_tokens=8)
            except openai.BadRequestError:
                return "refused"
            return "a prompt too long was answered"
        self._client.completions.create(model="demo", prompt=prompt, max_tokens=draw.choice((8, 64, 200)))
        return "answered"


def get(url: str) -> tuple[int, Any]:
    """Status and JSON, also of an error."""
    try:
        with urllib.request.urlopen(url) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def sample(server: ServerProcess, seconds: float) -> Sample:
    """The server as it is now."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        families = text_string_to_metric_families(response.read().decode())
    values = {one.name: one.value for family in families for one in family.samples}
    return Sample(
        seconds, server.resident_bytes(), values["vllm:generation_tokens_total"], values["vllm:num_preemptions_total"],
        values["vllm:kv_cache_usage_perc"],
    )  # fmt: skip


def rates(samples: Sequence[Sample], width: int = 1) -> list[float]:
    """Output tokens per second between every sample and the one ``width`` later."""
    pairs = zip(samples, samples[width:], strict=False)
    return [(b.output_tokens - a.output_tokens) / (b.seconds - a.seconds) for a, b in pairs]


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """Memory and speed after the warm-up: the last quarter against the first, and the slope of a line through all.

    Returns:
        ``memory_ratio`` and ``speed_ratio``, medians of the last quarter over those of the first, and
        ``memory_bytes_per_hour``, from least squares.
    """
    counted = samples[int(WARM_UP * len(samples)) :]
    quarter = len(counted) // 4
    memory = [one.resident_bytes for one in counted]
    speed = rates(counted)
    slope = statistics.linear_regression([one.seconds for one in counted], memory).slope
    return {
        "memory_ratio": statistics.median(memory[-quarter:]) / statistics.median(memory[:quarter]),
        "memory_bytes_per_hour": slope * 3600,
        "speed_ratio": statistics.mean(speed[-quarter:]) / statistics.mean(speed[:quarter]),
    }


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Memory, output tokens per second and used pages over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, speed, pages) = plt.subplots(3, 1, figsize=(8, 6.5), sharex=True)
    minutes = [one.seconds / 60 for one in samples]
    memory.plot(minutes, [one.resident_bytes / 1e9 for one in samples])
    memory.set_ylabel("resident memory, GB")
    memory.set_ylim(0, 1.2e-9 * max(one.resident_bytes for one in samples))
    width = max(1, round(60 / SAMPLE_SECONDS))
    speed.plot(minutes[width:], rates(samples, width))
    speed.set_ylabel("output tokens/s")
    speed.set_ylim(0)
    pages.plot(minutes, [100 * one.pages_used for one in samples])
    pages.set_ylabel("pages used, %")
    pages.set_xlabel("minutes")
    for axis in (memory, speed, pages):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="a profile of the embedded model")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (%(default)s)")
    parser.add_argument("--clients", type=int, default=3, help="how many ask at once (%(default)s)")
    parser.add_argument("--json", type=Path, help="where the result is kept")
    parser.add_argument("--plot", type=Path, help="where memory, speed and pages over time are drawn")
    arguments = parser.parse_args()
    if arguments.minutes < 2 or arguments.clients < 1:
        parser.error("at least two minutes and one client are needed: growth is looked for between two quarters")
    alarms: collections.Counter[str] = collections.Counter()
    samples: list[Sample] = []
    not_ready = checks = 0
    argv = command("serve", "demo", "--profile", arguments.profile, "--kv-cache-memory-bytes", "256M")
    with (
        tempfile.TemporaryDirectory() as folder,
        running([*argv, "--max-model-len", "4096"], Path(folder) / "log") as server,
        token_bar("seconds", round(60 * arguments.minutes), True) as advance,
    ):
        start = time.monotonic()
        end = start + 60 * arguments.minutes
        with Traffic(server.url, arguments.clients, end) as traffic:
            while time.monotonic() < end:
                checks += 1
                not_ready += get(server.url + "/ready")[0] != 200
                alarms.update(alarm["message"] for alarm in get(server.url + "/v1/kv_cache/fidelity")[1]["alarms"])
                seconds = time.monotonic() - start
                if seconds >= SAMPLE_SECONDS * len(samples):
                    samples.append(sample(server, seconds))
                    advance(round(SAMPLE_SECONDS))
                time.sleep(1)
        last = sample(server, time.monotonic() - start)
        state = get(server.url + "/v1/kv_cache/fidelity")[1]
    result = {
        "minutes": arguments.minutes, "requests": dict(traffic.seen), "output_tokens": last.output_tokens,
        "preemptions": last.preemptions, "pages_used_at_the_end": last.pages_used, **growth(samples),
        "checks": checks, "not_ready": not_ready, "alarms": dict(alarms),
        "canaries": state["canary"]["runs"], "canary_failures": state["canary"]["failures"],
        "sampled_steps": state["sampled_steps"],
        "largest_error_ratio": max((layer["error_ratio"] or 0.0) for layer in state["layers"]),
        "largest_drift": max((layer["drift"] or 0.0) for layer in state["layers"]),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    save(arguments.json, result | {"samples": [asdict(one) for one in samples]})
    if arguments.plot:
        plot(samples, arguments.plot)


if __name__ == "__main__":
    main()

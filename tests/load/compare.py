"""Stock vLLM and ours with equal bytes for the KV cache, under the same clients, one after the other and again.

    python -m tests.load.compare balanced.spectral --memory 64M --clients 64 --output build/load

Both servers live; the one that is not measured is stopped (SIGSTOP). Locust plays the users of ``locustfile.py``, each kind
alone and then all together; vLLM's load generator closes the loop with random prompts, and climbs from one client to all.
The report (Markdown, JSON, a plot) has both sides of every figure, and the line at the end the two that matter most. Each
run is a line as it ends, and in the report's JSON from then on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.measure import save
from benchmarks.serving import bench, preemptions, stock_server
from deploy.process import ServerProcess, asleep, awake, command, running
from vllm_spectral.progress import token_bar

mpl.use("Agg")

SCENARIOS: dict[str, tuple[str, ...]] = {
    "chat, shared system prompt": ("Chat",),
    "question about a long document": ("Document",),
    "many short": ("Short",),
    "all, with clients that hang up or read slowly": (),
}
SIDES = ("stock", "ours")
Figures = dict[str, float]


def locust(
    executable: Path, server: ServerProcess, users: Sequence[str], clients: int, warmup: float, seconds: float
) -> Figures:
    """One run of Locust; what its users felt in ``seconds`` after ``warmup``.

    At the start everyone asks at once, and for a while a server does little but prefill: how long depends on how many it has
    room for. Whoever serves for hours is not interested.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "records"
        flags = ["-f", "tests/load/locustfile.py", "--headless", "--only-summary", "--stop-timeout", "0"]
        flags += ["-u", str(clients), "-r", str(clients), "-t", f"{warmup + seconds:g}s", "--host", server.url, *users]
        environment = os.environ | {"LOAD_REPORT": str(report), "PYTHONPATH": "."}
        done = subprocess.run([executable, *flags], env=environment, capture_output=True, text=True, check=False)
        records = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    if not records:
        raise RuntimeError(f"Locust recorded nothing:\n{done.stderr[-4000:]}")
    begin = min(record["start"] for record in records) + warmup
    return felt(records, begin, begin + seconds)


def felt(records: Sequence[dict[str, Any]], begin: float, end: float) -> Figures:
    """What users felt between two times; see ``locustfile.py`` for a record."""
    # Whoever was cut off by the end of the run before anything came has no status.
    good = [record for record in records if record["status"] == 200 or record["cut"]]
    tokens, answered, first, pace = 0, 0, list[float](), list[float]()
    for record in good:
        progress = [(record["start"] + after, count) for after, count in record["progress"]]
        over = record["start"] + record["seconds"]
        until = [max((count for at, count in progress if at <= time), default=0) for time in (begin, end)]
        tokens += until[1] - until[0]
        answered += not record["cut"] and begin < over <= end
        # Who got no first token before the end has waited so long at least.
        came = min(progress[0][0] if progress else over, end)
        if begin < came <= end:
            first.append(came - record["start"])
        # Who hung up or read slowly has no pace of its own.
        seen = [(at, count) for at, count in progress if begin < at <= end] or [(0.0, 0)]
        (since, had), (last, has) = seen[0], seen[-1]
        if record["scenario"] not in ("HangUp", "SlowReader") and has > had:
            pace.append((last - since) / (has - had))
    return {
        "output_tokens_per_second": tokens / (end - begin),
        "requests": answered,
        "failures": len(records) - len(good),
        **{f"ttft_p{p}_seconds": percentile(first, p) for p in (50, 99)},
        **{f"tpot_p{p}_seconds": percentile(pace, p) for p in (50, 99)},
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """0 of none."""
    return float(np.percentile(values, percent)) if values else 0.0


def closed_loop(server: ServerProcess, clients: int, seed: int, folder: Path) -> Figures:
    """VLLM's load generator with random prompts, every client asking its next request when it has its answer."""
    shape = argparse.Namespace(prompt=1024, output=128, requests=clients, verbose=False)
    found = bench(server, shape, seed, folder)
    return {
        "output_tokens_per_second": found["output_throughput"],
        "requests": clients,
        "failures": 0,
        "ttft_p50_seconds": found["median_ttft_ms"] / 1e3,
        "ttft_p99_seconds": found["p99_ttft_ms"] / 1e3,
        "tpot_p50_seconds": found["median_tpot_ms"] / 1e3,
        "tpot_p99_seconds": found["p99_tpot_ms"] / 1e3,
    }


@contextmanager
def both(profile: str, memory: str, folder: Path) -> Iterator[dict[str, ServerProcess]]:
    """Both servers, stopped."""
    common = ["--max-model-len", "2048", "--kv-cache-memory-bytes", memory]
    sides = {"stock": [*stock_server(), *common], "ours": [*command("serve", "demo", "--profile", profile), *common]}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running(argv, folder / f"{name}.log")) for name, argv in sides.items()}
        with asleep(servers.values()):
            yield servers


def medians(runs: Sequence[Figures]) -> Figures:
    """Figure by figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def most_clients(steps: dict[int, Figures], target: float) -> int:
    """The most clients at which the 99th percentile of the time to the first token is within the target; 0: none."""
    return max((clients for clients, found in steps.items() if found["ttft_p99_seconds"] <= target), default=0)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs: by load, by side, a list of figures."""
    climb = [clients for clients in (1, 4, 16, 32) if clients < arguments.clients] + [arguments.clients]
    loads = [*SCENARIOS, *(f"random prompts, {clients} clients" for clients in climb)]
    rows: dict[str, dict[str, list[Figures]]] = {load: {side: [] for side in SIDES} for load in loads}
    turns = [(turn, number, load) for turn in range(arguments.rounds) for number, load in enumerate(loads)]
    runs, number_of_run = len(turns) * len(SIDES), itertools.count(1)
    with (
        both(arguments.profile, arguments.memory, folder) as servers,
        token_bar("loads", runs, sys.stderr.isatty()) as advance,
    ):
        for turn, number, load in turns:
            for side in SIDES if (turn + number) % 2 else SIDES[::-1]:
                with awake(servers[side]) as server:
                    before = preemptions(server)
                    if load in SCENARIOS:
                        users = SCENARIOS[load]
                        found = locust(
                            arguments.locust, server, users, arguments.clients, arguments.warmup, arguments.seconds
                        )
                    else:
                        found = closed_loop(server, climb[number - len(SCENARIOS)], 100 * turn + number, folder)
                    rows[load][side].append(found | {"preemptions": preemptions(server) - before})
                advance(1)
                rate, wait = found["output_tokens_per_second"], found["ttft_p99_seconds"]
                told = f"{load}, {side}: {rate:.1f} tokens/s, TTFT p99 {wait:.2f} s"
                print(f"run {next(number_of_run)} of {runs}: {told}", flush=True)
                save(arguments.output / "report.json", {"rows": rows})
    return {"rows": rows, "climb": climb}


def table(summary: dict[str, dict[str, Figures]]) -> str:
    """Markdown: stock / ours in every cell."""
    columns = {
        "output tokens/s": "output_tokens_per_second", "TTFT p50 (s)": "ttft_p50_seconds", "TTFT p99 (s)": "ttft_p99_seconds",
        "TPOT p50 (s)": "tpot_p50_seconds", "TPOT p99 (s)": "tpot_p99_seconds", "preemptions": "preemptions",
        "failed": "failures",
    }  # fmt: skip
    lines = ["| stock / ours | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for load, sides in summary.items():
        cells = [" / ".join(f"{sides[side][name]:.3g}" for side in SIDES) for name in columns.values()]
        lines.append(f"| {load} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, dict[str, Figures]], climb: Sequence[int], target: float, path: Path) -> None:
    """Throughput and both latencies by load, and the climb."""
    import matplotlib.pyplot as plt

    panels = {
        "output tokens per second": "output_tokens_per_second", "TTFT, 99th percentile (s)": "ttft_p99_seconds",
        "TPOT, 99th percentile (s)": "tpot_p99_seconds",
    }  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(19, 5), layout="constrained")
    names = list(SCENARIOS)
    for axis, (title, name) in zip(axes, panels.items(), strict=False):
        for place, side in enumerate(SIDES):
            at = np.arange(len(names)) + 0.4 * place - 0.2
            axis.barh(at, [summary[load][side][name] for load in names], 0.4, label=side)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.set_title(title)
        axis.invert_yaxis()
    for side in SIDES:
        steps = [summary[f"random prompts, {clients} clients"][side]["ttft_p99_seconds"] for clients in climb]
        axes[3].loglog(climb, steps, marker="o", label=side)
    axes[3].axhline(target, color="grey", linestyle=":", label="target")
    axes[3].set_title("TTFT p99 (s) against clients, random prompts")
    axes[3].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--memory", default="64M", help="bytes for the KV cache of either side (%(default)s)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--warmup", type=float, default=60.0, help="seconds of a run of Locust not counted (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of every run of Locust after it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--target", type=float, default=10.0, help="seconds to the first token, p99 (%(default)s)")
    parser.add_argument("--locust", type=Path, default=Path("build/load/bin/locust"), help="the command (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/load-report"))
    arguments = parser.parse_args()
    if not arguments.locust.exists():
        parser.error(f"{arguments.locust} does not exist: `make load-test` installs it")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    climb: list[int] = found["climb"]
    summary = {load: {side: medians(runs) for side, runs in sides.items()} for load, sides in found["rows"].items()}
    most = {
        side: most_clients({c: summary[f"random prompts, {c} clients"][side] for c in climb}, arguments.target)
        for side in SIDES
    }
    text = table(summary) + "\n" + "; ".join(
        f"{side}: {count} clients within {arguments.target:g} s to the first token (p99)" for side, count in most.items()
    ) + "\n"  # fmt: skip
    (arguments.output / "report.md").write_text(text)
    save(arguments.output / "report.json", found | {"medians": summary, "most_clients": most})
    plot(summary, climb, arguments.target, arguments.output / "report.png")
    print(text)
    last = summary[f"random prompts, {climb[-1]} clients"]
    speed = last["ours"]["output_tokens_per_second"] / last["stock"]["output_tokens_per_second"]
    wait = last["ours"]["ttft_p99_seconds"] / last["stock"]["ttft_p99_seconds"]
    failed = sum(summary[load]["ours"]["failures"] for load in summary)
    print(
        f"{arguments.clients} clients, {arguments.memory} of KV cache: {speed:.2f} times stock's output tokens per second, "
        f"{wait:.2f} times its p99 time to first token, {failed:g} failed requests"
    )
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

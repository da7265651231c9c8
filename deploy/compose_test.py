"""Run both compose files for real and hold them to what they promise. Ends with one line of figures.

1. The quick tests: what compose, promtool and hadolint say of the files.
2. ``compose.yaml``: calibrates, serves, is asked by several clients at once; every panel of the dashboard and every alert is
   evaluated by the Prometheus of the file, which scraped that server. Grafana runs only where its image can be had.
3. ``replicas.yaml``: two servers with a small cache. The router
   spreads the same kind of traffic by prefix, then in turn; the servers' own counters say how much of the prompts was found.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.containers import ROOT, Engine, concluded, find_engine, install, say
from deploy.image import named_base
from deploy.image_test import add_test_arguments, built, check
from deploy.monitoring import COMPOSE, alerts, metrics, panels

KEY = "compose-test"
HEADERS = {"Authorization": f"Bearer {KEY}"}
START_SECONDS = 600
SCRAPE_SECONDS = yaml.safe_load((COMPOSE / "prometheus" / "prometheus.yml").read_text())["global"]["scrape_interval"]
# Beginnings of prompts in the replicas' traffic, words in each, and how often each is used.
PREFIXES, WORDS, ROUNDS = 31, 150, 3
# Room for all of them in each replica: the router sends a new beginning to the replica with fewer requests in flight, and a
# slow one gets few. What tells the policies apart is then how often a beginning is computed: once, or once in each replica;
# few rounds tell it best. Of three, two find theirs by prefix, and one in turn: the number of beginnings is odd, so that each
# meets the other replica the next time.
REPLICA_BYTES = "48M"


class Project:
    """A compose file, driven through the engine's socket.

    Args:
        file: which one, below ``deploy/compose``.
        environment: its variables.
        host: the engine's socket, if it is not docker's own.
    """

    def __init__(self, file: str, environment: Mapping[str, str], host: str | None) -> None:
        self._argv = [str(Path(sys.executable).with_name("docker-compose")), "-f", str(COMPOSE / file)]
        self._environment = os.environ | environment | ({"DOCKER_HOST": host} if host else {})

    def call(self, *argv: str) -> str:
        """Run a command; what it wrote.

        Raises:
            RuntimeError: if it fails.
        """
        done = subprocess.run(
            [*self._argv, *argv],
            env=self._environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"docker-compose {' '.join(argv)}: exit status {done.returncode}\n{done.stdout[-4000:]}")
        return done.stdout

    def up(self, *services: str) -> None:
        """Start services and, unless ``--no-deps`` is among them, what they depend on."""
        self.call("up", "--detach", "--no-build", *services)

    @contextlib.contextmanager
    def running(self, *services: str) -> Iterator[None]:
        """Up for the length of the block; volumes go too. If the block fails, the end of the logs is shown."""
        try:
            self.up(*services)
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):
                sys.stderr.write(self.call("logs", "--tail", "60")[-12000:] + "\n")
            raise
        finally:
            self.call("down", "--volumes", "--timeout", "60")


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus.

    Attributes:
        url: its address.
    """

    url: str

    def query(self, expression: str) -> list[float]:
        """Values of an instant query.

        Raises:
            AssertionError: if the expression is refused.
        """
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).json()
        if answer["status"] != "success":
            raise AssertionError(f"Prometheus refuses {expression}: {answer.get('error')}")
        result: list[dict[str, Any]] = answer["data"]["result"]
        return [float(sample["value"][1]) for sample in result]

    def targets(self) -> int:
        """How many servers it reaches."""
        return int(sum(self.query('up{job="vllm-spectral"}')))


def until(what: str, holds: Any, seconds: float = START_SECONDS) -> float:
    """Wait; the seconds it took.

    Raises:
        AssertionError: if it does not come true in time.
    """
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        with contextlib.suppress(httpx.HTTPError, ValueError):  # nobody there yet, or something else than an answer
            if holds():
                return time.monotonic() - start
        time.sleep(1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def complete(url: str, prompt: str, tokens: int) -> float:
    """Ask once; the seconds it took."""
    start = time.monotonic()
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=120).raise_for_status()
    return time.monotonic() - start


def text(words: int, seed: int) -> str:
    """Words that no other seed shares, so that prompts differ from the first block on."""
    draw = random.Random(seed)
    some = (
        "cache",
        "page",
        "token",
        "block",
        "head",
        "layer",
        "rotate",
        "store",
        "attend",
        "scale",
        "basis",
        "channel",
        "energy",
    )
    return f"Document {seed}. " + " ".join(draw.choice(some) for _ in range(words))


def monitored(project: Project, ports: dict[str, int], grafana: bool) -> str:
    """``compose.yaml``; a line of figures."""
    url, prometheus = f"http://127.0.0.1:{ports['PORT']}", Prometheus(f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}")
    with project.running("server", "prometheus", *(["grafana"] if grafana else [])):
        seconds = until("the server is ready", lambda: httpx.get(f"{url}/ready").status_code == 200)
        say(f"ok: calibrated and ready after {seconds:.0f} s")
        until("Prometheus scrapes it", lambda: prometheus.targets() == 1, 60)
        if grafana:
            until(
                "Grafana answers",
                lambda: httpx.get(f"http://127.0.0.1:{ports['GRAFANA_PORT']}/api/health").is_success,
                120,
            )
        end = time.monotonic() + 75  # two scrapes within the minute over which rates are taken, and some to spare
        with ThreadPoolExecutor(4) as pool:
            asked = 0
            while time.monotonic() < end:
                asked += len(list(pool.map(lambda i: complete(url, text(120, i % 3), 24), range(asked, asked + 4))))
        shown = list(panels())
        empty = [f"{title}: {query}" for title, query in shown if not any(map(math.isfinite, prometheus.query(query)))]
        check(
            not empty, f"all {len(shown)} queries of the dashboard return figures after {asked} requests {empty or ''}"
        )
        ruled = list(alerts())
        absent = {name for _, query in ruled for name in metrics(query) if not prometheus.query(name)}
        check(not absent, f"all metrics of the {len(ruled)} alerts are scraped {absent or ''}")
        groups = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
        health = [rule["health"] for group in groups for rule in group["rules"]]
        check(health == ["ok"] * len(ruled), "Prometheus evaluates all of them")
        firing = [rule["name"] for group in groups for rule in group["rules"] if rule["state"] == "firing"]
        check(not firing, f"none fires at a server that is well {firing or ''}")
    return f"{len(shown)} queries and {len(ruled)} alerts live"


def routed(project: Mapping[str, Project], ports: dict[str, int]) -> str:
    """``replicas.yaml`` under both policies; a line of figures."""
    url, prometheus = f"http://127.0.0.1:{ports['PORT']}", Prometheus(f"http://127.0.0.1:{ports['PROMETHEUS_PORT']}")
    figures: dict[str, tuple[float, float]] = {}
    first = next(iter(project.values()))
    with first.running("router", "prometheus"):
        for turn, (policy, run) in enumerate(project.items()):
            run.up("--no-deps", "router")  # only the router differs, and is replaced
            until("the router answers", lambda: complete(url, "hello", 1) > 0)
            until("Prometheus scrapes both", lambda: prometheus.targets() == 2, 90)
            figures[policy] = spread(url, prometheus, turn)
            rate, seconds = figures[policy]
            say(f"{policy}: {rate:.0%} of the prompts' tokens found, median answer {seconds:.2f} s")
        served = prometheus.query("vllm:request_success_total > 0")
        check(len(served) >= 2, "both replicas served")
    (aware, fast), (turns, slow) = figures["cache_aware"], figures["round_robin"]
    check(aware > 0.45, "routed by prefix, most are found that can be: two thirds, less what is each prompt's own")
    check(aware > turns + 0.1, "routed by prefix, more of the prompts' tokens are found than in turn")
    return f"prefix hits {aware:.0%} by prefix ({fast:.2f} s an answer), {turns:.0%} in turn ({slow:.2f} s)"


def spread(url: str, prometheus: Prometheus, turn: int) -> tuple[float, float]:
    """Traffic over beginnings of its own; the share of tokens that was found, and the median seconds of an answer."""
    pause = float(SCRAPE_SECONDS.removesuffix("s")) + 5

    def counted(name: str) -> float:
        return sum(prometheus.query(f"vllm:prefix_cache_{name}_total"))

    time.sleep(pause)
    before = {name: counted(name) for name in ("hits", "queries")}
    order = ROUNDS * list(range(PREFIXES))
    prompts = [f"{text(WORDS, 1000 * (turn + 1) + prefix)} Question {i}:" for i, prefix in enumerate(order)]
    with ThreadPoolExecutor(2) as pool:
        seconds = list(pool.map(lambda prompt: complete(url, prompt, 4), prompts))
    time.sleep(pause)
    hits, queries = (counted(name) - before[name] for name in ("hits", "queries"))
    return hits / queries, statistics.median(seconds)


@contextlib.contextmanager
def socket_of(engine: Engine) -> Iterator[str | None]:
    """Where docker-compose finds the engine: podman's service, for the length of the block; None: docker's own."""
    if engine.name == "docker":
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "podman.sock"
        process = subprocess.Popen(
            ["podman", "system", "service", "--time=0", f"unix://{path}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            until("podman's service listens", path.exists, 20)
            yield f"unix://{path}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)


def test(engine: Engine, arguments: argparse.Namespace) -> str:
    """Everything; the line of figures."""
    quick = ["tests/deploy/test_containers.py", "tests/deploy/test_monitoring.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *quick], cwd=ROOT, capture_output=True, text=True, check=False
    )
    check(done.returncode == 0, done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stdout[-3000:])
    tag, _ = built(engine, arguments)
    services = yaml.safe_load((COMPOSE / "common.yaml").read_text())["services"]
    wanted = {name: services[name]["image"].split(":-")[1].rstrip("}") for name in ("prometheus", "grafana")}
    watcher = engine.obtain(
        wanted["prometheus"], COMPOSE / "Dockerfile.prometheus", "localhost/vllm-spectral-prometheus"
    )
    grafana = engine.can_pull(wanted["grafana"])
    if not grafana:
        say(f"NOT RUN: Grafana, because {wanted['grafana']} cannot be pulled; its files are checked, its queries asked")
    router = "localhost/vllm-spectral-router"
    dockerfile = COMPOSE / "Dockerfile.router"
    base = engine.base(arguments.base or named_base(dockerfile))
    engine.build(dockerfile, router, {"BASE_IMAGE": base}, verbose=arguments.verbose)
    ports = {name: arguments.port + i for i, name in enumerate(("PORT", "PROMETHEUS_PORT", "GRAFANA_PORT"))}
    common = {name: str(port) for name, port in ports.items()} | {
        "VLLM_SPECTRAL_IMAGE": tag, "PROMETHEUS_IMAGE": watcher, "ROUTER_IMAGE": router, "VLLM_API_KEY": KEY,
        "GRAFANA_PASSWORD": KEY, "PRESET": "instant",
    }  # fmt: skip
    small = {"KV_CACHE_BYTES": REPLICA_BYTES, "MAX_MODEL_LEN": "1024", "CPUS_1": "0", "CPUS_2": "1"}
    with socket_of(engine) as host:
        done = []
        if arguments.only != "replicas":
            one = Project("compose.yaml", common | {"KV_CACHE_BYTES": "64M", "MAX_MODEL_LEN": "2048"}, host)
            done.append(monitored(one, ports, grafana))
        if arguments.only != "compose":
            two = {
                policy: Project("replicas.yaml", common | small | {"ROUTER_POLICY": policy}, host)
                for policy in ("cache_aware", "round_robin")
            }
            done.append(f"two replicas behind vllm-router: {routed(two, ports)}")
        return "; ".join(done)


def main() -> int:
    """Test; 0, 1 if something does not hold, 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_test_arguments(parser)
    parser.add_argument("--port", type=int, default=18090, help="first of three ports that are used (%(default)s)")
    parser.add_argument("--only", choices=("compose", "replicas"), help="run one of the two files")
    arguments = parser.parse_args()

    def work() -> str:
        if not (Path("/usr/bin/promtool").exists()):
            install("prometheus", why="promtool is missing")
        return f"compose-test: {test(find_engine(), arguments)}"

    return concluded(work)


if __name__ == "__main__":
    sys.exit(main())

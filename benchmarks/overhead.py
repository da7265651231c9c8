"""What watching itself costs a server: output tokens per second with it and without, one server at a time.

Without it is vLLM's own server with the plugin, sampling off: no monitor, no canary, no metrics of ours, no middleware,
vLLM's scheduler. Both servers live; the one that is not measured is stopped (SIGSTOP). The defaults are measured: one step in
200, a canary a minute, workers asked every two seconds. A window is a minute, hence one canary.

    python -m benchmarks.overhead balanced.spectral --rounds 5
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.measure import save
from benchmarks.serving import stock_server
from benchmarks.texts import prose
from deploy.process import ServerProcess, command, running
from vllm_spectral.config import CONFIG_KEY

FLAGS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "256M")


def get(server: ServerProcess, path: str) -> Any:
    return json.load(urllib.request.urlopen(server.url + path))


def window(server: ServerProcess, clients: int, seconds: float) -> float:
    """Output tokens per second of a closed loop of clients."""
    text, end, counts = prose("held-out"), time.monotonic() + seconds, [0] * clients
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def work(index: int) -> None:
        turn = 0
        while time.monotonic() < end:
            start = (index * 7919 + turn * 1543) % (len(text) - 3000)
            stream = client.completions.create(
                model="demo", prompt=text[start : start + 1500], max_tokens=100, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            for _ in stream:
                counts[index] += time.monotonic() < end
            turn += 1

    threads = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    serve = command("serve", "demo", "--profile", arguments.profile, *FLAGS)
    rates: dict[str, list[float]] = {"on": [], "off": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        off = {CONFIG_KEY: {"profile": str(Path(arguments.profile).absolute()), "fidelity_every": 0}}
        sides = {"on": serve, "off": [*stock_server(), "--additional-config", json.dumps(off), *FLAGS]}
        servers = {name: stack.enter_context(running(argv, Path(folder) / name)) for name, argv in sides.items()}
        for server in servers.values():
            window(server, arguments.clients, 5)
        assert get(servers["on"], "/ready")["ready"]
        before, spent = get(servers["on"], "/v1/kv_cache/fidelity")["sampling_seconds"], 0.0
        servers["off"].signal(signal.SIGSTOP)
        servers["on"].signal(signal.SIGSTOP)
        try:
            for turn in range(arguments.rounds):
                for name in ("on", "off") if turn % 2 else ("off", "on"):
                    servers[name].signal(signal.SIGCONT)
                    rates[name].append(window(servers[name], arguments.clients, arguments.seconds))
                    spent += arguments.seconds * (name == "on")
                    servers[name].signal(signal.SIGSTOP)
                print(f"round {turn + 1}: on {rates['on'][-1]:.1f} tokens/s, off {rates['off'][-1]:.1f}", flush=True)
        finally:
            for server in servers.values():
                server.signal(signal.SIGCONT)
        fidelity = get(servers["on"], "/v1/kv_cache/fidelity")
        share = (fidelity["sampling_seconds"] - before) / spent
    quotients = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    print(
        f"on / off: median {statistics.median(quotients):.4f}, {min(quotients):.4f} to {max(quotients):.4f}; "
        f"sampling itself {share:.2%} of the time, {fidelity['canary']['runs']} canaries"
    )
    save(arguments.json, {"rates": rates, "quotients": quotients, "sampling_share": share})


if __name__ == "__main__":
    main()

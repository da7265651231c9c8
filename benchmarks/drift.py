"""Traffic unlike the calibration: does the server see it, and does a profile made from that traffic bring the error back?

Serves a profile, sends text of one kind, reads fidelity; makes a profile with ``calibrate --from-traffic``; serves that,
sends other text of the same kind, reads again. Kinds: prose, and base64, which no tokenizer or model is at home in.

    python -m benchmarks.drift balanced.spectral --preset balanced
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from vllm_spectral_server.monitor import POLL_SECONDS

from benchmarks.measure import save
from benchmarks.texts import prose
from deploy.process import ServerProcess, command, running

FLAGS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "256M", "--fidelity-every", "4")
REQUESTS = 30


def text(kind: str, index: int) -> str:
    """About a thousand tokens, different for every index."""
    if kind == "prose":
        whole = prose("held-out")
        start = (index * 7919) % (len(whole) - 4000)
        return whole[start : start + 4000]
    return base64.b64encode(random.Random(index).randbytes(1000)).decode()


def visit(server: ServerProcess, kind: str, first: int) -> dict[str, Any]:
    """Send :data:`REQUESTS` requests and sum up what the server says of them."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def ask(index: int) -> None:
        client.completions.create(
            model="demo", prompt=text(kind, index), max_tokens=32, temperature=0, extra_body={"ignore_eos": True}
        )

    # One or two at a time: a step that prefills one prompt is sampled for as much as one that prefills ten.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, range(first, first + REQUESTS)))
    time.sleep(POLL_SECONDS + 1)
    state = server.get("/v1/kv_cache/fidelity")
    layers = [layer for layer in state["layers"] if layer["samples"]]
    return {
        "drift, largest layer": max(layer["drift"] for layer in layers),
        "drift, median": statistics.median(layer["drift"] for layer in layers),
        "error ratio, largest": max(layer["error_ratio"] for layer in layers),
        "error ratio, median": statistics.median(layer["error_ratio"] for layer in layers),
        "output error, median": statistics.median(layer["output_error"] for layer in layers),
        "attention KL, median": statistics.median(layer["attention_kl"] for layer in layers),
        "layers in alarm": len({alarm["layer"] for alarm in state["alarms"]}),
        "layers sampled": len(layers),
        "tokens in moments": min(layer["moment_tokens"] for layer in layers),
        "canary": state["canary"]["state"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "traffic.spectral"

        def serve(profile: str, kind: str, first: int, then: Any) -> dict[str, Any]:
            argv = command("serve", "demo", "--profile", profile, *FLAGS)
            with running(argv, Path(folder) / "log") as server:
                found = visit(server, kind, first)
                then(server)
            return found

        def recalibrate(server: ServerProcess) -> None:
            argv = command(
                "calibrate", "demo", "-o", str(made), "--preset", arguments.preset, "--from-traffic", server.url
            )
            subprocess.run(argv, check=True)

        for name, profile, kind, first, then in (
            ("prose, profile as given", arguments.profile, "prose", 0, lambda _: None),
            ("base64, profile as given", arguments.profile, "base64", 0, recalibrate),
            ("base64, profile from its traffic", str(made), "base64", 1000, lambda _: None),
        ):
            rows[name] = serve(profile, kind, first, then)
            print(name, json.dumps(rows[name], indent=1), flush=True)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()

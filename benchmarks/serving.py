"""Equal memory: stock vLLM and ours with the same bytes for the KV cache, under vLLM's own load generator.

Both servers live, the one that is not measured is stopped (SIGSTOP). Every round asks the same random prompts of both.

    python -m benchmarks.serving balanced.spectral --memory 64M --requests 32 --prompt 1024 --output 128
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.measure import save
from deploy.process import ServerProcess, asleep, awake, command, running
from vllm_spectral.backend.engine import BLOCK_SIZE
from vllm_spectral.models.demo import demo_model

BENCH = "import sys; from vllm.benchmarks.serve import add_cli_args, main; \
from vllm.utils.argparse_utils import FlexibleArgumentParser as P; p = P(); add_cli_args(p); main(p.parse_args())"
STOCK = "import runpy; runpy.run_module('vllm.entrypoints.launchers.api_server.entry', run_name='__main__')"


def stock_server() -> list[str]:
    """VLLM's own server for the demo model, in the shape that ours has by default."""
    model = ["--model", str(demo_model()), "--served-model-name", "demo"]
    return [sys.executable, "-c", STOCK, *model, "--enforce-eager", "--block-size", str(BLOCK_SIZE)]


def bench(server: ServerProcess, arguments: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One run of vLLM's load generator; its JSON result."""
    result = folder / "result.json"
    flags = {
        "--backend": "openai", "--base-url": server.url, "--model": "demo", "--tokenizer": str(demo_model(progress=False)),
        "--dataset-name": "random", "--random-input-len": arguments.prompt, "--random-output-len": arguments.output,
        "--random-range-ratio": 0.0, "--num-prompts": arguments.requests, "--max-concurrency": arguments.requests,
        "--seed": seed, "--result-filename": str(result), "--temperature": 0,
    }  # fmt: skip
    argv = [str(part) for pair in flags.items() for part in pair]
    subprocess.run(
        [sys.executable, "-c", BENCH, *argv, "--ignore-eos", "--save-result", "--disable-tqdm"],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if not arguments.verbose else None,
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(result.read_text())
    assert answer["completed"] == arguments.requests, answer
    assert answer["total_output_tokens"] == arguments.requests * arguments.output, "answers were cut short"
    return answer


def preemptions(server: ServerProcess) -> int:
    text = urllib.request.urlopen(server.url + "/metrics").read().decode()
    found = re.search(r"^vllm:num_preemptions_total\{.*\} ([\d.e+]+)$", text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--memory", default="64M")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    # Random prompts of a range of seeds never share a prefix, and a warm prefix cache would measure something else.
    common = ["--max-model-len", "2048", "--kv-cache-memory-bytes", arguments.memory, "--no-enable-prefix-caching"]
    sides = {
        "stock": [*stock_server(), *common],
        "ours": [*command("serve", "demo", "--profile", arguments.profile), *common],
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        servers = {name: stack.enter_context(running(argv, folder / f"{name}.log")) for name, argv in sides.items()}
        with asleep(servers.values()):
            for turn in range(arguments.rounds):
                for name in ("stock", "ours") if turn % 2 else ("ours", "stock"):
                    with awake(servers[name]) as server:
                        before = preemptions(server)
                        result = bench(server, arguments, turn, folder)
                        preempted = preemptions(server) - before
                    kept = {
                        key: result[key]
                        for key in ("output_throughput", "duration", "median_ttft_ms", "median_tpot_ms", "p99_ttft_ms")
                    }
                    rows[name].append(kept | {"preemptions": preempted})
                    print(f"round {turn + 1} {name}: {rows[name][-1]}", flush=True)
    quotients = [
        a["output_throughput"] / b["output_throughput"] for a, b in zip(rows["ours"], rows["stock"], strict=True)
    ]
    print(f"ours / stock: median {statistics.median(quotients):.2f}, {min(quotients):.2f} to {max(quotients):.2f}")
    save(arguments.json, {"rows": rows, "quotients": quotients})


if __name__ == "__main__":
    main()

"""Does the memory report agree with the kernel? Resident memory of the worker at two sizes of the pool, under the same load.

Everything but the cache is the same in both servers, so that the difference of the processes is that of the pools. The
same 32 requests run in both, all at once.

    python -m benchmarks.accounting balanced.spectral --memory 64M 1G
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI
from vllm_spectral_server.monitor import POLL_SECONDS

from benchmarks.measure import save
from benchmarks.texts import code, prose
from deploy.process import ServerProcess, command, running

EXACT = 8 << 20
"""Size of the exact tier, the same in both."""


def memory(server: ServerProcess) -> dict[str, Any]:
    report: dict[str, Any] = server.get("/v1/kv_cache/memory")
    parts = report["used_bytes"] + report["cached_bytes"] + report["free_bytes"]
    assert parts == report["pool_bytes"] == sum(rank["allocated_bytes"] for rank in report["ranks"])
    return report


def loaded(profile: str, size: str, folder: Path) -> dict[str, Any]:
    """The report after a mixed load of 32 requests."""
    texts = [prose("held-out"), code("held-out")]
    argv = command("serve", "demo", "--profile", profile, "--kv-cache-memory-bytes", size)
    with running([*argv, "--max-model-len", "2048", "--exact-memory-bytes", str(EXACT)], folder / "log") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(index: int) -> None:
            text, length = texts[index % 2], (300, 1200, 3000)[index % 3]
            prompt = text[index * 3000 :][:length]
            client.completions.create(model="demo", prompt=prompt, max_tokens=16 + index, temperature=0)
            memory(server)

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask, range(32)))
        time.sleep(POLL_SECONDS + 1)
        return memory(server)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--memory", nargs=2, default=["64M", "1G"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = (loaded(arguments.profile, size, Path(folder)) for size in arguments.memory)
    accounted = large["resident_bytes"] - small["resident_bytes"]
    grown = sum(r["process_bytes"] for r in large["ranks"]) - sum(r["process_bytes"] for r in small["ranks"])
    print(f"accounted bytes: {accounted:,} more; resident: {grown:,} more; quotient {grown / accounted:.4f}")
    save(arguments.json, {"accounted": accounted, "grown": grown, "memory": arguments.memory})


if __name__ == "__main__":
    main()

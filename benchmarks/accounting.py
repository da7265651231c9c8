"""Does the server's memory report agree with the kernel? Resident growth of the worker against pages that were written.

After a warm-up (which grows what is not the cache) a mixed load of concurrent requests fills the pool; pages, once written,
stay resident.

    python -m benchmarks.accounting balanced.spectral --memory 256M
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.measure import save
from benchmarks.texts import code, prose
from deploy.process import ServerProcess, command, running


def memory(server: ServerProcess) -> dict[str, Any]:
    report: dict[str, Any] = json.load(urllib.request.urlopen(server.url + "/v1/kv_cache/memory"))
    parts = report["used_bytes"] + report["cached_bytes"] + report["free_bytes"]
    assert parts == report["pool_bytes"] == sum(rank["allocated_bytes"] for rank in report["ranks"])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--memory", default="256M")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    texts = [prose("held-out"), code("held-out")]
    argv = command("serve", "demo", "--profile", arguments.profile, "--kv-cache-memory-bytes", arguments.memory)
    with (
        tempfile.TemporaryDirectory() as folder,
        running([*argv, "--max-model-len", "4096"], Path(folder) / "log") as server,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(index: int) -> None:
            text, length = texts[index % 2], (600, 2500, 6000)[index % 3]
            start = (index * 7919) % (len(text) - length)
            client.completions.create(
                model="demo",
                prompt=f"{index}: {text[start : start + length]}",
                max_tokens=16 + index % 48,
                temperature=0,
            )

        with ThreadPoolExecutor(arguments.clients) as pool:
            list(pool.map(ask, range(arguments.clients)))
            rows = [memory(server)]
            batch = 0
            while rows[-1]["free_bytes"] > 0.1 * rows[-1]["pool_bytes"]:
                batch += 1
                list(pool.map(ask, range(batch * arguments.clients, (batch + 1) * arguments.clients)))
                rows.append(memory(server))
                first, last = rows[0], rows[-1]
                written = (last["used_bytes"] + last["cached_bytes"]) - (first["used_bytes"] + first["cached_bytes"])
                grown = sum(r["process_bytes"] for r in last["ranks"]) - sum(r["process_bytes"] for r in first["ranks"])
                print(
                    f"{arguments.clients * (batch + 1)} requests: pages written since the warm-up {written:,} bytes, "
                    f"resident growth {grown:,}, quotient {grown / written:.3f}", flush=True,
                )  # fmt: skip
    save(arguments.json, {"written": written, "grown": grown, "pool": last["pool_bytes"]})


if __name__ == "__main__":
    main()

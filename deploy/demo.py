"""The main job from end to end: calibrate, serve, ask, show what the cache costs, stop."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from deploy.process import command, running

QUESTION = "Name the capital of France."
POOL = "256M"
console = Console()


def main() -> int:
    """Run the demo; returns 0 if the model answered from compressed pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="made if it does not exist")
    parser.add_argument("--bits", default="4.0", help="bits per KV element (4.0)")
    args = parser.parse_args()
    if not args.profile.exists():
        console.rule("1. calibrate: the model measures itself, no data set needed")
        subprocess.run(command("calibrate", "demo", "-o", str(args.profile), "--bits", args.bits), check=True)
    console.rule("2. serve: stock vLLM, KV cache in compressed pages")
    with _server(args.profile) as url:
        console.rule("3. ask: the openai client, streaming")
        answer = _ask(url)
        console.rule("4. what the cache costs: GET /v1/kv_cache/memory")
        _show_memory(httpx.get(f"{url}/v1/kv_cache/memory").raise_for_status().json())
    if "Paris" not in answer:
        console.print("the answer does not name Paris", style="red")
        return 1
    return 0


@contextlib.contextmanager
def _server(profile: Path) -> Iterator[str]:
    flags = ["--kv-cache-memory-bytes", POOL, "--max-model-len", "8192"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        with console.status("starting the server (about 30 s)"):
            argv = command("serve", "demo", "--profile", str(profile), *flags)
            server = stack.enter_context(running(argv, Path(folder) / "server.log"))
        console.print(f"serving on {server.url}")
        yield server.url


def _ask(url: str) -> str:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    console.print(f"[bold]user:[/bold] {QUESTION}")
    console.print("[bold]demo:[/bold] ", end="")
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], max_tokens=64, temperature=0, stream=True
    )
    answer = ""
    for chunk in stream:
        text = chunk.choices[0].delta.content or ""
        answer += text
        console.print(text, end="")
    console.print()
    return answer


def _show_memory(memory: dict[str, float]) -> None:
    given = memory["pool_bytes"] + memory["exact_tier_bytes"]
    table = Table(title=f"{given / 2**20:.0f} MiB for the KV cache")
    for column in ("", "stock bf16", "spectral"):
        table.add_column(column, justify="right")
    table.add_row(
        "tokens that fit", f"{memory['uncompressed_capacity_tokens']:,}", f"[bold]{memory['capacity_tokens']:,}[/bold]"
    )
    table.add_row("bytes per token", f"{memory['uncompressed_bytes_per_token']:,}", f"{memory['bytes_per_token']:,}")
    table.add_row("bits per element", "16", f"{16 / memory['compression_ratio']:.2f}")
    table.add_row("compression", "1.00 x", f"{memory['compression_ratio']:.2f} x")
    table.add_row("kept exact beside it", "", f"{memory['exact_tier_bytes'] / 2**20:.1f} MiB")
    table.add_row("with everything resident", "", f"{memory['effective_compression_ratio']:.2f} x")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

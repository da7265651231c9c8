"""A healthy server under mixed traffic for a while: does it ever raise an alarm, or stop being ready?

Usage: ``python -m benchmarks.soak balanced.spectral --minutes 20``
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.measure import save
from benchmarks.texts import code, prose
from deploy.process import command, running

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain recursion.",
    "Translate 'good morning'.",
)


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    texts, end = [prose("held-out"), code("held-out")], time.monotonic() + 60 * arguments.minutes
    asked = [0] * arguments.clients
    alarms: dict[str, int] = {}
    not_ready = checks = 0
    argv = command("serve", "demo", "--profile", arguments.profile, "--kv-cache-memory-bytes", "256M")
    with (
        tempfile.TemporaryDirectory() as folder,
        running([*argv, "--max-model-len", "4096"], Path(folder) / "log") as server,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def visit(index: int) -> None:
            draw = random.Random(index)
            while time.monotonic() < end:
                if draw.random() < 0.3:
                    question = [{"role": "user", "content": draw.choice(QUESTIONS)}]
                    client.chat.completions.create(model="demo", messages=question, max_tokens=100)  # type: ignore[arg-type]
                else:
                    text = draw.choice(texts)
                    start = draw.randrange(len(text) - 8000)
                    prompt = text[start : start + draw.choice((200, 1500, 8000))]
                    client.completions.create(model="demo", prompt=prompt, max_tokens=draw.choice((8, 64, 200)))
                asked[index] += 1
                time.sleep(draw.random() * 2)

        threads = [threading.Thread(target=visit, args=(index,)) for index in range(arguments.clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            checks += 1
            not_ready += get(server.url + "/ready")[0] != 200
            for alarm in get(server.url + "/v1/kv_cache/fidelity")[1]["alarms"]:
                alarms[alarm["message"]] = alarms.get(alarm["message"], 0) + 1
            time.sleep(1)
        for thread in threads:
            thread.join()
        state = get(server.url + "/v1/kv_cache/fidelity")[1]
    result = {
        "minutes": arguments.minutes, "requests": sum(asked), "checks": checks, "not_ready": not_ready, "alarms": alarms,
        "canaries": state["canary"]["runs"], "canary_failures": state["canary"]["failures"],
        "sampled_steps": state["sampled_steps"],
        "largest_error_ratio": max((layer["error_ratio"] or 0.0) for layer in state["layers"]),
        "largest_drift": max((layer["drift"] or 0.0) for layer in state["layers"]),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    save(arguments.json, result)


if __name__ == "__main__":
    main()

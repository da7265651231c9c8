"""Build the CPU image, run it with every right taken away, talk to it, stop it. Ends with one line of figures.

The container runs as a uid without an account, in group 0, with a read-only root, without capabilities. It calibrates the
model that was baked in, serves it and is asked over the OpenAI API.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from deploy.containers import Engine, concluded, find_engine, say
from deploy.demo import QUESTION
from deploy.image import add_arguments, build

TAG = "localhost/vllm-spectral:test"
NAME = "vllm-spectral-image-test"
KEY = "image-test"
UID = 12345
READY_SECONDS = 600
STOP_SECONDS = 40
HEALTHCHECK = "/usr/share/vllm-spectral/healthcheck.py"
CONFINED = [
    "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", f"{UID}:0",
    "--shm-size", "512m",  # vLLM asks for 160 MiB; 64 is what a container has by default
]  # fmt: skip
_LIST = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """What the tests of an image take."""
    add_arguments(parser)
    parser.add_argument("--image", help="test this one, with the embedded model inside, instead of building one")


def built(engine: Engine, arguments: argparse.Namespace) -> tuple[str, float]:
    """The image to test, and the seconds it took to build."""
    if arguments.image:
        return arguments.image, 0.0
    flags = {"base": arguments.base, "torch_index": arguments.torch_index, "verbose": arguments.verbose}
    return TAG, build(engine, tag=TAG, demo_model=True, **flags)


def check(holds: object, what: str) -> None:
    """Say what holds; raise if it does not."""
    if not holds:
        raise AssertionError(f"does not hold: {what}")
    say(f"ok: {what}")


def examine(engine: Engine, tag: str) -> None:
    """What can be said of the image without a server."""
    known = engine.inspect(tag)["Config"]
    labels = known["Labels"]
    check(labels["org.opencontainers.image.licenses"] == "Apache-2.0", "labels: licence")
    check(
        labels["org.opencontainers.image.revision"] != "unknown",
        f"labels: revision {labels['org.opencontainers.image.revision'][:12]}",
    )
    check(known["User"] == "10001:0", "the user is not root unless one asks for it")
    check(
        not any(key in entry for entry in known["Env"] for key in ("PIP_", "INDEX")),
        "no package index in the environment",
    )
    bill = json.loads(engine.once(["--entrypoint", "cat"], tag, labels["vllm-spectral.sbom"]))
    listed = {part["name"].lower(): part["version"] for part in bill["components"]}
    installed = json.loads(engine.once(["--entrypoint", "python3"], tag, "-c", _LIST))
    missing = {name for name, version in installed.items() if listed.get(name.lower()) != version}
    check(
        bill["bomFormat"] == "CycloneDX" and not missing,
        f"SBOM lists all {len(installed)} distributions with their versions",
    )
    tools = engine.once(["--entrypoint", "sh"], tag, "-c", "command -v gcc g++ cc pip pip3 curl || true")
    check(not tools, "neither compiler nor pip nor curl inside")


def wait_ready(engine: Engine, url: str) -> float:
    """Seconds until ``/ready`` answers 200."""
    start = time.monotonic()
    while time.monotonic() - start < READY_SECONDS:
        state = engine.inspect(NAME)["State"]
        if not state["Running"]:
            break
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return time.monotonic() - start
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"the container was not ready; the end of its log:\n{engine.logs(NAME)[-6000:]}")


def ask(url: str) -> str:
    """The answer to the usual question; also one under a grammar, and what the cache costs."""
    client = OpenAI(base_url=f"{url}/v1", api_key=KEY)
    question: Any = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(
        model="demo", messages=question, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2
    )
    text = (answer.choices[0].message.content or "").strip()
    check("Paris" in text, f"the model answers: {text!r}")
    tokens = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
    check(tokens and len(tokens[0].top_logprobs) == 2, "with log-probabilities, for which vLLM would like a compiler")
    schema = {"type": "object", "properties": {"capital": {"enum": ["Paris", "Rome"]}}, "required": ["capital"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    structured = client.chat.completions.create(
        model="demo", messages=question, max_tokens=40, temperature=0, response_format=form
    )
    found = json.loads(structured.choices[0].message.content or "")
    check(found["capital"] in ("Paris", "Rome"), f"structured output: {found}")
    check(httpx.get(f"{url}/v1/kv_cache/memory").status_code == 401, "no figures without the key")
    memory = (
        httpx.get(f"{url}/v1/kv_cache/memory", headers={"Authorization": f"Bearer {KEY}"}).raise_for_status().json()
    )
    parts = memory["used_bytes"] + memory["cached_bytes"] + memory["free_bytes"]
    check(parts == memory["pool_bytes"] > 0, f"cache: {memory['compression_ratio']:.1f} x, kernels {memory['kernels']}")
    return text


def inside(engine: Engine) -> None:
    """What the running container is allowed."""
    identity = engine.call("exec", NAME, "sh", "-c", "id -u; id -g; grep CapEff /proc/self/status").split()
    check(identity[:2] == [str(UID), "0"] and int(identity[3], 16) == 0, f"uid {UID}, group 0, no capabilities")
    maps = "for maps in /proc/[0-9]*/maps; do grep -q libtorch_cpu $maps && grep -q libtcmalloc $maps && echo yes; done; true"
    check("yes" in engine.call("exec", NAME, "sh", "-c", maps), "the engine allocates with tcmalloc")
    for path in ("/", "/opt/venv", "/usr/share/vllm-spectral"):
        refused = engine.call("exec", NAME, "sh", "-c", f"touch {path}/x 2>/dev/null && echo written || echo refused")
        check(refused == "refused", f"{path} cannot be written")
    check("ready (HTTP 200)" in engine.call("exec", NAME, "python3", HEALTHCHECK), "the health script says ready")
    if engine.name == "podman":  # it has a command for what the engine does at intervals
        engine.call("healthcheck", "run", NAME)
        say("ok: HEALTHCHECK passes")


def stop(engine: Engine) -> float:
    """Seconds from SIGTERM to the end."""
    start = time.monotonic()
    engine.call("stop", "--time", "60", NAME)
    seconds = time.monotonic() - start
    code = engine.inspect(NAME)["State"]["ExitCode"]
    check(seconds < STOP_SECONDS and code == 0, f"SIGTERM ends it in {seconds:.1f} s with status {code}")
    return seconds


def test(engine: Engine, tag: str, port: int) -> str:
    """Everything but the build; the line of figures."""
    examine(engine, tag)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        mount = ["--volume", f"{folder}:/profiles"]
        start = time.monotonic()
        engine.once(
            [*CONFINED, *mount], tag, "calibrate", "demo", "-o", "/profiles/demo.spectral", "--preset", "instant"
        )
        check(
            (Path(folder) / "demo.spectral").stat().st_uid == UID,
            f"calibrated inside in {time.monotonic() - start:.0f} s",
        )
        flags = [*CONFINED, *mount, "--publish", f"127.0.0.1:{port}:8000", "--env", f"VLLM_API_KEY={KEY}"]
        argv = ["serve", "demo", "--profile", "/profiles/demo.spectral"]
        try:
            engine.start(
                NAME,
                flags,
                tag,
                *argv,
                "--max-model-len",
                "2048",
                "--kv-cache-memory-bytes",
                "64M",
            )
            early = engine.call("exec", NAME, "sh", "-c", f"python3 {HEALTHCHECK} 2>&1; echo status $?")
            check("no answer" in early and early.endswith("status 1"), "the health script says so while nobody answers")
            ready = wait_ready(engine, url)
            say(f"ok: ready after {ready:.0f} s")
            text = ask(url)
            inside(engine)
            stopped = stop(engine)
        finally:
            engine.remove(NAME)
    size = engine.inspect(tag)["Size"] / 1e9
    return f"image {size:.2f} GB (model included), ready in {ready:.0f} s, stopped in {stopped:.1f} s, answer: {text!r}"


def main() -> int:
    """Build and test; 0, 1 if something does not hold, 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_test_arguments(parser)
    parser.add_argument("--port", type=int, default=18080, help="where the container listens (%(default)s)")
    arguments = parser.parse_args()

    def work() -> str:
        engine = find_engine()
        tag, seconds = built(engine, arguments)
        figures = test(engine, tag, arguments.port)
        return f"image-test: {f'built in {seconds:.0f} s; ' if seconds else ''}{figures}"

    return concluded(work)


if __name__ == "__main__":
    sys.exit(main())

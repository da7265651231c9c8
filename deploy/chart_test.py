"""``make chart-test``: the chart against every Kubernetes it is for, and its pod run for real on this machine.

A kubelet in miniature: commands, arguments, environment, probes, the preStop hook and the helm test are run as the chart
renders them. Without an image they run as processes, with directories for volumes. With ``--image`` they run in it, with the
rights, the user and the limits of memory that the chart gives them, as far as docker or podman can stand in for a kubelet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from deploy.chart import CASES, VERSIONS, Manifest, render, validate
from deploy.containers import Engine, MissingToolError, find_engine, say
from deploy.process import free_port
from vllm_spectral.models.demo import cache_directory

KEY = "a-key-of-the-test"
VALUES: dict[str, Any] = {
    "profile": {"preset": "instant"},
    "kvCache": {"size": "128Mi"},
    "auth": {"existingSecret": "keys", "protectAll": True},
    "shutdown": {"drainSeconds": 10, "deregisterSeconds": 1},
    "extraArgs": ["--max-model-len", "2048"],
}
"""The embedded model, a profile that is made in seconds, and a key for everything."""
IMAGE_ENVIRONMENT = {"HOME": "/cache", "XDG_CACHE_HOME": "/cache", "VLLM_CACHE_ROOT": "/cache/vllm"}
"""What the image sets (``deploy/Dockerfile.cpu``), as far as it matters outside of it."""
READY_URL = "VLLM_SPECTRAL_READY_URL"


class Node(Protocol):
    """Where a pod runs.

    Attributes:
        url: of the server, from here.
    """

    url: str

    def once(self, container: Manifest, environment: Mapping[str, str] = {}) -> tuple[int, str]:
        """Run a container to its end: status and output."""

    def start(self, container: Manifest) -> None:
        """Start a container."""

    def inside(self, command: Sequence[str]) -> int:
        """Run a command in the container that was started; its status."""

    def alive(self) -> bool:
        """Whether it still runs."""

    def terminate(self, grace: float) -> int | None:
        """Tell it to stop; its status, or None if it did not in time."""

    def log(self) -> str:
        """What it wrote."""

    def clean(self) -> None:
        """Leave nothing running."""


def environment_of(container: Manifest) -> dict[str, str]:
    """A container's variables; the test's key for every secret."""
    return {each["name"]: each.get("value", KEY) for each in container.get("env", [])}


class Processes(Node):
    """Containers as processes of this machine: paths of volumes become directories below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root, self._port = root, free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._started: subprocess.Popen[bytes] | None = None
        self._container: Manifest = {}

    def _here(self, word: str) -> str:
        for mount in ("/cache/", "/profile/"):
            word = word.replace(mount, f"{self._root}{mount}")
        word = word.replace("/usr/share/vllm-spectral", str(Path(__file__).parent))
        return {"8000": str(self._port), "0.0.0.0": "127.0.0.1"}.get(word, word)

    def _environment(self, container: Manifest) -> dict[str, str]:
        values = {name: value.replace("/cache", f"{self._root}/cache") for name, value in IMAGE_ENVIRONMENT.items()}
        # Nothing of ours but where programs are, and the embedded model, which is unpacked once.
        values |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "VLLM_SPECTRAL_CACHE": str(cache_directory()),
            READY_URL: f"{self.url}/ready",
        }
        return values | environment_of(container)

    def _words(self, container: Manifest) -> list[str]:
        words = [
            self._here(word) for word in [*container.get("command", ["vllm-spectral"]), *container.get("args", [])]
        ]
        return [shutil.which(words[0], path=self._environment(container)["PATH"]) or words[0], *words[1:]]

    @override
    def once(self, container: Manifest, environment: Mapping[str, str] = {}) -> tuple[int, str]:
        variables = self._environment(container) | {READY_URL: f"{self.url}/ready"} | dict(environment)
        done = subprocess.run(self._words(container), env=variables, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    @override
    def start(self, container: Manifest) -> None:
        self._container = container
        with (self._root / "server.log").open("wb") as log:
            self._started = subprocess.Popen(
                self._words(container), env=self._environment(container), stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @override
    def inside(self, command: Sequence[str]) -> int:
        words = [self._here(word) for word in command]
        return subprocess.run(
            words, env=self._environment(self._container), capture_output=True, check=False
        ).returncode

    @override
    def alive(self) -> bool:
        return self._started is not None and self._started.poll() is None

    @override
    def terminate(self, grace: float) -> int | None:
        assert self._started is not None
        self._started.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._started.wait(grace)
        return None

    @override
    def log(self) -> str:
        file = self._root / "server.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @override
    def clean(self) -> None:
        if self._started is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._started.pid, signal.SIGKILL)
            self._started.wait()


class Containers(Node):
    """Containers of an image, as the chart renders them, word for word; ports are published on this machine alone."""

    NAME = "vllm-spectral-chart-test"

    def __init__(self, root: Path, engine: Engine, image: str, pod: Manifest) -> None:
        self._root, self._engine, self._image, self._pod = root, engine, image, pod
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def _flags(self, container: Manifest) -> list[str]:
        pod, own = self._pod["securityContext"], container["securityContext"]
        flags = ["--user", f"{pod['runAsUser']}:{pod['runAsGroup']}"]
        flags += [flag for capability in own["capabilities"]["drop"] for flag in ("--cap-drop", capability)]
        flags += ["--read-only"] * own["readOnlyRootFilesystem"]
        flags += [] if own["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        flags += ["--memory", container["resources"]["limits"]["memory"].replace("i", "").lower()]
        volumes = {volume["name"]: volume for volume in self._pod["volumes"]}
        for mount in container.get("volumeMounts", []):
            folder = volumes[mount["name"]]["emptyDir"]
            if folder.get("medium") == "Memory":
                flags += ["--tmpfs", f"{mount['mountPath']}:size={folder['sizeLimit'].replace('i', '').lower()}"]
                continue
            path = self._root / mount["name"]
            path.mkdir(exist_ok=True)
            path.chmod(0o777)  # a kubelet gives it to the pod's fsGroup
            flags += ["--volume", f"{path}:{mount['mountPath']}"]
        return flags

    def _argv(self, container: Manifest, environment: Mapping[str, str]) -> tuple[list[str], list[str]]:
        variables = environment_of(container) | dict(environment)
        flags = [*self._flags(container), *(f"--env={name}={value}" for name, value in variables.items())]
        command = container.get("command", [])
        flags += ["--entrypoint", command[0]] if command else []
        return flags, [*command[1:], *container.get("args", [])]

    @override
    def once(self, container: Manifest, environment: Mapping[str, str] = {}) -> tuple[int, str]:
        flags, words = self._argv(container, environment)
        # The helm test reaches the server over the cluster's network; here it shares the server's.
        network = [f"--network=container:{self.NAME}"] if READY_URL in environment else []
        try:
            return 0, self._engine.once([*network, *flags], self._image, *words)
        except RuntimeError as error:
            return 1, str(error)

    @override
    def start(self, container: Manifest) -> None:
        flags, words = self._argv(container, {})
        self._engine.start(self.NAME, [*flags, "--publish", f"127.0.0.1:{self._port}:8000"], self._image, *words)

    @override
    def inside(self, command: Sequence[str]) -> int:
        try:
            self._engine.call("exec", self.NAME, *command)
        except RuntimeError:
            return 1
        return 0

    @override
    def alive(self) -> bool:
        return bool(self._engine.inspect(self.NAME)["State"]["Running"])

    @override
    def terminate(self, grace: float) -> int | None:
        start = time.monotonic()
        self._engine.call("stop", "--time", str(int(grace)), self.NAME)
        late = time.monotonic() - start > grace
        return None if late else int(self._engine.inspect(self.NAME)["State"]["ExitCode"])

    @override
    def log(self) -> str:
        return self._engine.logs(self.NAME)

    @override
    def clean(self) -> None:
        self._engine.remove(self.NAME)


def get(url: str, *, key: bool = False, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
    """Status and body of a request; status 0 if nobody answers."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {KEY}"} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content = response.read()
            return response.status, json.loads(content) if content.startswith(b"{") else content.decode()
    except urllib.error.HTTPError as error:
        return error.code, None
    except OSError:
        return 0, None


def check(holds: object, what: str) -> None:
    """Say what holds; raise if it does not."""
    if not holds:
        raise AssertionError(f"does not hold: {what}")
    say(f"ok: {what}")


def passes(node: Node, probe: Mapping[str, Any]) -> bool:
    """One attempt of a probe."""
    if "exec" in probe:
        return node.inside(probe["exec"]["command"]) == 0
    return 200 <= get(node.url + probe["httpGet"]["path"], timeout=probe["timeoutSeconds"])[0] < 400


def until(node: Node, what: Callable[[], bool], attempts: int) -> float:
    """Seconds until something holds; asked every second, so often at most."""
    start = time.monotonic()
    for _ in range(attempts):
        if what():
            return time.monotonic() - start
        if not node.alive():
            break
        time.sleep(1)
    raise AssertionError(f"a probe did not pass in {time.monotonic() - start:.0f} s")


def validate_all() -> str:
    """Every manifest of every case against every version; what that was."""
    count = 0
    for name, values in CASES.items():
        manifests = render(values)
        for version in VERSIONS:
            for manifest in manifests:
                validate(manifest, version)
        count += len(manifests)
        say(f"ok: {name}: {len(manifests)} manifests, valid for Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}")
    return f"{count} manifests of {len(CASES)} cases valid for {len(VERSIONS)} versions of Kubernetes"


def run_pod(node: Node, manifests: Mapping[str, Manifest]) -> str:
    """The pod from its init container to its end; what that took."""
    spec = manifests["Deployment"]["spec"]["template"]["spec"]
    (calibrate,), (server,) = spec["initContainers"], spec["containers"]
    start = time.monotonic()
    status, output = node.once(calibrate)
    calibrated = time.monotonic() - start
    check(status == 0, f"the init container makes a profile ({calibrated:.0f} s)" + (output[-3000:] if status else ""))
    check("nothing to do" in node.once(calibrate)[1], "and leaves one that is there alone")
    node.start(server)
    startup, liveness, readiness = (server[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    up = until(node, lambda: passes(node, startup), startup["failureThreshold"] * startup["periodSeconds"])
    check(passes(node, liveness), f"startup probe after {up:.0f} s, liveness probe")
    until(node, lambda: passes(node, readiness), 60)
    say("ok: readiness probe, with the key")
    (test,) = manifests["Pod"]["spec"]["containers"]
    here = {READY_URL: f"{node.url}/ready" if isinstance(node, Processes) else "http://127.0.0.1:8000/ready"}
    status, output = node.once(test, here)
    check(status == 0, f"helm test {output if status else ''}")
    for path in ("/v1/models", "/ready", "/metrics"):
        check((get(node.url + path)[0], get(node.url + path, key=True)[0]) == (401, 200), f"{path} asks for the key")
    question = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    status, answer = get(f"{node.url}/v1/completions", key=True, body=question)
    check(status == 200 and answer["choices"][0]["text"].startswith(" Paris"), "it answers")
    report = get(f"{node.url}/v1/kv_cache/memory", key=True)[1]
    size = report["pool_bytes"] + report["exact_tier_bytes"]
    check(0.98 < size / (128 << 20) <= 1, f"pages and copies take kvCache.size: {size:,} bytes")
    start, grace = time.monotonic(), spec["terminationGracePeriodSeconds"]
    check(node.inside(server["lifecycle"]["preStop"]["exec"]["command"]) == 0, "preStop hook")
    ended = node.terminate(grace - (time.monotonic() - start))
    stopped = time.monotonic() - start
    check(ended == 0, f"it stops within its grace period, {stopped:.0f} of {grace} s, status {ended}")
    return f"calibrated in {calibrated:.0f} s, was up after {up:.0f} s, answered, stopped in {stopped:.0f} s"


def main() -> int:
    """Everything; 0, 1 if something does not hold, 2 if something is missing. One line at the end."""
    parser = argparse.ArgumentParser(prog="python -m deploy.chart_test", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--image", help="run the pod in this image, with the embedded model inside (`make image-test`)")
    arguments = parser.parse_args()
    manifests = {manifest["kind"]: manifest for manifest in render(VALUES)}
    with tempfile.TemporaryDirectory(prefix="chart-test-", ignore_cleanup_errors=True) as folder:
        root, node = Path(folder), None
        for volume in ("cache", "profile"):
            (root / volume).mkdir()
        try:
            valid = validate_all()
            pod = manifests["Deployment"]["spec"]["template"]["spec"]
            node = Containers(root, find_engine(), arguments.image, pod) if arguments.image else Processes(root)
            took = run_pod(node, manifests)
        except MissingToolError as missing:
            print(f"chart-test: {missing}", file=sys.stderr)
            return 2
        except (AssertionError, RuntimeError) as wrong:
            print(f"{node.log()[-4000:] if node else ''}\nchart-test: {wrong}", file=sys.stderr)
            return 1
        finally:
            if node is not None:
                node.clean()
    print(f"chart-test: {valid}; the pod, {arguments.image or 'as processes'}, {took}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

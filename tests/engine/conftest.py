"""One calibration, one server and a handful of engines, shared by all engine tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from benchmarks.texts import write as write_texts
from deploy.process import START_SECONDS, running
from deploy.process import command as cli
from tests.environment import BATCH_INVARIANT
from vllm_spectral.backend.engine import cpu_dtype
from vllm_spectral.models.demo import demo_model

POOL_BYTES = 128 << 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "engine" in item.path.parts:
            item.add_marker(pytest.mark.engine)
    # The shared server works every ten seconds and lives until the end: what does without it runs before, undisturbed.
    # What needs no calibration runs before that, while another process makes it.
    items.sort(key=lambda item: ("served" in item.path.parts, "calibrated" in getattr(item, "fixturenames", ())))


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="session")
def demo() -> Path:
    return demo_model(progress=False)


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The default profile of the demo model, made by the command as a user would; once for several test processes."""
    base = tmp_path_factory.getbasetemp()
    path = (base if worker_id == "master" else base.parent) / "demo.spectral"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            result = subprocess.run(
                cli("calibrate", "demo", "-o", str(path)), capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, result.stderr[-4000:]
    return path


@pytest.fixture(scope="session")
def texts(work: Path) -> dict[str, Path]:
    """Held-out text that every Python brings: technical prose and code."""
    return write_texts("held-out", work)


class Runner:
    """``runner.py`` as a child process; asked for one engine after the other.

    Args:
        environment: variables added to ours.
    """

    def __init__(self, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("runner.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"} | environment,
        )  # fmt: skip

    def run(self, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The answer to a request; see ``runner.py``. Its log is in the message if it fails."""
        files = {name: folder / f"engine.{name}" for name in ("answer", "log", "pid")}
        request |= {name: str(file) for name, file in files.items()}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        timer = threading.Timer(START_SECONDS, self._give_up, [files["pid"]])
        timer.start()
        status = self._process.stdout.readline().strip()
        timer.cancel()
        self._give_up(files["pid"])
        assert status == "0", files["log"].read_text()[-6000:]
        answer: dict[str, Any] = json.loads(files["answer"].read_text())
        return answer

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _give_up(self, pid: Path) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture(scope="session")
def run_engine(demo: Path, work: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run ``runner.py``; see there. In the dtype that the command would choose on this machine."""
    shared: list[Runner] = []

    def run(
        rounds: list[list[Any]],
        *,
        model: Path | None = None,
        spectral: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        max_tokens: int = 32,
        **options: Any,
    ) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "dtype": cpu_dtype(),
            "max_model_len": 2048,
            "max_num_batched_tokens": 4096,
            "kv_cache_memory_bytes": POOL_BYTES,
            "enable_prefix_caching": False,
        }
        products: dict[str, str] = {}
        if spectral is not None:
            defaults["additional_config"] = {"spectral": spectral}
            products = BATCH_INVARIANT
        request = {
            "model": str(model or demo), "options": defaults | options, "rounds": rounds, "max_tokens": max_tokens,
            "environment": products | (environment or {}),
        }  # fmt: skip
        if "TRITON_INTERPRET" in request["environment"]:
            # Triton reads it when it is imported.
            with contextlib.closing(Runner(**request["environment"])) as runner:
                return runner.run(request, work)
        if not shared:
            shared.append(Runner())
        return shared[0].run(request, work)

    yield run
    for runner in shared:
        runner.close()


@dataclass
class Server:
    """A running server, its address, its key and its log."""

    url: str
    key: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str, key: str | None = None) -> tuple[int, Any]:
        """Status and body of a GET; the body is parsed if it is JSON."""
        request = urllib.request.Request(self.url + path)
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        with contextlib.suppress(ValueError):
            return status, json.loads(body)
        return status, body.decode()


@contextlib.contextmanager
def serving(
    profile: Path, log: Path, *flags: str, port: int = 0, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """``vllm-spectral serve demo``, as a user starts it."""
    argv = cli("serve", "demo", "--profile", str(profile), "--api-key", "secret", "--max-model-len", "2048")
    argv += ["--kv-cache-memory-bytes", str(POOL_BYTES), *flags]
    with running(argv, log, environment, port) as process:
        yield Server(process.url, "secret", log, process.process)

"""Dockerfiles, compose files and the health script, without a container engine. ``make image-test`` runs the real thing."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.containers import ROOT
from deploy.monitoring import COMPOSE

DOCKERFILES = sorted([*ROOT.glob("deploy/Dockerfile.*"), COMPOSE / "Dockerfile.router"])
HEALTHCHECK = ROOT / "deploy" / "healthcheck.py"
BIN = Path(sys.executable).parent
NEEDED = {"VLLM_API_KEY": "key", "GRAFANA_PASSWORD": "password"}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    done = subprocess.run([BIN / "hadolint", file], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_every_copied_path_reaches_the_build(file: Path) -> None:
    """What .dockerignore keeps out cannot be copied, and fails minutes into a build."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", file.read_text(), re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
            assert any(source.startswith(path) for path in kept), source


def compose(file: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    argv = [BIN / "docker-compose", "-f", COMPOSE / file, "config", "--format", "json"]
    plain = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(argv, env=plain | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("file", ["compose.yaml", "replicas.yaml"])
def test_compose_accepts_the_file_and_the_server_is_confined(file: str) -> None:
    done = compose(file, NEEDED)
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    servers = [name for name in services if name in ("server", "replica-1", "replica-2", "calibrate", "router")]
    assert len(servers) >= 2
    for name in servers:
        assert services[name]["read_only"] and services[name]["cap_drop"] == ["ALL"], name
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert published and all(port["host_ip"] == "127.0.0.1" for port in published)


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_compose_asks_for_secrets_instead_of_having_defaults(missing: str) -> None:
    done = compose("compose.yaml", {name: value for name, value in NEEDED.items() if name != missing})
    assert done.returncode != 0
    assert missing in done.stderr


def test_a_misspelled_key_is_refused(tmp_path: Path) -> None:
    wrong = yaml.safe_load((COMPOSE / "common.yaml").read_text())
    wrong["services"]["server"]["read_olny"] = True
    (tmp_path / "common.yaml").write_text(yaml.safe_dump(wrong))
    argv = [BIN / "docker-compose", "-f", tmp_path / "common.yaml", "config", "-q"]
    done = subprocess.run(argv, env=os.environ | NEEDED, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "read_olny" in done.stderr


class Answers(http.server.BaseHTTPRequestHandler):
    """Ready or not, by path; writes down who asked."""

    keys: list[str | None] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        status, body = {"/ready": (200, b"{}"), "/canary": (503, b'{"reason": "the canary died"}')}.get(
            self.path, (500, b"<")
        )
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def health(url: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"VLLM_SPECTRAL_READY_URL": url, "http_proxy": "http://127.0.0.1:9"} | variables
    return subprocess.run(
        [sys.executable, "-I", HEALTHCHECK], env=environment, capture_output=True, text=True, check=False, timeout=30
    )


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/ready", 0, "ready (HTTP 200)"),
        ("/canary", 1, "not ready (HTTP 503): the canary died"),
        ("/other", 1, "not ready (HTTP 500): the answer does not say why"),
    ],
)
def test_the_health_script(answers: str, path: str, status: int, said: str) -> None:
    done = health(answers + path)
    assert (done.returncode, (done.stdout + done.stderr).strip()) == (status, said)


def test_the_health_script_sends_the_key(answers: str) -> None:
    Answers.keys.clear()
    health(answers + "/ready", VLLM_API_KEY="secret")
    assert Answers.keys == ["Bearer secret"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/ready", "nonsense"])
def test_the_health_script_says_where_it_asked_in_vain(url: str) -> None:
    done = health(url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert url in done.stderr

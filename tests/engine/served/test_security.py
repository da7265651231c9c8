"""What tenants and strangers learn from the real server: nothing of each other, nothing of the machine."""

from __future__ import annotations

import re
from typing import Any

import pytest
import requests

from deploy.process import ServerProcess
from tests.engine.conftest import Server
from tests.fuzz.server import fuzz


def ask(server: Server, path: str, body: dict[str, Any] | None = None, key: str | None = "secret") -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    headers["Origin"] = "http://elsewhere.example"
    return requests.request("POST" if body else "GET", server.url + path, json=body, headers=headers, timeout=60)


def prefix_hits(server: Server) -> int:
    """Tokens that were found in the prefix cache since the start."""
    found = re.search(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", ask(server, "/metrics").text, re.MULTILINE)
    assert found
    return int(float(found[1]))


def test_a_cache_salt_keeps_tenants_apart(server: Server) -> None:
    """Without a salt, a hit would tell a tenant that another one had sent the same prompt."""
    prompt = "The minutes of our confidential meeting, in full. " * 30

    def hits(**salt: str) -> tuple[int, str]:
        before = prefix_hits(server)
        body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0} | salt
        answer = ask(server, "/v1/completions", body)
        assert answer.status_code == 200
        return prefix_hits(server) - before, answer.json()["choices"][0]["text"]

    first, text = hits(cache_salt="tenant-a")
    assert first == 0
    again, same = hits(cache_salt="tenant-a")
    assert again > 200
    for other in ({"cache_salt": "tenant-b"}, {}):
        none, theirs = hits(**other)
        assert none == 0, f"{other} was served from another tenant's pages"
        assert theirs == text, "what is in the cache changes the answer's time alone"
    assert same == text
    assert hits(cache_salt="tenant-b")[0] == again


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/kv_cache/memory", "/v1/kv_cache/moments", "/invocations", "/tokenize", "/scale_elastic_ep"],
)
def test_what_does_or_tells_something_needs_the_key(server: Server, path: str) -> None:
    for key in (None, "wrong"):
        assert ask(server, path, key=key).status_code == 401
        assert ask(server, path, {"prompt": "x", "model": "demo"}, key=key).status_code == 401


def test_models_are_named_and_not_located(server: Server) -> None:
    (model,) = ask(server, "/v1/models").json()["data"]
    assert (model["id"], model["root"]) == ("demo", "demo")


def test_no_other_site_may_read_the_answers(server: Server) -> None:
    for path in ("/v1/models", "/metrics", "/ready", "/dashboard"):
        assert not [name for name in ask(server, path).headers if name.lower().startswith("access-control")]


def test_hostile_requests(server: Server) -> None:
    """The fuzzer of requests, briefly; ``make fuzz`` runs it at length."""
    findings, _ = fuzz(ServerProcess(server.url, server.log, server.process), 200, 20261124, idle=False)
    assert not findings.escapes, "\n".join(findings.escapes)
    assert findings.asked.total() >= 200
    assert findings.statuses["2xx"] > 20
    assert findings.statuses["4xx"] > 50

"""The page and ``top`` beside the API of a real server, under load."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.process import command as cli
from tests.engine.conftest import Server, serving
from tests.engine.served.test_live_truth import body, metrics
from tests.server.browser import Browser, browser, needs_browser

PICTURES = os.environ.get("VLLM_SPECTRAL_PICTURES")
"""A folder to keep screenshots in, for people to look at."""
ENTER = "\ue007"


@pytest.fixture
def load(server: Server) -> Iterator[None]:
    """Requests one after the other, in the background."""
    client, done = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key), threading.Event()

    def work() -> None:
        while not done.is_set():
            client.completions.create(model="demo", prompt="Once upon a time " * 40, max_tokens=60, temperature=0.8)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    yield
    done.set()
    for thread in threads:
        thread.join()


def unlock(window: Browser, server: Server) -> None:
    window.open(f"{server.url}/dashboard")
    window.until(lambda: window.find("#key").is_displayed())
    window.find("#key").send_keys(server.key + ENTER)
    window.until(lambda: window.run("return document.body.dataset.connection") == "live")
    assert all("401" in complaint for complaint in window.complaints()), "nothing but the question for the key"


@needs_browser
@pytest.mark.usefixtures("load")
def test_the_page_follows_a_server_under_load(server: Server) -> None:
    with browser() as window:
        unlock(window, server)

        def agrees() -> bool:
            shown, memory = window.number("#used-tokens"), body(server, "memory")
            return shown == memory["used_tokens"] > 0

        window.until(agrees, 60)
        memory = body(server, "memory")
        assert window.number("#resident-bytes") == memory["resident_bytes"]
        assert window.number("#bytes-per-token") == memory["bytes_per_token"]
        assert len(window.all("#layer-table tbody tr")) == 30
        samples = window.until(lambda: body(server, "fidelity")["sampled_steps"])
        window.until(lambda: body(server, "fidelity")["sampled_steps"] > samples, 30)
        assert "Ready" in window.text("#readiness")
        assert window.complaints() == []
        if PICTURES:
            window.picture(Path(PICTURES) / "light.png")
            window.size(1280, 900)
            window.prefer(prefers_color_scheme="dark")
            window.picture(Path(PICTURES) / "dark.png")


@needs_browser
def test_the_page_survives_a_restart_of_the_server(calibrated: Path, work: Path) -> None:
    def connection() -> str:
        return str(window.run("return document.body.dataset.connection"))

    with browser() as window:
        with serving(calibrated, work / "first.log") as server:
            unlock(window, server)
            port = int(server.url.rsplit(":", 1)[1])
            digest = body(server, "memory")["profile"]["digest"]
        window.until(lambda: connection() == "lost", 30)
        with serving(calibrated, work / "second.log", "--exact-memory-bytes", "0", port=port) as server:
            window.until(lambda: connection() == "live", 30)
            memory = body(server, "memory")
            window.until(lambda: window.number("#resident-bytes") == memory["resident_bytes"], 10)
            assert memory["exact_tier_bytes"] == 0, "another configuration, so that old figures would show"
            assert digest[:12] in window.text("#identity")


def test_top_api_and_metrics_agree_at_rest(server: Server) -> None:
    def figures() -> Any:
        once = subprocess.run(
            cli("top", server.url, "--once", "--json"), capture_output=True, text=True, check=True,
            env=os.environ | {"VLLM_API_KEY": server.key},
        )  # fmt: skip
        return json.loads(once.stdout)["memory"], body(server, "memory"), metrics(server)

    for _ in range(5):  # the canary may come between
        top, api, exported = figures()
        if top["used_bytes"] == api["used_bytes"] == exported["used_bytes"]:
            break
    names = [name for name in api if name in exported]
    assert len(names) >= 14
    assert {name: top[name] for name in names} == {name: api[name] for name in names}
    assert {name: exported[name] for name in names} == pytest.approx({name: api[name] for name in names})
    frame = subprocess.run(
        cli("top", server.url, "--once", "--api-key", server.key), capture_output=True, text=True, check=True
    )
    assert f"{api['capacity_tokens']:,}" in frame.stdout

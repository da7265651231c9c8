"""What the server says about itself, while it works: bytes, fidelity, readiness."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm_spectral_server.canary import RATIO_SLACK
from vllm_spectral_server.metrics import METRICS

from deploy.process import command as cli
from tests.engine.conftest import Server, serving
from tests.server.browser import browser, needs_browser
from vllm_spectral.profile.storage import load_profile, save_profile

LAYERS = 30
PROMPT = "The three most important inventions of the nineteenth century were"


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key)


def body(server: Server, name: str) -> Any:
    status, answer = server.get(f"/v1/kv_cache/{name}", server.key)
    assert status == 200, answer
    return answer


def metrics(server: Server) -> dict[str, float]:
    """Our metrics without labels but ``layer`` and ``kind``."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics")[1]):
        for sample in family.samples:
            if sample.name.startswith("vllm_spectral:"):
                extra = [sample.labels[name] for name in ("layer", "kind") if name in sample.labels]
                found[".".join([sample.name.removeprefix("vllm_spectral:"), *extra])] = sample.value
    return found


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := what()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return result


@pytest.fixture(scope="module")
def loaded(server: Server, client: openai.OpenAI, texts: dict[str, Path]) -> list[dict[str, Any]]:
    """Memory reports under a mixed load of 32 requests."""
    prose, code = (texts[kind].read_text() for kind in ("prose", "code"))

    def ask(index: int) -> None:
        text = prose if index % 2 else code
        client.completions.create(
            model="demo", prompt=text[index * 3000 :][: (200, 900, 2500)[index % 3]], max_tokens=(8, 40, 90)[index % 3],
            temperature=0,
        )  # fmt: skip

    reports = []
    with ThreadPoolExecutor(32) as pool:
        running = [pool.submit(ask, index) for index in range(32)]
        while not all(future.done() for future in running):
            reports.append(body(server, "memory"))
            time.sleep(0.2)
        for future in running:
            future.result()
    # Enough steps for every layer's turn.
    client.completions.create(model="demo", prompt=prose[:900], max_tokens=100, extra_body={"ignore_eos": True})
    return reports


def test_bytes_add_up_at_every_moment_of_a_mixed_load(loaded: list[dict[str, Any]]) -> None:
    assert max(report["used_bytes"] for report in loaded) > 0.05 * loaded[0]["pool_bytes"]
    for report in loaded:
        parts = [report[f"{part}_bytes"] for part in ("used", "cached", "free")]
        assert sum(parts) == report["pool_bytes"] and min(parts) >= 0
        rest = [report[f"{part}_bytes"] for part in ("exact_tier", "workspace", "profile")]
        assert sum(parts) + sum(rest) == report["resident_bytes"]
        (rank,) = report["ranks"]
        assert rank["pool_bytes"] == rank["allocated_bytes"], "what the layers hold is what vLLM allocated, to the byte"
        assert sum(layer["page_bytes"] for layer in rank["layers"]) == report["pool_bytes"]
        assert sum(layer["exact_tier_bytes"] for layer in rank["layers"]) == report["exact_tier_bytes"]
        assert 0 < report["exact_tier_used_bytes"] <= report["exact_tier_bytes"]
        assert rank["process_bytes"] > report["used_bytes"]


def test_pages_outlive_their_request_as_prefix_cache(server: Server, loaded: list[dict[str, Any]]) -> None:
    del loaded
    report = wait_for(lambda: (r := body(server, "memory"))["used_bytes"] == 0 and r, 20)
    assert report["cached_bytes"] > 0.1 * report["pool_bytes"]


def test_the_kernel_agrees_that_the_pool_is_in_memory(server: Server, loaded: list[dict[str, Any]]) -> None:
    """VLLM fills its pages at the start, so that all of them are resident: the report is no promise."""
    del loaded
    (rank,) = body(server, "memory")["ranks"]
    assert 0.97 * rank["pool_bytes"] <= rank["resident_page_bytes"] <= rank["pool_bytes"]
    assert rank["resident_page_bytes"] + rank["exact_tier_bytes"] < rank["process_bytes"]


def test_metrics_and_api_agree(server: Server, loaded: list[dict[str, Any]]) -> None:
    del loaded

    def both() -> bool:
        # Between two questions the canary may have run.
        memory, fidelity, seen = body(server, "memory"), body(server, "fidelity"), metrics(server)
        plain = [name for name, value in memory.items() if name in seen and not isinstance(value, str | list)]
        assert len(plain) >= 14
        layers = {f"layer_error_ratio.{layer['layer']}": layer["error_ratio"] for layer in fidelity["layers"]}
        figures = {name: memory[name] for name in plain} | layers
        figures |= {
            "canary_kl_nats": fidelity["canary"]["kl"], "canary_runs_total": fidelity["canary"]["runs"],
            "fidelity_sampled_steps_total": fidelity["sampled_steps"], "alarms.error": 0,
        }  # fmt: skip
        return all(value is None or seen[name] == pytest.approx(value) for name, value in figures.items())

    wait_for(both, 30)


def test_every_metric_of_the_documentation_is_exported(server: Server, loaded: list[dict[str, Any]]) -> None:
    del loaded
    families = text_string_to_metric_families(server.get("/metrics")[1])
    exported = {f.name.removeprefix("vllm_spectral:"): f.type for f in families if f.name.startswith("vllm_spectral:")}
    exported = {name: kind for name, kind in exported.items() if not name.endswith("_created")}
    assert exported == {metric.name.removesuffix("_total"): metric.kind for metric in METRICS}


def test_pages_in_use_are_vllms_own_figure(server: Server, client: openai.OpenAI) -> None:
    """At rest, and while a request holds some."""

    def agree() -> bool:
        usage = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", server.get("/metrics")[1], re.MULTILINE)
        assert usage
        memory = body(server, "memory")
        used = memory["used_bytes"] / (memory["pool_bytes"] - memory["pool_bytes"] / memory["num_blocks"])
        return float(usage[1]) == pytest.approx(used, abs=1e-9)

    wait_for(agree, 20)
    stream = client.completions.create(
        model="demo", prompt=PROMPT * 30, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_for(lambda: body(server, "memory")["used_bytes"] > 0 and agree(), 20)
    stream.close()


def test_every_layer_is_sampled_and_sound(server: Server, loaded: list[dict[str, Any]]) -> None:
    del loaded
    fidelity = body(server, "fidelity")
    assert [layer["layer"] for layer in fidelity["layers"]] == list(range(LAYERS))
    assert fidelity["every_steps"] == 2
    assert fidelity["sampled_steps"] >= LAYERS
    assert not fidelity["alarms"]
    for layer in fidelity["layers"]:
        assert layer["samples"] >= 1
        assert 0 < layer["output_error"] < 0.5
        assert 0 < layer["attention_kl"] < 0.2
        assert 0.5 < layer["error_ratio"] < 1.4
        assert layer["moment_tokens"] > 1000
        assert abs(layer["drift"]) < 0.08
    assert {entry["layer"] for entry in fidelity["history"]} == set(range(LAYERS))
    times = [entry["time"] for entry in fidelity["history"]]
    assert times == sorted(times)


def test_the_canary_sings(server: Server, calibrated: Path) -> None:
    status, ready = server.get("/ready")
    assert status == 200 and ready["ready"]
    canary = ready["canary"]
    assert canary["state"] == "passed"
    assert 0 < canary["kl"] < 0.05
    assert canary["top1_agreement"] > 0.9
    expectation = load_profile(calibrated).expectation
    assert expectation is not None
    ratio, drift = expectation.of_layer(canary["worst_layer"], 1)
    assert 0.7 < ratio < 1.4
    # A server finds what the calibration found, in another engine and from compressed pages: that makes its limits narrow.
    assert canary["worst_error_ratio"] == pytest.approx(ratio, rel=0.03)
    assert canary["worst_drift"] == pytest.approx(drift, abs=0.005)
    assert canary["error_ratio_limit"] == pytest.approx(ratio * RATIO_SLACK)
    wait_for(lambda: server.get("/ready")[1]["canary"]["runs"] > canary["runs"], 30)


def test_a_request_is_told_what_it_held(server: Server, client: openai.OpenAI) -> None:
    per_token = body(server, "memory")["bytes_per_token"]
    asking = {"vllm_xargs": {"kv_cache_usage": 1}, "ignore_eos": True}
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, temperature=0, extra_body=asking)
    assert answer.usage is not None
    held = answer.usage.model_extra["kv_cache"]  # type: ignore[index]
    assert held["tokens"] == answer.usage.prompt_tokens + 39
    assert held["bytes"] == 64 * per_token
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": PROMPT}], max_tokens=5, stream=True,
        stream_options={"include_usage": True}, extra_body=asking,
    )  # fmt: skip
    last = list(stream)[-1]
    assert last.usage is not None
    assert last.usage.model_extra["kv_cache"]["tokens"] == last.usage.prompt_tokens + 4  # type: ignore[index]
    plain = client.completions.create(model="demo", prompt=PROMPT, max_tokens=2)
    assert plain.usage is not None and not (plain.usage.model_extra or {}).get("kv_cache")


def test_the_profile_is_shown(server: Server, calibrated: Path) -> None:
    shown, profile = body(server, "profile"), load_profile(calibrated)
    assert shown["digest"] == profile.digest
    assert len(shown["layers"]) == LAYERS
    for layer in shown["layers"]:
        assert sum(layer["key_spectrum"]) == pytest.approx(1)
        assert layer["key_spectrum"] == sorted(layer["key_spectrum"], reverse=True)
        assert len(layer["value_channel_bits"]) == 64


def test_traffic_counts(server: Server, client: openai.OpenAI) -> None:
    before = body(server, "traffic")
    client.completions.create(model="demo", prompt=PROMPT, max_tokens=16, extra_body={"ignore_eos": True})
    after = wait_for(
        lambda: (t := body(server, "traffic"))["generated_tokens"] >= before["generated_tokens"] + 16 and t, 10
    )
    assert after["running"] == 0
    assert after["generated_tokens_per_second"] > 1


def test_the_routes_are_guarded_and_documented(server: Server) -> None:
    document = server.get("/openapi.json")[1]
    for name in ("memory", "fidelity", "profile", "moments", "traffic"):
        assert server.get(f"/v1/kv_cache/{name}")[0] == 401
        assert f"/v1/kv_cache/{name}" in document["paths"]
    assert "/ready" in document["paths"]


def test_a_profile_is_made_from_traffic(
    server: Server, loaded: list[dict[str, Any]], calibrated: Path, work: Path
) -> None:
    del loaded
    path = work / "traffic.spectral"
    command = cli("calibrate", "demo", "-o", str(path), "--from-traffic", server.url)
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].endswith("answered 401: it needs --api-key")
    made = subprocess.run([*command, "--api-key", server.key], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    profile = load_profile(path)
    assert profile.provenance.text_source == "live traffic"
    assert profile.slot_bytes == load_profile(calibrated).slot_bytes
    assert profile.provenance.num_tokens > 2048


@pytest.fixture(scope="module")
def damaged(calibrated: Path, work: Path) -> Iterator[Server]:
    """A server whose profile has the transposed basis of one layer's keys: the bug that this project began with.

    Its last layer is exempt, so that there are pages of two sizes.
    """
    profile = load_profile(calibrated)
    layers = list(profile.layers)
    layers[11] = dataclasses.replace(layers[11], key_basis=layers[11].key_basis.mT.contiguous())
    path = work / "damaged.spectral"
    save_profile(dataclasses.replace(profile, layers=tuple(layers)), path)
    with serving(path, work / "damaged.log", "--fidelity-every", "5", "--exempt-layers", "29") as running:
        yield running


def test_a_damaged_profile_is_not_ready_and_names_its_layer(damaged: Server) -> None:
    assert damaged.get("/health")[0] == 200, "the process lives; that is all that health says"
    status, ready = damaged.get("/ready")
    assert status == 503
    assert not ready["ready"]
    assert "layer 11:" in ready["reason"]
    fidelity = body(damaged, "fidelity")
    alarms = {(alarm["kind"], alarm["layer"]) for alarm in fidelity["alarms"]}
    assert {layer for _, layer in alarms} == {11}
    assert ("canary", 11) in alarms
    assert "layer 11:" in damaged.log.read_text()
    seen = metrics(damaged)
    assert seen["ready"] == 0 and seen["canary_failures_total"] >= 1 and seen["alarms.canary"] == 1


def test_pages_of_two_sizes_are_what_vllm_allocated(damaged: Server) -> None:
    (rank,) = body(damaged, "memory")["ranks"]
    assert [layer["compressed"] for layer in rank["layers"]] == [True] * 29 + [False]
    assert rank["pool_bytes"] == rank["allocated_bytes"] == sum(layer["page_bytes"] for layer in rank["layers"])


def test_live_traffic_shows_the_damage_too(damaged: Server) -> None:
    client = openai.OpenAI(base_url=f"{damaged.url}/v1", api_key=damaged.key)
    rounds = itertools.count()

    def seen() -> Any:
        assert next(rounds) < 20
        client.completions.create(model="demo", prompt=PROMPT * 20, max_tokens=100, extra_body={"ignore_eos": True})
        return body(damaged, "fidelity")["layers"][11]["samples"] >= 3

    wait_for(seen, 120)
    layers = body(damaged, "fidelity")["layers"]
    worst = max((layer for layer in layers if layer["samples"]), key=lambda layer: layer["error_ratio"])
    assert worst["layer"] == 11
    assert worst["error_ratio"] > 1.5


@needs_browser
def test_the_page_names_the_damaged_layer(damaged: Server) -> None:
    with browser() as window:
        window.open(f"{damaged.url}/dashboard")
        window.until(lambda: window.find("#key").is_displayed())
        window.find("#key").send_keys(damaged.key + "\ue007")
        window.until(lambda: "Not ready" in window.text("#readiness"))
        # Readiness needs no key, and is shown before the key is checked.
        window.until(lambda: "layer 11" in window.text("#alarms"))
        window.until(lambda: window.find("#heat").get_attribute("data-alarmed") == "11")

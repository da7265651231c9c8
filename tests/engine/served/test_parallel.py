"""The real server with several ranks: what it says of each, and whether the sums are those of the ranks."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.conftest import Server, serving
from vllm_spectral.profile.storage import load_profile

PROMPT = "The capital of France is"
TOTALS = ("pool_bytes", "exact_tier_bytes", "workspace_bytes", "profile_bytes")


def ask(server: Server, prompt: str, rank: int | None = None, tokens: int = 8) -> str:
    """The greedy answer; of a data-parallel rank, if one is named."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    if rank is not None:
        headers["X-data-parallel-rank"] = str(rank)
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text


def memory(server: Server) -> Any:
    status, report = server.get("/v1/kv_cache/memory", server.key)
    assert status == 200
    return report


def samples(server: Server, name: str) -> dict[tuple[str, ...], float]:
    """A metric's values by engine, and by rank where there is one."""
    families = text_string_to_metric_families(server.get("/metrics")[1])
    return {
        tuple(s.labels[label] for label in ("engine", "rank") if label in s.labels): s.value
        for family in families
        for s in family.samples
        if s.name == name
    }


def check_bytes(server: Server, ranks: list[tuple[int, int]]) -> Any:
    """The sums are sums of the ranks, in the report and in the metrics."""
    report = memory(server)
    found = [(rank["data_parallel_rank"], rank["tensor_parallel_rank"]) for rank in report["ranks"]]
    assert found == ranks
    for rank in report["ranks"]:
        assert rank["pool_bytes"] == rank["allocated_bytes"] == sum(layer["page_bytes"] for layer in rank["layers"])
    assert report["pool_bytes"] == report["used_bytes"] + report["cached_bytes"] + report["free_bytes"]
    for name in TOTALS:
        assert report[name] == sum(rank[name] for rank in report["ranks"])
        series = samples(server, f"vllm_spectral:rank_{name}")
        assert series == {
            (str(rank["data_parallel_rank"]), str(rank["tensor_parallel_rank"])): rank[name] for rank in report["ranks"]
        }
    assert report["resident_bytes"] == sum(report[name] for name in TOTALS)
    return report


@pytest.fixture(scope="module")
def two_engines(calibrated: Path, work: Path) -> Iterator[Server]:
    with serving(
        calibrated, work / "dp.log", "--data-parallel-size", "2", environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    ) as server:
        yield server


def test_data_parallel_ranks(two_engines: Server, server: Server) -> None:
    report = check_bytes(two_engines, [(0, 0), (1, 0)])
    one = memory(server)
    assert (report["pool_bytes"], report["capacity_tokens"]) == (2 * one["pool_bytes"], 2 * one["capacity_tokens"])
    assert report["bytes_per_token"] == one["bytes_per_token"], "a token lies on one engine"

    status, ready = two_engines.get("/ready")
    assert (status, ready["canary"]["state"]) == (200, "passed")
    before = samples(two_engines, "vllm:prompt_tokens_total")
    assert min(before[("0",)], before[("1",)]) >= 2 * 160, "the canary was recorded and asked on both"

    assert ask(two_engines, PROMPT, 0) == ask(two_engines, PROMPT, 1) == ask(server, PROMPT)
    with ThreadPoolExecutor(8) as pool:
        prompts = [f"{index}. " + PROMPT * 20 for index in range(8)]
        running = [pool.submit(ask, two_engines, prompt, None, 150) for prompt in prompts]
        most: dict[tuple[str, ...], float] = {}
        while not all(future.done() for future in running):
            used = samples(two_engines, "vllm_spectral:rank_used_bytes")
            most = {rank: max(value, most.get(rank, 0.0)) for rank, value in used.items()}
        assert all(future.result() for future in running)
    assert set(most) == {("0", "0"), ("1", "0")} and min(most.values()) > 0, "the load was shared, and so it was shown"
    traffic = two_engines.get("/v1/kv_cache/traffic", two_engines.key)[1]
    assert traffic["prompt_tokens"] >= sum(before.values())
    (total,) = samples(two_engines, "vllm_spectral:canary_runs_total").values()
    assert total >= 1


@pytest.mark.slow
def test_tensor_parallel_ranks(calibrated: Path, work: Path, server: Server) -> None:
    """The embedded model has three KV heads, one for each of three ranks."""
    with serving(
        calibrated, work / "tp.log", "--tensor-parallel-size", "3", environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1|0"}
    ) as three:
        report = check_bytes(three, [(0, 0), (0, 1), (0, 2)])
        one = memory(server)
        assert report["bytes_per_token"] == one["bytes_per_token"] == 3 * report["layers"][0]["slot_bytes"] * 30
        assert report["layers"][0]["page_bytes"] == pytest.approx(one["layers"][0]["page_bytes"], rel=0.01)
        # The pool is given per rank: three of them hold three times the tokens.
        assert report["capacity_tokens"] == pytest.approx(3 * one["capacity_tokens"], rel=0.01)
        status, ready = three.get("/ready")
        assert (status, ready["canary"]["state"]) == (200, "passed")
        canary, expectation = ready["canary"], load_profile(calibrated).expectation
        assert expectation is not None
        ratio, drift = expectation.of_layer(canary["worst_layer"], 3)
        assert canary["worst_error_ratio"] == pytest.approx(ratio, rel=0.03)
        assert canary["worst_drift"] == pytest.approx(drift, abs=0.005)
        assert ask(three, PROMPT).startswith(" Paris")

"""The real server with the real model, asked by the openai client."""

from __future__ import annotations

import re
import time

import openai
import pytest

from deploy.demo import QUESTION
from tests.engine.conftest import POOL_BYTES, Server

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key)


def test_it_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=32, temperature=0)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")


def test_it_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=32, temperature=0, stream=True  # type: ignore[arg-type]
    )  # fmt: skip
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(parts) > 3
    assert "Paris" in "".join(parts)


def test_the_memory_report_adds_up(server: Server) -> None:
    status, memory = server.get("/v1/kv_cache/memory", server.key)
    assert status == 200
    assert memory["model"] == "demo"
    assert set(memory["profile"]) == {"digest", "name"}
    layers = memory["layers"]
    assert len(layers) == 30
    assert all(layer["compressed"] for layer in layers)
    heads, dim = 3, 64
    assert memory["bytes_per_token"] == sum(layer["slot_bytes"] for layer in layers) * heads
    assert memory["uncompressed_bytes_per_token"] == 30 * heads * dim * 2 * 2
    assert memory["capacity_tokens"] == memory["num_blocks"] * memory["block_size_tokens"]
    assert memory["pool_bytes"] == memory["capacity_tokens"] * memory["bytes_per_token"]
    given = memory["pool_bytes"] + memory["exact_tier_bytes"]
    assert 0.99 * POOL_BYTES < given <= POOL_BYTES, "pages and exact copies share the memory that was asked for"
    assert 0.03 * POOL_BYTES < memory["exact_tier_bytes"] <= POOL_BYTES / 24
    dense_tokens = given // memory["uncompressed_bytes_per_token"]
    assert dense_tokens - 32 < memory["uncompressed_capacity_tokens"] <= dense_tokens
    resident = sum(memory[key] for key in ("pool_bytes", "exact_tier_bytes", "workspace_bytes", "profile_bytes"))
    dense = memory["uncompressed_bytes_per_token"] * memory["capacity_tokens"]
    assert memory["effective_compression_ratio"] == pytest.approx(dense / resident)
    assert memory["effective_bits_per_element"] == pytest.approx(16 * resident / dense)
    assert memory["profile_bytes"] > 30 * heads * dim * dim * 4 * 2


def test_the_capacity_is_what_vllm_logs(server: Server) -> None:
    logged = re.search(r"KV cache size: ([\d,]+) tokens", server.log.read_text())
    assert logged
    assert server.get("/v1/kv_cache/memory", server.key)[1]["capacity_tokens"] == int(logged[1].replace(",", ""))


def test_use_is_seen_while_it_lasts(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo",
        prompt="Once upon a time",
        max_tokens=64,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    used = []
    for count, _ in enumerate(stream):
        if count % 16 == 8:
            used.append(server.get("/v1/kv_cache/memory", server.key)[1])
    # The canary may have been there too, with 9 blocks.
    assert all(32 <= memory["used_tokens"] <= 128 + 288 for memory in used)
    assert all(memory["used_bytes"] == memory["used_tokens"] * memory["bytes_per_token"] for memory in used)
    deadline = time.monotonic() + 5
    while server.get("/v1/kv_cache/memory", server.key)[1]["used_tokens"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_key_guards_our_route_too(server: Server) -> None:
    assert server.get("/v1/kv_cache/memory")[0] == 401
    assert server.get("/v1/kv_cache/memory", "wrong")[0] == 401
    assert server.get("/health")[0] == 200


def test_vllms_routes_and_metrics_are_there(server: Server) -> None:
    status, metrics = server.get("/metrics")
    assert status == 200
    assert "vllm:kv_cache_usage_perc" in metrics
    status, document = server.get("/openapi.json")
    assert status == 200
    assert {"/v1/kv_cache/memory", "/v1/chat/completions", "/v1/completions", "/v1/models"} <= set(document["paths"])

"""The arithmetic from users to GPUs: against what servers reported, and against its own document."""

from __future__ import annotations

import dataclasses
import re

import pytest

from benchmarks.bounds import (
    ACCELERATORS,
    BLOCK_TOKENS,
    CACHES,
    LOADS,
    Accelerator,
    Cache,
    Load,
    Machine,
    Model,
    at_once,
    need,
    profile_bytes,
)
from benchmarks.scaling import DOCUMENT, document, main
from tests.kernels.conftest import codec_of
from vllm_spectral.codec.attention import workspace_bytes
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.library import ISA_VARIABLE, library

DEMO, LLAMA = Model.named("SmolLM2-135M-Instruct"), Model.named("Llama-3.1-8B")
BY_NAME = {cache.name.strip("`"): cache for cache in CACHES}
H100 = Machine(ACCELERATORS["H100-80GB"])


# A server is given its memory for pages and copies; workspace and profile come on top, and are taken off here.
BESIDE = workspace_bytes(9, 3, 64) + profile_bytes(DEMO)


def test_capacity_is_what_the_server_reports() -> None:
    """64 MiB, balanced, the demo model: 465 blocks of 32 tokens (``GET /v1/kv_cache/memory``)."""
    found = BY_NAME["balanced"].tokens_in(64 << 20, DEMO)
    assert found + BESIDE / 4320 == pytest.approx(465 * BLOCK_TOKENS, rel=0.005)
    assert BY_NAME["bf16"].tokens_in(64 << 20, DEMO) == (64 << 20) / 23040


def test_requests_at_once_are_those_that_were_served() -> None:
    """docs/performance.md: 64 MiB, 1024 tokens asked and 128 answered: two at once in bf16, thirteen in balanced."""
    assert int(at_once(64 << 20, 1024 + 64, DEMO, BY_NAME["bf16"])) == 2
    assert int(at_once((64 << 20) + BESIDE, 1024 + 64, DEMO, BY_NAME["balanced"])) == 13


@pytest.mark.parametrize("model", [DEMO, LLAMA], ids=lambda model: model.name)
def test_a_profile_weighs_what_the_codec_says(model: Model) -> None:
    shape = model.geometry
    codec = codec_of(2, shape.head_dim, 3.0)
    native = NativeLayer(codec, library({ISA_VARIABLE: "portable"}))  # AMX keeps one basis more
    per_head = (codec.resident_bytes + native.resident_bytes) / 2
    assert profile_bytes(model) == pytest.approx(
        per_head * shape.num_layers * shape.num_kv_heads, rel=0.06
    )  # tables that all heads share


def test_one_request_by_hand() -> None:
    """No weights to speak of, everything round: 36 requests per second, 10 seconds each, 1,000 tokens."""
    load = Load("", "", prompt=900, answer=200, active=1.0, requests=36.0, speed=20.0, first_token=0.0)
    assert load.rate(3600) == 36.0
    assert load.decoding(3600) == 360.0
    assert load.held(3600, kept=1.0) == 360_000
    tiny = dataclasses.replace(LLAMA, parameters=1.0)
    machine = Machine(
        Accelerator("", 360e9 * 0.131072, 1e12, 1e15), memory_share=1.0, reserve=0.0, bandwidth_share=1.0, flops_share=1.0
    )  # fmt: skip
    found = need(3600, load, tiny, BY_NAME["bf16"], machine)
    assert found.memory == pytest.approx(1.0)
    assert found.bandwidth == pytest.approx(360 * 20 * 1000 * 131072 / 1e12)
    attention = 4 * 32 * 32 * 128
    assert found.compute == pytest.approx(36 * attention * (900 * 450 + 200 * 1000) / 1e15, rel=1e-6)
    assert need(3600, load, tiny, BY_NAME["fp8"], machine).memory == pytest.approx(0.5)


def test_the_largest_bound_decides_and_is_named() -> None:
    load = LOADS["documents"]
    slow = Machine(dataclasses.replace(H100.accelerator, flops=1e13))
    narrow = Machine(dataclasses.replace(H100.accelerator, bandwidth=7e11, flops=1e17))
    wide = Machine(dataclasses.replace(H100.accelerator, bandwidth=1e15, flops=1e17))
    for machine, binds in ((slow, "compute"), (narrow, "bandwidth"), (wide, "memory")):
        found = need(1e7, load, LLAMA, BY_NAME["bf16"], machine)
        assert found.binds == binds
        assert found.gpus == -(-max(found.memory, found.bandwidth, found.compute) // 1) * found.ranks
    assert need(10, load, LLAMA, BY_NAME["bf16"], H100).binds == "one replica"


def test_where_memory_does_not_bind_nothing_is_promised() -> None:
    slow = Machine(dataclasses.replace(H100.accelerator, flops=1e13))
    text = document([LLAMA], slow, [1e7], [LOADS["documents"]])
    assert "**nothing is saved**, compute binds" in text
    fewer = need(1e7, LOADS["documents"], LLAMA, BY_NAME["compact"], slow)
    assert fewer.gpus == need(1e7, LOADS["documents"], LLAMA, BY_NAME["bf16"], slow).gpus


def test_kept_conversations_are_those_that_pay() -> None:
    load = LOADS["agents"]
    for cache in CACHES:
        best = need(1e6, load, LLAMA, cache, H100)
        forced = [dataclasses.replace(load, hits=0.0, kept=0.0), load]
        assert 0 <= best.kept <= 1
        assert best.most <= need(1e6, forced[0], LLAMA, cache, H100).most + 1e-9
    smaller = [need(1e6, load, LLAMA, cache, H100) for cache in CACHES]
    assert [each.gpus for each in smaller] == sorted((each.gpus for each in smaller), reverse=True)
    assert [each.kept for each in smaller] == sorted(each.kept for each in smaller)


def test_a_replica_is_large_enough_for_its_weights() -> None:
    assert [H100.ranks(Model.named(name), LOADS["chat"]) for name in ("Llama-3.1-8B", "Llama-3.1-70B")] == [1, 4]
    small = Machine(dataclasses.replace(H100.accelerator, memory=8e9))
    with pytest.raises(ValueError, match="does not run on eight"):
        small.ranks(Model.named("Llama-3.1-70B"), LOADS["chat"])


def test_bits_of_stock_caches() -> None:
    assert Cache("", 16.0).token_bytes(LLAMA) == 131072 == LLAMA.bf16_token_bytes
    assert Cache("", 3.0, exact=True).token_bytes(LLAMA) == 131072 * 3 / 16


def test_the_document_holds_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    found = re.search(r"<!-- generated -->\n(.*)<!-- /generated -->", DOCUMENT.read_text(), re.DOTALL)
    assert found
    assert found[1] == capsys.readouterr().out, "python -m benchmarks.scaling --write"


def test_assumptions_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--models", "Qwen3-8B", "--loads", "chat", "--users", "5e6", "--prompt", "30000", "--flops-share", "1"])
        == 0
    )
    assert "5,000,000 users" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--speed", "100000"])
    assert "does not run on eight" in capsys.readouterr().err

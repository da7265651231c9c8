"""What a token attends to does not depend on how the prompt was cut, cached, batched or preempted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIM
from tests.engine.conftest import POOL_BYTES
from tests.engine.tiny import make_tiny
from tests.environment import AS_IT_COMES
from vllm_spectral.backend.engine import cpu_dtype

RunEngine = Callable[..., dict[str, Any]]
SHORT = "The three most important inventions of the nineteenth century were"
OTHERS = ("def fibonacci(n):\n", "Question: what is 12 + 30?\nAnswer:", "Dear Sir or Madam,\n\n", "Once upon a time")
BATCH = [SHORT, *OTHERS, SHORT]
WINDOW_BYTES = 80 * 30 * 3 * DIM * 4
"""Exact copies of one request: a group of 8 first tokens, and 63 recent ones wherever they lie in groups of 8."""


@pytest.fixture(scope="module")
def long_prompt(texts: dict[str, Path]) -> str:
    """About a thousand tokens of prose."""
    return texts["prose"].read_text()[20_000:24_500]


@pytest.fixture(scope="module")
def spectral(calibrated: Path) -> dict[str, Any]:
    """With room for the windows of more requests than any test runs at once."""
    return {"profile": str(calibrated), "exact_bytes": 10 * WINDOW_BYTES}


@pytest.fixture(scope="module")
def reference(run_engine: RunEngine, long_prompt: str, spectral: dict[str, Any]) -> dict[str, Any]:
    """The long prompt alone in one piece, then the batch; nothing cached, memory in plenty."""
    return run_engine([[long_prompt], BATCH, BATCH[:2], [SHORT]], spectral=spectral)


@pytest.fixture(scope="module")
def stock(run_engine: RunEngine, long_prompt: str) -> dict[str, Any]:
    """Stock vLLM with no plugin loaded at all."""
    return run_engine([[long_prompt], [SHORT]], environment={"VLLM_PLUGINS": ""})


def ids(answer: dict[str, Any]) -> list[list[list[int]]]:
    """Generated token ids: ``[round][request]``."""
    return [[request["ids"] for request in batch] for batch in answer["rounds"]]


def test_capacity_is_at_least_3_8_times_stock(run_engine: RunEngine, calibrated: Path) -> None:
    """At the defaults, so with the exact tier's share taken out."""
    stock = run_engine([], dtype="bfloat16", environment={"VLLM_PLUGINS": ""})
    ours = run_engine([], spectral={"profile": str(calibrated)})
    assert ours["exact"]["entries"] > 0
    assert ours["capacity"] >= 3.8 * stock["capacity"]


def test_the_exact_tier_comes_out_of_the_memory_given(
    reference: dict[str, Any], run_engine: RunEngine, calibrated: Path
) -> None:
    block = 32 * 30 * 3 * 64
    assert reference["capacity"] == (POOL_BYTES - 10 * WINDOW_BYTES) // block * 32
    strict = run_engine([], spectral={"profile": str(calibrated), "exact_bytes": 0})
    assert strict["exact"] == {}
    assert strict["capacity"] == POOL_BYTES // block * 32


def test_chunks_of_256_and_a_prefix_hit_give_the_same_text(
    reference: dict[str, Any], run_engine: RunEngine, long_prompt: str, spectral: dict[str, Any]
) -> None:
    again = run_engine(
        [[long_prompt], BATCH, [long_prompt]],
        spectral=spectral, enable_prefix_caching=True, max_num_batched_tokens=256,
    )  # fmt: skip
    cold, batch, warm = again["rounds"]
    assert not cold[0]["cached"]
    assert warm[0]["cached"] > 500
    assert ids(again) == [*ids(reference)[:2], ids(reference)[0]]
    assert batch[0]["ids"] == batch[-1]["ids"], "the same request twice in a batch"
    assert reference["exact"]["found"] == reference["exact"]["wanted"] > 0


def test_strict_chunks_and_a_prefix_hit_give_the_same_text(
    run_engine: RunEngine, long_prompt: str, calibrated: Path
) -> None:
    strict = {"profile": str(calibrated), "exact_bytes": 0}
    whole = run_engine([[long_prompt]], spectral=strict)
    cut = run_engine(
        [[long_prompt], [long_prompt]], spectral=strict, enable_prefix_caching=True, max_num_batched_tokens=256
    )
    assert cut["rounds"][1][0]["cached"] > 500
    assert ids(cut) == ids(whole) * 2


def test_a_prefix_hit_whose_recent_copies_are_gone_is_answered_from_pages(
    reference: dict[str, Any], run_engine: RunEngine, long_prompt: str, spectral: dict[str, Any]
) -> None:
    """Other requests take the copies away in between; what is cached stays cached, and reads compressed."""
    answer = run_engine(
        [[long_prompt], list(OTHERS), [long_prompt]],
        spectral=spectral | {"exact_bytes": WINDOW_BYTES}, enable_prefix_caching=True,
    )  # fmt: skip
    cold, _, warm = answer["rounds"]
    assert cold[0]["ids"] == ids(reference)[0][0]
    assert warm[0]["cached"] > 500
    assert len(warm[0]["ids"]) == 32
    exact = answer["exact"]
    assert exact["evicted"] > 0
    assert exact["used"] <= exact["entries"] == 10
    # The first tokens and recent group of four requests fit; their windows do not, nor does the repeated prompt's.
    assert exact["found"] < exact["wanted"]


def test_rejected_draft_tokens_leave_no_trace(
    reference: dict[str, Any], run_engine: RunEngine, spectral: dict[str, Any]
) -> None:
    answer = run_engine(
        [BATCH], spectral=spectral, max_tokens=32,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1,
        },
    )  # fmt: skip
    assert 0 < answer["accepted"] < answer["drafted"]
    assert ids(answer)[0] == ids(reference)[1]


def test_the_rest_of_the_batch_changes_nothing_and_one_row_alone_is_bounded(reference: dict[str, Any]) -> None:
    """See the contract: a step of a single row is the one shape in which the model's own products may differ."""
    _, batch, pair, alone = ids(reference)
    assert pair == batch[:2]
    # The prompt is many rows, so what is stored of it, and the first token, are the same even for a request alone.
    assert alone[0][0] == batch[0][0]


@pytest.mark.skipif(os.cpu_count() == 1, reason="there is one core")
def test_threads_change_no_text(
    reference: dict[str, Any], run_engine: RunEngine, long_prompt: str, spectral: dict[str, Any]
) -> None:
    """Two where the reference had one, or the other way round."""
    bind = "0-1" if len(os.sched_getaffinity(0)) == 1 else "0"
    answer = run_engine([[long_prompt], BATCH], spectral=spectral, environment={"VLLM_CPU_OMP_THREADS_BIND": bind})
    assert ids(answer) == ids(reference)[:2]


def test_preemption_gives_the_same_text(
    reference: dict[str, Any], run_engine: RunEngine, spectral: dict[str, Any]
) -> None:
    """Six requests, two blocks each at their end, in a pool of nine blocks (one of them vLLM's null block)."""
    pool = 9 * 32 * 30 * 3 * 64 + 10 * WINDOW_BYTES
    answer = run_engine([BATCH], spectral=spectral, kv_cache_memory_bytes=pool, max_model_len=128)
    assert answer["preemptions"] > 0
    assert ids(answer)[0] == ids(reference)[1]


def test_unconfigured_the_plugin_changes_nothing(
    stock: dict[str, Any], run_engine: RunEngine, long_prompt: str, spectral: dict[str, Any]
) -> None:
    loaded = run_engine([[long_prompt], [SHORT]])
    disabled = run_engine([[long_prompt]], spectral=spectral, environment=AS_IT_COMES | {"VLLM_SPECTRAL_DISABLE": "1"})
    assert ids(loaded) == ids(stock)
    assert ids(disabled)[0] == ids(stock)[0]
    assert loaded["capacity"] == disabled["capacity"] == stock["capacity"]


def test_a_profile_of_another_model_is_refused_before_the_weights_are_loaded(
    run_engine: RunEngine, tiny: tuple[Path, Path]
) -> None:
    with pytest.raises(AssertionError, match="was made for another model") as failure:
        run_engine([[SHORT]], spectral={"profile": str(tiny[1])})
    assert "Loading weights took" not in str(failure.value)


def test_exempt_layers_keep_stock_pages(run_engine: RunEngine, spectral: dict[str, Any], stock: dict[str, Any]) -> None:
    some = run_engine([[SHORT]], spectral=spectral | {"exempt_layers": [0, 29]})
    dense, slot = 2 * DIM * (2 if cpu_dtype() == "auto" else 4), 64
    per_token = 3 * (28 * slot + 2 * dense)
    exact = 10 * WINDOW_BYTES // (28 * 3 * 8 * DIM * 4) * (28 * 3 * 8 * DIM * 4)
    assert some["capacity"] == (POOL_BYTES - exact) // (32 * per_token) * 32
    all_layers = list(range(30))
    every = run_engine([[SHORT]], spectral=spectral | {"exempt_layers": all_layers}, environment=AS_IT_COMES)
    assert ids(every)[0] == ids(stock)[1]
    assert every["capacity"] == stock["capacity"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random Llama and a profile whose heads all differ, so that a rank with the wrong heads is seen."""
    directory = tmp_path_factory.mktemp("tiny")
    return directory, make_tiny(directory, heads=4, kv_heads=4, slot_bytes=128)


def test_tensor_parallel_ranks_take_their_own_heads(run_engine: RunEngine, tiny: tuple[Path, Path]) -> None:
    """At 8 bits and over few tokens: ranks sum their shares in another order, and a random model decides by little."""
    model, profile = tiny
    prompt = [(7 * i) % 500 + 5 for i in range(200)]
    options: dict[str, Any] = {
        "model": model, "spectral": {"profile": str(profile)}, "skip_tokenizer_init": True, "kv_cache_memory_bytes": 8 << 20,
        "max_tokens": 12,
    }  # fmt: skip
    one = run_engine([[prompt]], **options)
    two = run_engine([[prompt]], tensor_parallel_size=2, environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, **options)
    assert ids(two) == ids(one)

"""The GPU's kernels inside the real engine: under Triton's interpreter, on the CPU, with the buffers that graphs need.

What is served is the same as on a GPU, but for the platform: vLLM's second model runner, which is the default there, our
kernels, metadata, exact tier and scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.runner import PRETEND_TRITON
from tests.engine.tiny import VOCABULARY, make_tiny

INTERPRETED = {"VLLM_SPECTRAL_ISA": "triton", "TRITON_INTERPRET": "1"}
RUNNERS = {
    "V2": INTERPRETED | {"VLLM_USE_V2_MODEL_RUNNER": "1", PRETEND_TRITON: "1"},
    "V1": INTERPRETED | {"VLLM_USE_V2_MODEL_RUNNER": "0"},
}
PROMPT = [(7 * i) % (VOCABULARY - 12) + 5 for i in range(80)]
"""Longer than the exact tier's window, and than a chunk."""
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True, "kv_cache_memory_bytes": 8 << 20, "max_tokens": 4, "enable_prefix_caching": True,
    "max_num_batched_tokens": 64, "max_model_len": 128, "max_num_seqs": 4, "dtype": "float32",
}  # fmt: skip
ROUNDS = [[PROMPT, PROMPT[3:12]], [PROMPT[:70]]]
"""Chunks and decodes in one step, then a prefix hit."""
slow = pytest.mark.slow


def ids(answer: dict[str, Any]) -> list[list[list[int]]]:
    return [[request["ids"] for request in batch] for batch in answer["rounds"]]


@pytest.mark.parametrize(
    ("runner", "exact_bytes"),
    [("V2", None), pytest.param("V2", 0, marks=slow), pytest.param("V1", None, marks=slow)],
)
def test_the_engine_answers_as_with_the_cpus_kernels(
    runner: str, exact_bytes: int | None, run_engine: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    profile = make_tiny(tmp_path, heads=2, kv_heads=1, slot_bytes=64)
    spectral: dict[str, Any] = {"profile": str(profile)} | ({} if exact_bytes is None else {"exact_bytes": exact_bytes})
    native = run_engine(ROUNDS, model=tmp_path, spectral=spectral, **OPTIONS)
    triton = run_engine(ROUNDS, model=tmp_path, spectral=spectral, environment=RUNNERS[runner], **OPTIONS)
    assert native["kernels"] not in ("reference", "triton (interpreted)")
    assert (triton["kernels"], triton["runner"]) == ("triton (interpreted)", runner)
    assert triton["rounds"][1][0]["cached"] == native["rounds"][1][0]["cached"] > 0
    assert ids(triton) == ids(native)
    assert triton["exact"] == native["exact"]

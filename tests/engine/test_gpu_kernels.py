"""The GPU's kernels inside the real engine: under Triton's interpreter, on the CPU, with the buffers that graphs need.

What is served is the same backend as on a GPU, but for the platform: kernels, metadata, exact tier, scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny import VOCABULARY, make_tiny

INTERPRETED = {"VLLM_SPECTRAL_ISA": "triton", "TRITON_INTERPRET": "1"}
PROMPT = [(7 * i) % (VOCABULARY - 12) + 5 for i in range(80)]
"""Longer than the exact tier's window, and than a chunk."""
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True, "kv_cache_memory_bytes": 8 << 20, "max_tokens": 4, "enable_prefix_caching": True,
    "max_num_batched_tokens": 64, "max_model_len": 128, "max_num_seqs": 4, "dtype": "float32",
}  # fmt: skip
ROUNDS = [[PROMPT, PROMPT[3:12]], [PROMPT[:70]]]
"""Chunks and decodes in one step, then a prefix hit."""


def ids(answer: dict[str, Any]) -> list[list[list[int]]]:
    return [[request["ids"] for request in batch] for batch in answer["rounds"]]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["exact tier", "without"])
def test_the_engine_answers_as_with_the_cpus_kernels(
    strict: bool, run_engine: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    spectral = {"profile": str(make_tiny(tmp_path, heads=2, kv_heads=1, slot_bytes=64))}
    if strict:
        spectral["exact_bytes"] = 0
    native = run_engine(ROUNDS, model=tmp_path, spectral=spectral, **OPTIONS)
    triton = run_engine(ROUNDS, model=tmp_path, spectral=spectral, environment=INTERPRETED, **OPTIONS)
    assert triton["kernels"] == "triton (interpreted)" != native["kernels"]
    assert triton["rounds"][1][0]["cached"] == native["rounds"][1][0]["cached"] > 0
    assert ids(triton) == ids(native)
    assert triton["exact"] == native["exact"]

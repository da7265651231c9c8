"""The engine benchmark's kinds are configurations that vLLM takes on CUDA, for a model in the shape of Llama-3.1-8B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention import selector

from benchmarks.gpu.engine import SPECTRAL, STOCK, arguments_of, capture_sizes
from benchmarks.gpu.models import LLAMA_8B, dummy_model
from vllm_spectral import plugin

BACKENDS = {
    "bf16": "FLASH_ATTN", "bf16-triton": "TRITON_ATTN", "fp8": "TRITON_ATTN", "int4": "TRITON_ATTN",
    "turboquant": "TURBOQUANT",
} | dict.fromkeys(SPECTRAL, "CUSTOM")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dummy")
    # Profiles of one layer are made in a second, of 32 in half a minute.
    dummy_model(directory, replace(LLAMA_8B, layers=1))
    return directory


@pytest.mark.parametrize("kind", [*STOCK, *SPECTRAL])
def test_every_kind_is_a_configuration(kind: str, model: Path) -> None:
    plugin.register()
    selector._cached_get_attn_backend.cache_clear()
    arguments: dict[str, Any] = arguments_of(kind, model, cuda=True)
    sizes = capture_sizes([1, 8, 32], 256)
    config: VllmConfig = EngineArgs(
        str(model), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=32768 + 80,
        max_num_seqs=256, compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes},
        **arguments,
    ).create_engine_config()  # fmt: skip
    assert config.compilation_config.cudagraph_capture_sizes == sizes
    with set_current_vllm_config(config):
        found = selector.get_attn_backend(128, torch.bfloat16, config.cache_config.cache_dtype)
    assert found.get_name() == BACKENDS[kind]

"""A vLLM configuration with our backend, and attention layers made as a model makes them; on a GPU, or as if."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.pretend import pretend_cuda, pretending

if pretending():
    pretend_cuda()

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tests.conftest import DIM
from tests.engine.tiny import make_tiny
from vllm_spectral.backend import impl
from vllm_spectral.plugin import CUDA_BACKEND

QUERY_HEADS, KV_HEADS, LAYERS = 4, 2, 2
BLOCK = 32


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny model, its profile within."""
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny(directory, heads=QUERY_HEADS, kv_heads=KV_HEADS, slot_bytes=64)
    return directory


@pytest.fixture
def configured(tiny: Path) -> Iterator[Callable[..., VllmConfig]]:
    """Make vLLM's configuration; keys of the spectral entry, and vLLM's arguments."""
    register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)

    def make(spectral: dict[str, Any] | None = None, **arguments: Any) -> VllmConfig:
        entry = {"profile": str(tiny / "tiny.spectral"), "allow_unproven_device": True} | (spectral or {})
        defaults: dict[str, Any] = {
            "attention_backend": "CUSTOM", "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 512,
            "max_num_seqs": 4, "max_num_batched_tokens": 512, "additional_config": {"spectral": entry},
        }  # fmt: skip
        return EngineArgs(str(tiny), **(defaults | arguments)).create_engine_config()

    selector._cached_get_attn_backend.cache_clear()
    yield make
    selector._cached_get_attn_backend.cache_clear()


@dataclass
class Loaded:
    """Attention layers as after loading, and the configuration that knows them."""

    config: VllmConfig
    layers: list[Attention]
    names: list[str]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loaded]:
    """Make the model's attention layers the way vLLM's loader does, with its device as torch's default."""

    def make(config: VllmConfig, device: str, *, rank: int = 0, world: int = 1) -> Loaded:
        monkeypatch.setattr(impl, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(impl, "get_tensor_model_parallel_world_size", lambda: world)
        names = [f"model.layers.{index}.self_attn.attn" for index in range(LAYERS)]
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with set_current_vllm_config(config):
                with torch.device(device):
                    layers = [
                        Attention(
                            QUERY_HEADS // world, DIM, DIM**-0.5, num_kv_heads=KV_HEADS // world,
                            cache_config=config.cache_config, prefix=name,
                        )
                        for name in names
                    ]  # fmt: skip
                for layer in layers:
                    layer.process_weights_after_loading(torch.bfloat16)
        finally:
            torch.set_default_dtype(before)
        return Loaded(config, layers, names)

    return make

"""What vLLM is told on CUDA: the backend's name, what it accepts, what it refuses and in which words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm_spectral_server.launch import default_flags, refuse, require_device

from vllm_spectral import plugin
from vllm_spectral.backend.cuda import SpectralCUDABackend, SpectralCUDAImpl
from vllm_spectral.backend.engine import OfflineEngine
from vllm_spectral.backend.metadata import SpectralMetadataBuilder
from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.models.known import SUPPORTED_HEAD_DIMS

Configured = Callable[..., VllmConfig]


def selected(config: VllmConfig, **asked: Any) -> Any:
    """What vLLM selects for a layer."""
    with set_current_vllm_config(config):
        return get_attn_backend(**({"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto"} | asked))


def test_the_plugin_registers_custom_and_says_what_was_not_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is SpectralCUDABackend
    assert "not yet run on a GPU" in caplog.text and "NO effect" in caplog.text
    assert "vllm_spectral" not in AttentionBackendEnum.FLASH_ATTN.get_path()


@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_supported_is_selected(configured: Configured, head_size: int, dtype: torch.dtype) -> None:
    assert selected(configured(), head_size=head_size, dtype=dtype) is SpectralCUDABackend


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"head_size": 72}, "head_size not supported"),
        ({"head_size": 512}, "head_size not supported"),
        ({"dtype": torch.float32}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype not supported"),
        ({"has_sink": True}, "attention sinks not supported"),
        ({"has_sliding_window": True}, "sliding window not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    ],
)
def test_what_is_not_is_refused(configured: Configured, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        selected(configured(), **asked)


@pytest.mark.parametrize(
    ("spectral", "arguments", "words"),
    [
        ({"allow_unproven_device": False}, {}, "not yet run on a GPU.*--experimental-cuda"),
        ({"mode": "calibrate"}, {}, "mode calibrate is for the CPU"),
        ({"mode": "compare"}, {}, "mode compare is for the CPU"),
        ({"unknown": 1}, {}, "unknown keys: unknown"),
        ({}, {"block_size": 48}, "block_size not supported"),
    ],
)
def test_what_the_configuration_forbids(
    configured: Configured, spectral: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        selected(configured(spectral, **arguments))


def test_older_gpus_are_refused(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_, **__: DeviceCapability(8, 0))
    with pytest.raises(ValueError, match="compute capability not supported"):
        selected(configured())


def test_blocks_are_whole_tiles(configured: Configured) -> None:
    """VLLM's default of 16 tokens is none."""
    with set_current_vllm_config(configured()):
        assert [SpectralCUDABackend.get_preferred_block_size(size) for size in (16, 64, 65)] == [64, 64, 128]
    assert SpectralCUDABackend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)


def test_graphs_are_claimed_for_single_token_decodes_only(configured: Configured) -> None:
    support = SpectralMetadataBuilder.get_cudagraph_support(configured(), None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def test_the_implementation_is_ours_when_asked_for_and_flash_attention_otherwise(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with set_current_vllm_config(configured()):
        assert SpectralCUDABackend.get_impl_cls() is SpectralCUDAImpl
    with set_current_vllm_config(configured(additional_config={})):
        assert SpectralCUDABackend.get_impl_cls() is FlashAttentionImpl
    # What the selection has cached for one engine must not let the next one in.
    careful = configured({"allow_unproven_device": False})
    with set_current_vllm_config(careful), pytest.raises(ConfigError, match="not yet run on a GPU"):
        SpectralCUDABackend.get_impl_cls()
    with set_current_vllm_config(configured()):
        monkeypatch.setenv("VLLM_SPECTRAL_DISABLE", "1")
        assert SpectralCUDABackend.get_impl_cls() is FlashAttentionImpl


@pytest.mark.parametrize(("asked", "refused"), [(False, True), (True, False)])
def test_serve_asks_to_be_told_that_it_may(asked: bool, refused: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = SpectralConfig(allow_unproven_device=asked)
    if refused:
        with pytest.raises(ConfigError, match=r"not yet run on a GPU.*--experimental-cuda"):
            require_device(config)
    else:
        require_device(config)


def test_serve_names_our_backend_and_refuses_another() -> None:
    flags = default_flags([], "any")
    assert flags[flags.index("--attention-backend") + 1] == "CUSTOM" and "--enforce-eager" not in flags
    parser = make_arg_parser(FlexibleArgumentParser())
    refuse(parser.parse_args(["--model", "any", *flags]))
    given = ["--attention-backend", "FLASH_ATTN"]
    with pytest.raises(ConfigError, match="FLASH_ATTN: it would serve vLLM's own cache"):
        refuse(parser.parse_args(["--model", "any", *default_flags(given, "any"), *given]))


def test_calibration_and_evaluation_are_refused_before_anything_is_loaded(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="run on the CPU"):
        OfflineEngine(ModelDescription.from_directory(tiny), None, max_model_len=64, max_num_seqs=1, kv_cache_tokens=64)

"""The tier's size: fixed, configured or derived, and taken out of the memory that vLLM was given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spectral.backend.exact_tier import ExactTier, LayerCopies
from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.exact.window import LARGEST_SHARE

LAYERS, HEADS, DIM = 30, 3, 64
TOKEN = 2 * 2 * LAYERS * HEADS * DIM
REQUEST = 80 * TOKEN
"""A group of 8 first tokens; 63 recent ones lie in at most 9 groups."""


def vllm(given: int | None, *, seqs: int = 256, speculative: int = 0) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(block_size=32, kv_cache_memory_bytes=given, gpu_memory_utilization=0.5),
        scheduler_config=SimpleNamespace(max_num_seqs=seqs),
        speculative_config=SimpleNamespace(num_speculative_tokens=speculative) if speculative else None,
    )


def reserve(config: Any, **fields: Any) -> ExactTier | None:
    return ExactTier.reserve(config, SpectralConfig(**fields), num_layers=LAYERS, num_heads=HEADS, head_dim=DIM)


def test_a_configured_size_is_taken_out_of_the_memory_given() -> None:
    config = vllm(1 << 30)
    tier = reserve(config, exact_bytes=10 * REQUEST + 5)
    assert tier is not None
    assert tier.num_bytes == 10 * REQUEST
    assert tier.requests == 10
    assert config.cache_config.kv_cache_memory_bytes == (1 << 30) - 10 * REQUEST
    copies = LayerCopies(tier, HEADS, DIM, torch.device("cpu"))
    assert copies.resident_bytes * LAYERS == tier.num_bytes


def test_by_default_it_is_what_all_requests_need_or_a_share() -> None:
    few = reserve(vllm(1 << 30, seqs=4))
    assert few is not None
    assert few.num_bytes == 4 * REQUEST
    many = reserve(vllm(1 << 30))
    assert many is not None
    assert 0.99 * (1 << 30) / LARGEST_SHARE < many.num_bytes <= (1 << 30) / LARGEST_SHARE


def test_a_small_cache_still_gets_one_window_and_a_tiny_one_none() -> None:
    small = reserve(vllm(4 * REQUEST + 4))
    assert small is not None
    assert small.requests == 1
    tiny = vllm(8 * TOKEN)
    assert reserve(tiny) is None
    assert tiny.cache_config.kv_cache_memory_bytes == 8 * TOKEN


def test_where_vllm_measures_its_memory_nothing_is_lowered() -> None:
    config = vllm(None, seqs=2)
    tier = reserve(config)
    assert tier is not None
    assert tier.num_bytes == 2 * REQUEST
    assert config.cache_config.kv_cache_memory_bytes is None


def test_speculative_tokens_are_kept_as_well() -> None:
    tier = reserve(vllm(1 << 30, speculative=8), exact_bytes=1 << 24)
    assert tier is not None
    assert tier.directory.window.kept == 63 + 8


@pytest.mark.parametrize("fields", [{"exact_bytes": 0}, {"exact_first_tokens": 0, "exact_recent_tokens": 0}])
def test_it_can_be_switched_off(fields: dict[str, int]) -> None:
    assert reserve(vllm(1 << 30), **fields) is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"at least {REQUEST} bytes"):
        reserve(vllm(1 << 30), exact_bytes=REQUEST - 1)
    with pytest.raises(ConfigError, match="leave nothing"):
        reserve(vllm(2 * REQUEST), exact_bytes=2 * REQUEST)


def test_a_copy_is_the_same_for_its_own_step_and_for_later_ones() -> None:
    """Also where the model runs in float32: both go through the pool's dtype."""
    tier = reserve(vllm(1 << 30), exact_bytes=2 * REQUEST)
    assert tier is not None
    copies = LayerCopies(tier, HEADS, DIM, torch.device("cpu"))
    keys, values = torch.randn(2, 20, HEADS, DIM)
    blocks, slots = torch.tensor([[1, 2]]).numpy(), torch.arange(32, 52).numpy()
    plan = tier.directory.step(blocks, torch.tensor([20]).numpy(), torch.tensor([20]).numpy(), slots)
    copies.write(plan, keys, values)
    now = copies.read(plan, 0, 20, keys, values)
    later = tier.directory.step(
        blocks, torch.tensor([21]).numpy(), torch.tensor([1]).numpy(), torch.tensor([52]).numpy()
    )
    copies.write(later, keys[:1], values[:1])
    then = copies.read(later, 0, 21, keys[:1], values[:1])
    assert then.positions.tolist() == list(range(21))
    assert torch.equal(then.keys[:20], now.keys)
    assert torch.equal(then.values[:20], now.values)

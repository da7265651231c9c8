"""The store kernel writes the bytes that the reference writes, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.conftest import ISAS, codec_of, kernels, tokens
from vllm_spectral.codec.layout import FLAT_FLAG
from vllm_spectral.kernels.layer import NativeLayer

SHAPES = [(3, 64, 3.0), (1, 128, 4.0), (2, 32, 4.5), (2, 80, 2.5), (1, 256, 3.0), (2, 96, 6.0), (1, 64, 1.5)]


def stored(heads: int, dim: int, bits: float, isa: str, count: int, seed: int, block: int, dtype: torch.dtype,
           basis: str = "spectral") -> None:  # fmt: skip
    codec = codec_of(heads, dim, bits, basis)
    keys, values = tokens(count, seed, heads, dim, dtype), tokens(count, seed + 1, heads, dim, dtype)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // block) + 2
    expected = torch.randint(0, 256, (blocks, heads, block, codec.layout.slot_bytes), generator=generator).to(
        torch.uint8
    )
    found = expected.clone()
    mapping = torch.randperm(blocks * block, generator=generator)[:count]
    mapping[3::7] = -1
    codec.layout.write(expected, mapping, codec.encode(keys, values))
    NativeLayer(codec, kernels(isa)).store(keys, values, found, mapping)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "dim", "bits"), SHAPES)
def test_bytes_equal_the_references(heads: int, dim: int, bits: float, isa: str) -> None:
    stored(heads, dim, bits, isa, 300, 0, 32, torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS)
@given(
    count=st.integers(1, 70), seed=st.integers(0, 2**20), block=st.sampled_from([32, 96, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), basis=st.sampled_from(["spectral", "hadamard"]),
)  # fmt: skip
def test_bytes_equal_for_any_step(isa: str, count: int, seed: int, block: int, dtype: torch.dtype, basis: str) -> None:
    stored(2, 64, 3.0, isa, count, seed, block, dtype, basis)


@pytest.mark.parametrize("isa", ISAS)
def test_bytes_equal_of_vectors_that_are_not_finite(isa: str) -> None:
    """Infinite, no number, or too large for a square: a broken model's tokens are stored as the reference stores them."""
    codec = codec_of(2, 64, 3.0)
    keys, values = tokens(40, 5, 2, 64, torch.bfloat16), tokens(40, 6, 2, 64, torch.bfloat16)
    for row, x in ((2, torch.inf), (5, torch.nan), (9, 1e20), (17, -torch.inf)):
        keys[row, 0, 3], values[row + 1, 1, 60] = x, x
    keys[30], values[31] = torch.nan, 3e38
    expected = torch.zeros(2, 2, 32, codec.layout.slot_bytes, dtype=torch.uint8)
    found = expected.clone()
    codec.layout.write(expected, torch.arange(40), codec.encode(keys, values))
    NativeLayer(codec, kernels(isa)).store(keys, values, found, torch.arange(40))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_may_be_strided(isa: str) -> None:
    """The model hands over views of one projection's output."""
    codec = codec_of(3, 64, 3.0)
    fused = tokens(40, 3, 9, 64, torch.bfloat16)
    keys, values = fused[:, 3:6], fused[:, 6:9]
    pages = torch.zeros(2, 3, 32, codec.layout.slot_bytes, dtype=torch.uint8)
    expected = pages.clone()
    codec.layout.write(expected, torch.arange(40), codec.encode(keys, values))
    NativeLayer(codec, kernels(isa)).store(keys, values, pages, torch.arange(40))
    assert torch.equal(pages, expected)


def test_the_samples_take_the_fallback_and_leave_it() -> None:
    """Otherwise the tests above would not see it."""
    codec = codec_of(3, 64, 3.0)
    slots = codec.encode(tokens(300, 0, 3, 64, torch.bfloat16), tokens(300, 1, 3, 64, torch.bfloat16))
    share = (slots[..., :2] >= FLAT_FLAG).float().mean(dim=(0, 1))
    assert (share > 0.02).all() and (share < 0.5).all()

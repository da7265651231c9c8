"""The store kernel writes the bytes that the reference and the CPU's kernel write."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import codec_of, tokens
from tests.triton.device.cases import DEVICE, SHAPES, layer_of, store
from vllm_spectral.codec.layout import FLAT_FLAG
from vllm_spectral.kernels.interface import Exact, Pool
from vllm_spectral.kernels.layer import NativeLayer


def stored(
    heads: int, dim: int, bits: float, count: int, seed: int, block: int, dtype: torch.dtype, basis: str
) -> None:
    codec = codec_of(heads, dim, bits, basis)
    keys, values = tokens(count, seed, heads, dim, dtype), tokens(count, seed + 1, heads, dim, dtype)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // block) + 2
    pages = torch.randint(0, 256, (blocks, heads, block, codec.layout.slot_bytes), generator=generator).to(torch.uint8)
    expected, native = pages.clone(), pages.clone()
    slots = torch.randperm(blocks * block, generator=generator)[:count]
    slots[3::7] = -1
    slots_there = codec.encode(keys, values)
    assert (slots_there[..., :2] >= FLAT_FLAG).any(), "the sample must take the fallback"
    codec.layout.write(expected, slots, slots_there)
    store(codec, keys, values, pages, slots)
    assert torch.equal(pages, expected)
    # What one device writes the other reads: the bytes are the same.
    NativeLayer(codec).store(keys, values, native, slots)
    assert torch.equal(pages, native)


@pytest.mark.parametrize(("heads", "dim", "bits", "group"), SHAPES)
def test_bytes_equal_the_references_and_the_cpus(heads: int, dim: int, bits: float, group: int) -> None:
    # One head of most: the interpreter is slow.
    stored(2 if dim == 32 else 1, dim, bits, 64, 0, 32, torch.bfloat16, "spectral")


@pytest.mark.parametrize(
    ("count", "seed", "block", "dtype", "basis"),
    [
        (1, 5, 32, torch.bfloat16, "spectral"),
        (33, 6, 96, torch.float32, "hadamard"),
        (70, 7, 128, torch.float16, "spectral"),
    ],
)
def test_bytes_equal_for_any_step(count: int, seed: int, block: int, dtype: torch.dtype, basis: str) -> None:
    stored(1, 64, 3.0, count, seed, block, dtype, basis)


def test_bytes_equal_of_vectors_that_are_not_finite() -> None:
    codec = codec_of(1, 64, 3.0)
    keys, values = tokens(20, 5, 1, 64, torch.bfloat16), tokens(20, 6, 1, 64, torch.bfloat16)
    for row, x in ((2, torch.inf), (5, torch.nan), (9, 1e20)):
        keys[row, 0, 3], values[row + 1, 0, 60] = x, x
    keys[15] = torch.nan
    pages = torch.zeros(1, 1, 32, codec.layout.slot_bytes, dtype=torch.uint8)
    expected = pages.clone()
    codec.layout.write(expected, torch.arange(20), codec.encode(keys, values))
    store(codec, keys, values, pages, torch.arange(20))
    assert torch.equal(pages, expected)


def test_rows_may_be_strided() -> None:
    """The model hands over views of one projection's output."""
    codec = codec_of(1, 64, 3.0)
    fused = tokens(20, 3, 3, 64, torch.bfloat16).to(DEVICE)
    pages = torch.zeros(1, 1, 32, codec.layout.slot_bytes, dtype=torch.uint8, device=DEVICE)
    expected = pages.cpu()
    codec.layout.write(expected, torch.arange(20), codec.encode(fused[:, 1:2].cpu(), fused[:, 2:3].cpu()))
    layer_of(codec).store(fused[:, 1:2], fused[:, 2:3], pages, torch.arange(20, device=DEVICE))
    assert torch.equal(pages.cpu(), expected)


def test_copies_go_where_the_plan_says() -> None:
    codec, heads, dim = codec_of(2, 80, 2.5), 2, 80
    keys, values = (torch.randn(6, heads, dim, device=DEVICE) for _ in range(2))
    pool = Pool(*(torch.zeros(3, heads, 8, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
    write_tokens, write_rows = torch.tensor([5, 0, 3], device=DEVICE), torch.tensor([17, -1, 8], device=DEVICE)
    rows = torch.zeros(1, 0, dtype=torch.int32, device=DEVICE)
    layer_of(codec).keep(keys, values, pool, Exact(write_tokens, write_rows, rows, 0, 0))
    for copies, source in ((pool.keys, keys), (pool.values, values)):
        expected = torch.zeros_like(copies)
        expected[2, :, 1], expected[1, :, 0] = source[5].bfloat16(), source[3].bfloat16()
        assert torch.equal(copies, expected)

"""Whatever a profile that loads, a model and a page may hold, the kernels stay inside their memory.

Guard bytes see what is written outside; ``make sanitize`` sees what is read.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.conftest import ISAS, kernels
from vllm_spectral.codec.codebook import MAX_BITS, Codebooks, normal_codebooks
from vllm_spectral.codec.layout import key_words, slot_bytes_for, value_words
from vllm_spectral.codec.rotation import hadamard_basis
from vllm_spectral.kernels.interface import Requests
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.profile.soundness import LARGEST

HEADS, BLOCK, TOKENS, GUARD = 2, 32, 45, 0xA5
NUMBERS = (0.0, 1.0, -1.0, 1e-38, 1e30, -3e38, float("inf"), float("-inf"), float("nan"))


@st.composite
def layers(draw: st.DrawFn) -> tuple[LayerProfile, int]:
    """A layer of any bits, spectra and sinks that ``require_sound`` lets pass, and the slot's size."""
    dim = draw(st.sampled_from([32, 64, 80, 128]))
    widths = st.lists(st.integers(0, MAX_BITS), min_size=dim // 2, max_size=dim // 2)
    keys = torch.tensor([draw(widths) for _ in range(HEADS)]).repeat_interleave(2, dim=1)
    values = torch.tensor([draw(widths) + draw(widths) for _ in range(HEADS)])
    words = max(key_words(k) + value_words(v) for k, v in zip(keys.tolist(), values.tolist(), strict=True))
    slot = min(-(-(2 * words + 2) // 8) * 8 + draw(st.sampled_from([0, 8, 64])), slot_bytes_for(MAX_BITS, dim) + 8)
    size = draw(st.sampled_from([0.0, 1e-30, 1.0, LARGEST]))
    spectrum = torch.linspace(1, 0, dim).expand(HEADS, dim) * size
    sink = torch.linspace(-1, 1, dim).expand(HEADS, dim) * draw(st.sampled_from([0.0, 1.0, LARGEST]))
    basis = hadamard_basis(HEADS, dim)
    return LayerProfile(basis, basis, spectrum, spectrum, sink, sink, keys.byte(), values.byte()), slot


@pytest.mark.parametrize("isa", ISAS)
@given(case=layers(), noise=st.sampled_from(NUMBERS), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_kernels_stay_inside_their_pages(isa: str, case: tuple[LayerProfile, int], noise: float, seed: int) -> None:
    layer, slot = case
    native = NativeLayer(layer.codec(slot, Codebooks(normal_codebooks())), kernels(isa))
    dim = layer.key_bits.shape[1]
    generator = torch.Generator().manual_seed(seed)
    keys, values, query = (torch.randn(TOKENS, HEADS, dim, generator=generator) for _ in range(3))
    for tensor in (keys, values, query):
        tensor.view(-1)[seed::97] = noise
    # Pages of garbage: what a request finds in them is never more than bytes.
    pages = torch.randint(0, 256, (5, HEADS, BLOCK, slot), generator=generator).to(torch.uint8)
    guarded = torch.full((7, HEADS, BLOCK, slot), GUARD, dtype=torch.uint8)
    guarded[1:6] = pages
    native.store(keys, values, guarded[1:6], torch.randperm(4 * BLOCK, generator=generator)[:TOKENS] + BLOCK)
    output = torch.full((TOKENS + 2, HEADS, dim), 7.0, dtype=torch.bfloat16)
    requests = Requests(
        torch.tensor([[4, 0, 2]], dtype=torch.int32), torch.tensor([0, TOKENS], dtype=torch.int32),
        torch.tensor([TOKENS + 40], dtype=torch.int32),
    )  # fmt: skip
    inner = output[1:-1]
    native.attend(query.bfloat16(), keys.bfloat16(), values.bfloat16(), guarded[1:6], requests, inner, dim**-0.5)
    assert bool((guarded[0] == GUARD).all()) and bool((guarded[6] == GUARD).all())
    assert torch.equal(guarded[1], pages[0]), "a block that nothing was stored in"
    assert bool((output[0] == 7).all()) and bool((output[-1] == 7).all())

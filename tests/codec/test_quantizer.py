"""Quantization: as good as its codebooks promise, and no token's bytes depend on another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DIM, HEADS, correlated
from tests.tolerances import CODING_GAIN
from vllm_spectral.calibration.allocate import hadamard_layer
from vllm_spectral.codec.codebook import MAX_BITS, Codebooks, normal_codebooks, normal_distortion
from vllm_spectral.codec.layout import FLAT_FLAG
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import rotate
from vllm_spectral.profile.schema import LayerProfile


@pytest.fixture(scope="module")
def codec(layer: LayerProfile) -> LayerCodec:
    return layer.codec(64, Codebooks(normal_codebooks()))


def test_the_error_is_what_the_codebooks_predict(codec: LayerCodec) -> None:
    values = correlated(4000, seed=3)
    error = codec.decode_values(codec.encode(values, values)) - rotate(values, codec.values.basis)
    curve = torch.tensor(normal_distortion())
    predicted = (codec.values.width.square() * curve[codec.values.spectral.bits]).sum(-1)
    assert (error.square().sum(-1).mean(0) < CODING_GAIN * predicted).all()


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 70),
    scale=st.floats(1e-6, 1e4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_stored_bytes_never_depend_on_neighbours(
    codec: LayerCodec, seed: int, tokens: int, scale: float, dtype: torch.dtype
) -> None:
    keys = (correlated(tokens, seed) * scale).to(dtype)
    values = correlated(tokens, seed + 1).to(dtype)
    together = codec.encode(keys, values)
    split = tokens // 2
    apart = torch.cat([codec.encode(keys[:split], values[:split]), codec.encode(keys[split:], values[split:])])
    alone = codec.encode(keys[-1:], values[-1:])
    assert torch.equal(together, apart)
    assert torch.equal(together[-1:], alone)


def test_outliers_survive(codec: LayerCodec) -> None:
    """A vector along weak channels is noise to the spectral codes; the fallback keeps it."""
    rotated = torch.zeros(1, HEADS, DIM)
    rotated[..., -8:] = 3.0
    keys = torch.einsum("thc,hdc->thd", rotated, codec.keys.basis)
    slots = codec.encode(keys, keys)
    assert (slots[..., :2] >= FLAT_FLAG).all()
    assert (codec.decode_keys(slots) - rotated).norm() < 0.3 * rotated.norm()


def test_the_typical_first_token_is_stored_almost_exactly(layer: LayerProfile) -> None:
    """Sinks resemble each other; the fallback codes the difference from their mean."""
    sink = 20 * correlated(1, seed=77)[0]
    codec = LayerProfile(**{**vars(layer), "key_sink": sink, "value_sink": sink}).codec(
        64, Codebooks(normal_codebooks())
    )
    token = (sink + 0.01 * correlated(1, seed=78)[0]).unsqueeze(0)
    slots = codec.encode(token, token)
    assert (slots[..., :2] >= FLAT_FLAG).all()
    expected = rotate(token, codec.values.basis)
    assert (codec.decode_values(slots) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4])
def test_extremes_stay_finite(codec: LayerCodec, value: float) -> None:
    keys = torch.full((3, HEADS, DIM), value)
    slots = codec.encode(keys, keys)
    for decoded in (codec.decode_keys(slots), codec.decode_values(slots)):
        assert torch.isfinite(decoded).all()


def test_a_zero_vector_stays_small(codec: LayerCodec) -> None:
    zero = torch.zeros(1, HEADS, DIM)
    assert codec.decode_values(codec.encode(zero, zero)).abs().max() < 0.05


@pytest.mark.parametrize("dim", [32, 80, 128])
def test_the_hadamard_basis_takes_the_same_path(dim: int) -> None:
    codec = hadamard_layer(2, dim, 2 * dim * 4 // 8, seed=0).codec(2 * dim * 4 // 8, Codebooks(normal_codebooks()))
    keys = torch.randn(200, 2, dim, generator=torch.Generator().manual_seed(0))
    error = codec.decode_keys(codec.encode(keys, keys)) - rotate(keys, codec.keys.basis)
    assert error.square().mean() < 0.02


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0])
def test_more_bits_give_less_error(bits: float) -> None:
    from tests.conftest import measured
    from vllm_spectral.calibration.allocate import spectral_layer
    from vllm_spectral.codec.layout import slot_bytes_for

    values = correlated(500, seed=11)

    def error(at: float) -> float:
        size = slot_bytes_for(at, DIM)
        codec = spectral_layer(measured(), size).codec(size, Codebooks(normal_codebooks()))
        decoded = codec.decode_values(codec.encode(values, values))
        return float((decoded - rotate(values, codec.values.basis)).square().sum())

    assert error(bits) < error(bits - 0.5)


def test_codes_are_those_of_the_nearest_level() -> None:
    books = Codebooks(normal_codebooks())
    values = torch.randn(20000, 1, 1, generator=torch.Generator().manual_seed(0)) * 1.5
    for bits in range(MAX_BITS + 1):
        width = torch.full((1, 1), bits)
        nearest = (values - books.levels[bits, : 2**bits]).abs().amin(-1, keepdim=True)
        found = (values - books.levels_of(books.nearest_codes(values, width), width)).abs()
        torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)


def test_levels_are_exact_in_bf16() -> None:
    levels = normal_codebooks()
    assert torch.equal(levels.bfloat16().float(), levels)
    for bits in range(1, MAX_BITS + 1):
        assert (levels[bits, : 2**bits].diff() > 0).all(), "rounding must not merge levels"

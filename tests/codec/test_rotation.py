"""The rotation convention: ``h @ U`` with eigenvectors as columns, sorted by falling eigenvalue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import DIM, HEADS, correlated, measured
from tests.tolerances import ORTHOGONAL, WRONG_ROTATION
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import eigenbasis, hadamard_basis, rotate, unrotate
from vllm_spectral.profile.schema import LayerProfile


def coding_error(layer: LayerProfile, key_basis: torch.Tensor, keys: torch.Tensor) -> float:
    """Relative error of keys stored with this basis, in the model's own coordinates."""
    codec = LayerProfile(**{**vars(layer), "key_basis": key_basis}).codec(64, Codebooks(normal_codebooks()))
    slots = codec.encode(keys, torch.zeros_like(keys))
    restored = unrotate(codec.decode_keys(slots), key_basis)
    return float((restored - keys).square().sum() / keys.square().sum())


def test_the_leading_channels_hold_the_energy() -> None:
    moments = measured()
    basis, spectrum = eigenbasis(moments.keys / moments.num_tokens)
    energy = rotate(correlated(2000, seed=5), basis).square().mean(0)
    torch.testing.assert_close(energy, spectrum, rtol=0.25, atol=1e-3)
    assert (energy[:, : DIM // 8].sum(-1) > 0.5 * energy.sum(-1)).all()


def test_the_transposed_rotation_fails(layer: LayerProfile) -> None:
    """``h @ U.T`` is orthogonal too, but with uneven bits it stores noise."""
    keys = correlated(500, seed=6)
    right = coding_error(layer, layer.key_basis, keys)
    wrong = coding_error(layer, layer.key_basis.transpose(-1, -2).contiguous(), keys)
    assert right < 0.005
    assert wrong > WRONG_ROTATION * right


def test_unsorted_eigenvectors_fail(layer: LayerProfile) -> None:
    """The bits fall with the channel; eigenvectors in another order get bits meant for others."""
    keys = correlated(500, seed=7)
    shuffled = layer.key_basis[..., torch.randperm(DIM, generator=torch.Generator().manual_seed(0))]
    assert coding_error(layer, shuffled, keys) > WRONG_ROTATION * coding_error(layer, layer.key_basis, keys)


def test_eigenvalues_fall_and_signs_are_fixed() -> None:
    basis, spectrum = eigenbasis(measured().keys)
    assert (spectrum.diff(dim=-1) <= 0).all()
    again, _ = eigenbasis(measured().keys)
    assert torch.equal(basis, again)


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256])
def test_a_hadamard_basis_exists_for_every_head_size(dim: int) -> None:
    basis = hadamard_basis(2, dim).double()
    torch.testing.assert_close(basis.transpose(-1, -2) @ basis, torch.eye(dim).double().expand(2, -1, -1))


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 8))
def test_unrotate_inverts_rotate(seed: int, tokens: int) -> None:
    basis = hadamard_basis(HEADS, DIM, seed)
    vectors = correlated(tokens, seed)
    torch.testing.assert_close(unrotate(rotate(vectors, basis), basis), vectors, rtol=ORTHOGONAL, atol=ORTHOGONAL)


def test_only_one_file_multiplies_by_a_basis() -> None:
    """The codec object never touches a basis but through the two functions."""
    import inspect

    from vllm_spectral.codec import attention, quantizer

    for module in (attention, quantizer):
        source = inspect.getsource(module)
        assert "basis @" not in source
        assert "@ coding.basis" not in source
    assert LayerCodec.encode.__doc__

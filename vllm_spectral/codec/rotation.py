"""The one place where vectors are rotated.

Convention: a basis ``U`` holds its vectors as **columns** (what ``torch.linalg.eigh`` returns),
and row vectors are rotated by ``h @ U``. Channel ``c`` of the result is the component of ``h``
along column ``c``. ``h @ U.T`` looks just as orthogonal, but it spreads the energy instead of
sorting it, and with uneven bits the result is noise; nothing outside this file multiplies by a basis.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(vectors: Tensor, basis: Tensor) -> Tensor:
    """Rotate row vectors into the basis: ``vectors @ basis``.

    The product is accumulated in float64. BLAS sums in an order that varies with the batch size;
    in float32 that order would now and then flip a stored code, and a token's bytes would then
    depend on its neighbours in the batch.

    Args:
        vectors: ``[..., num_heads, head_dim]``, any float dtype.
        basis: ``[num_heads, head_dim, head_dim]``, orthogonal, basis vectors as columns.

    Returns:
        ``[..., num_heads, head_dim]`` float32.
    """
    return _per_head_product(vectors, basis)


def unrotate(vectors: Tensor, basis: Tensor) -> Tensor:
    """Invert :func:`rotate`: ``vectors @ basis.T``, for attention outputs and never for the cache.

    Args:
        vectors: ``[..., num_heads, head_dim]`` rotated, any float dtype.
        basis: ``[num_heads, head_dim, head_dim]``, the basis they were rotated with.

    Returns:
        ``[..., num_heads, head_dim]`` float32.
    """
    return _per_head_product(vectors, basis.transpose(-1, -2))


def channel_energy(second_moment: Tensor, basis: Tensor) -> Tensor:
    """The energy that each rotated channel has: the diagonal of the second moment in the basis.

    Args:
        second_moment: ``[num_heads, head_dim, head_dim]`` float64, of vectors that are not rotated; a sum or a mean.
        basis: ``[num_heads, head_dim, head_dim]``, basis vectors as columns.

    Returns:
        ``[num_heads, head_dim]`` float64.
    """
    return ((second_moment @ basis.double()) * basis).sum(-2)


def second_moment(basis: Tensor, spectrum: Tensor) -> Tensor:
    """The second moment with these axes and energies and no correlation between channels.

    For an eigenbasis it is what :func:`eigenbasis` was given.

    Args:
        basis: ``[num_heads, head_dim, head_dim]``, basis vectors as columns.
        spectrum: ``[num_heads, head_dim]``, energy of each rotated channel.

    Returns:
        ``[num_heads, head_dim, head_dim]`` float64.
    """
    axes = basis.double()
    return (axes * spectrum.double()[:, None]) @ axes.transpose(-1, -2)


def _per_head_product(vectors: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("...hd,hde->...he", vectors.double(), matrices.double()).float()


def eigenbasis(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Principal axes of a second moment, strongest first.

    Args:
        second_moment: ``[num_heads, head_dim, head_dim]`` symmetric, ``E[h h^T]``.

    Returns:
        ``(basis, spectrum)``: ``[num_heads, head_dim, head_dim]`` float32 with eigenvectors as columns, and
        ``[num_heads, head_dim]`` float32 eigenvalues, both sorted by falling eigenvalue. The sign of each
        column is fixed (its largest entry is positive) so that equal moments give equal profiles.
    """
    spectrum, basis = torch.linalg.eigh(second_moment.double())
    spectrum, basis = spectrum.flip(-1), basis.flip(-1)
    peak = basis.abs().argmax(dim=-2, keepdim=True)
    basis = basis * basis.gather(-2, peak).sign()
    return basis.float().contiguous(), spectrum.clamp_min(0.0).float().contiguous()


def hadamard_basis(num_heads: int, head_dim: int, seed: int = 0) -> Tensor:
    """A Hadamard basis with random signs: the basis that needs no calibration.

    It spreads every vector evenly over the channels. For a ``head_dim`` that is not a power of two the odd
    factor is an orthonormal DCT-II, so that every head size has a basis of this kind.

    Args:
        num_heads: KV heads; each gets its own signs.
        head_dim: channels per head.
        seed: seed of the signs.

    Returns:
        ``[num_heads, head_dim, head_dim]`` float32, orthogonal.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (num_heads, head_dim, 1), generator=generator).double() * 2 - 1
    return (signs * hadamard_matrix(head_dim)).float()


def hadamard_matrix(head_dim: int) -> Tensor:
    """Sylvester's Hadamard matrix, orthonormal; for a size that is no power of two, times a DCT-II of the odd factor.

    Returns:
        ``[head_dim, head_dim]`` float64.
    """
    odd = head_dim
    while odd % 2 == 0:
        odd //= 2
    index = torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(torch.pi * (2 * index[:, None] + 1) * index[None, :] / (2 * odd))
    matrix = matrix / matrix.norm(dim=0)
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while matrix.shape[0] < head_dim:
        matrix = torch.kron(sylvester, matrix)
    return matrix

"""The references of rivals do what their kernels do, as far as it can be stated independently."""

from __future__ import annotations

import pytest
import torch

from vllm_spectral.errors import ConfigError
from vllm_spectral.rivals import RIVALS, Rival, rival
from vllm_spectral.rivals.attention import windowed_attention

TOKENS, HEADS, DIM = 60, 3, 64


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


@pytest.mark.parametrize(
    ("name", "bits"),
    [("turboquant_k4v4", 4.375), ("turboquant_k3v3", 3.375), ("turboquant_k2v2", 2.375), ("int4_per_token_head", 4.5)],
)
def test_bits_are_those_of_the_facts(name: str, bits: float) -> None:
    assert rival(name).bits(DIM) == bits


def test_unknown_names_are_refused() -> None:
    for name in ("turboquant_k5v5", "turboquant", "int8"):
        with pytest.raises(ConfigError, match="unknown rival"):
            rival(name)
    assert rival("turboquant_k4v3").bits(DIM) == 3.875


def test_turboquant_keys_keep_their_norm() -> None:
    keys, _ = rival("turboquant_k3v3").restore(vectors(0), vectors(1))
    torch.testing.assert_close(keys.norm(dim=-1), vectors(0).norm(dim=-1), rtol=1e-3, atol=0)


def test_turboquant_values_lie_on_a_grid_between_minimum_and_maximum() -> None:
    values = vectors(1)
    _, restored = rival("turboquant_k4v2").restore(vectors(0), values)
    assert restored[0, 0].unique().numel() <= 4
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    assert (restored - values).abs().max() <= ((high - low) / 3 / 2).max() * 1.01
    assert (restored >= low - 1e-2).all()
    assert (restored <= high + 1e-2).all()


def test_int4_is_within_half_a_step_of_the_rotated_vector() -> None:
    """In the rotated domain, which keeps lengths: the mean square is a twelfth of the step's, and clipping is rare."""
    keys = vectors(0)
    restored, _ = rival("int4_per_token_head").restore(keys, vectors(1))
    error = (restored - keys).square().mean(-1).sqrt()
    assert (error < keys.std(-1) * 6 / 15 / 12**0.5 * 2).all()


@pytest.mark.parametrize("other", RIVALS, ids=lambda r: r.name)
def test_a_token_does_not_depend_on_its_neighbours(other: Rival) -> None:
    together = other.restore(vectors(0), vectors(1))
    alone = other.restore(vectors(0)[5:6], vectors(1)[5:6])
    for whole, part in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[5:6], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "recent"), [(0, 0), (4, 16), (4, 0), (0, 1), (30, 7), (100, 100)])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_windowed_attention_by_its_definition(first: int, recent: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(tokens, 2 * HEADS, DIM, generator=generator)
    k, v, far_k, far_v = (torch.randn(tokens, HEADS, DIM, generator=generator) for _ in range(4))
    found = windowed_attention(query, k, v, (far_k, far_v), first, recent, DIM**-0.5)
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    exact = (column < first) | (row - column < recent)
    grouped = query.view(tokens, HEADS, 2, DIM)
    near, far = (torch.einsum("thgd,shd->hgts", grouped, keys) * DIM**-0.5 for keys in (k, far_k))
    weights = torch.where(exact, near, far).masked_fill(column > row, -torch.inf).softmax(-1)
    expected = torch.einsum("hgts,shd->thgd", weights * exact, v) + torch.einsum(
        "hgts,shd->thgd", weights * ~exact, far_v
    )
    torch.testing.assert_close(found, expected.reshape(tokens, 2 * HEADS, DIM), rtol=1e-4, atol=1e-5)

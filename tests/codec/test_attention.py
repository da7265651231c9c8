"""Attention over pages equals dense attention over the same decoded vectors."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import DIM, HEADS, correlated
from tests.tolerances import ATTENTION
from vllm_spectral.codec import attention
from vllm_spectral.codec.attention import ExactTokens
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import unrotate
from vllm_spectral.profile.schema import LayerProfile

GROUP = 3
BLOCK = 32
SCALE = DIM**-0.5


class Request:
    """One request's stored pages, in shuffled blocks of a larger pool full of garbage."""

    def __init__(self, layer: LayerProfile, tokens: int) -> None:
        self.codec: LayerCodec = layer.codec(64, Codebooks(normal_codebooks()))
        keys, values = correlated(tokens, 1), correlated(tokens, 2)
        slots = self.codec.encode(keys, values)
        needed = -(-tokens // BLOCK)
        self.pages = torch.randint(0, 256, (needed + 9, HEADS, BLOCK, 64)).to(torch.uint8)
        self.blocks = torch.randperm(needed + 9)[: needed + 2]
        mapping = (self.blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:tokens]
        self.codec.layout.write(self.pages, mapping, slots)
        self.query = torch.randn(tokens, GROUP * HEADS, DIM)
        self.plain_keys, self.plain_values = keys.bfloat16(), values.bfloat16()
        self.keys = unrotate(self.codec.decode_keys(slots), self.codec.keys.basis)
        self.values = unrotate(self.codec.decode_values(slots), self.codec.values.basis)

    def attend(self, first: int, last: int, exact: ExactTokens | None = None) -> torch.Tensor:
        return attention.paged_attention(
            self.query[first:last], self.pages, self.blocks, last, self.codec, SCALE, exact
        )

    def copies(self, positions: torch.Tensor, sinks: int, recent: int) -> ExactTokens:
        return ExactTokens(positions, self.plain_keys[positions], self.plain_values[positions], sinks, recent)

    def mixed(self, copied: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
        """Dense attention in which every (query, key) pair reads the copy or the page, in float64."""
        tokens = len(self.query)
        row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
        from_copy = copied & ((column < sinks) | (row - column < recent))
        group = self.query.double().view(tokens, HEADS, GROUP, DIM)
        paged, plain = (
            torch.einsum("thgd,shd->hgts", group, keys.double()) * SCALE for keys in (self.keys, self.plain_keys)
        )
        scores = torch.where(from_copy, plain, paged).masked_fill(column > row, -torch.inf)
        weights = scores.softmax(-1)
        out = torch.einsum("hgts,shd->thgd", weights * ~from_copy, self.values.double())
        out += torch.einsum("hgts,shd->thgd", weights * from_copy, self.plain_values.double())
        return out.reshape(tokens, HEADS * GROUP, DIM).float()

    def dense(self) -> torch.Tensor:
        q, k, v = (t.transpose(0, 1) for t in (self.query, self.keys, self.values))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
        return out.transpose(0, 1)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 100, 333])
def test_equals_dense_attention(layer: LayerProfile, tokens: int) -> None:
    request = Request(layer, tokens)
    torch.testing.assert_close(request.attend(0, tokens), request.dense(), rtol=ATTENTION, atol=ATTENTION)


def test_tiles_change_nothing(layer: LayerProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(layer, 200)
    whole = request.attend(0, 200)
    monkeypatch.setattr(attention, "KEY_TILE_TOKENS", 32)
    monkeypatch.setattr(attention, "QUERY_TILE_TOKENS", 24)
    torch.testing.assert_close(request.attend(0, 200), whole, rtol=ATTENTION, atol=ATTENTION)


def test_a_token_attends_alike_however_the_prompt_is_cut(layer: LayerProfile) -> None:
    request = Request(layer, 200)
    whole = request.attend(0, 200)
    cuts = [0, 1, 50, 128, 199, 200]
    parts = torch.cat([request.attend(a, b) for a, b in itertools.pairwise(cuts)])
    assert torch.equal(parts.bfloat16(), whole.bfloat16())


@pytest.mark.parametrize(("sinks", "recent"), [(4, 64), (0, 64), (4, 0), (0, 1), (40, 20), (300, 300)])
@pytest.mark.parametrize("tokens", [1, 3, 65, 200])
def test_pages_and_exact_copies_merge(layer: LayerProfile, tokens: int, sinks: int, recent: int) -> None:
    request = Request(layer, tokens)
    exact = request.copies(torch.arange(tokens), sinks, recent)
    expected = request.mixed(torch.ones(tokens, dtype=torch.bool), sinks, recent)
    torch.testing.assert_close(request.attend(0, tokens, exact), expected, rtol=ATTENTION, atol=ATTENTION)


def test_copies_that_are_gone_are_read_from_pages(layer: LayerProfile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEY_TILE_TOKENS", 32)
    monkeypatch.setattr(attention, "QUERY_TILE_TOKENS", 24)
    request = Request(layer, 200)
    copied = torch.rand(200) < 0.5
    result = request.attend(0, 200, request.copies(copied.nonzero()[:, 0], 4, 64))
    torch.testing.assert_close(result, request.mixed(copied, 4, 64), rtol=ATTENTION, atol=ATTENTION)


def test_a_window_over_everything_is_exact_attention(layer: LayerProfile) -> None:
    request = Request(layer, 100)
    q, k, v = (t.float().transpose(0, 1) for t in (request.query, request.plain_keys, request.plain_values))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    exact = request.copies(torch.arange(100), 0, 100)
    torch.testing.assert_close(request.attend(0, 100, exact), out.transpose(0, 1), rtol=ATTENTION, atol=ATTENTION)


def test_with_copies_too_the_cut_of_a_prompt_changes_nothing(layer: LayerProfile) -> None:
    """A chunk needs the copies of its own tokens and of the window before it; more copies change nothing."""
    request = Request(layer, 200)
    whole = request.attend(0, 200, request.copies(torch.arange(200), 4, 16))
    parts = []
    for low, high in itertools.pairwise([0, 1, 50, 128, 199, 200]):
        needed = torch.tensor([p for p in range(high) if p < 4 or p > low - 16])
        parts.append(request.attend(low, high, request.copies(needed, 4, 16)))
    assert torch.equal(torch.cat(parts).bfloat16(), whole.bfloat16())


def test_the_workspace_claim_covers_the_largest_tile() -> None:
    tile = 8 * attention.KEY_TILE_TOKENS * (2 * HEADS * DIM + attention.QUERY_TILE_TOKENS * GROUP * HEADS)
    assert attention.workspace_bytes(GROUP * HEADS, HEADS, DIM) >= tile

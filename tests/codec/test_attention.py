"""Attention over pages equals dense attention over the same decoded vectors."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import DIM, HEADS, correlated
from tests.tolerances import ATTENTION
from vllm_spectral.codec import attention
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import unrotate
from vllm_spectral.profile.schema import LayerProfile

GROUP = 3
BLOCK = 16
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
        self.keys = unrotate(self.codec.decode_keys(slots), self.codec.keys.basis)
        self.values = unrotate(self.codec.decode_values(slots), self.codec.values.basis)

    def attend(self, first: int, last: int) -> torch.Tensor:
        return attention.paged_attention(self.query[first:last], self.pages, self.blocks, last, self.codec, SCALE)

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


def test_the_workspace_claim_covers_the_largest_tile() -> None:
    tile = 8 * attention.KEY_TILE_TOKENS * (2 * HEADS * DIM + attention.QUERY_TILE_TOKENS * GROUP * HEADS)
    assert attention.workspace_bytes(GROUP * HEADS, HEADS, DIM) >= tile

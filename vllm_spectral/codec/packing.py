"""Exact packing of integer codes into slot bytes, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.codec.layout import PieceTable


def pack(codes: Tensor, table: PieceTable, slots: Tensor) -> None:
    """Add codes to slots whose bytes at the codes' places are still zero.

    Args:
        codes: ``[num_tokens, num_heads, head_dim]`` int, ``0 <= code < 2 ** bits``.
        table: where the codes go.
        slots: ``[num_tokens, num_heads, slot_bytes]`` uint8, changed in place.
    """
    codes = codes.int().unsqueeze(-1)
    pieces = ((codes >> table.place) & table.mask) << table.shift
    index = table.byte.flatten(1).expand(codes.shape[0], -1, -1)
    # Pieces of one byte occupy different bits, so that adding them is the same as or-ing them.
    slots.scatter_add_(-1, index, pieces.flatten(2).to(torch.uint8))


def unpack(slots: Tensor, table: PieceTable) -> Tensor:
    """Read codes back.

    Args:
        slots: ``[num_tokens, num_heads, slot_bytes]`` uint8.
        table: where the codes are.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` int32.
    """
    index = table.byte.flatten(1).expand(slots.shape[0], -1, -1)
    pieces = slots.gather(-1, index).view(slots.shape[0], *table.byte.shape).int()
    codes: Tensor = (((pieces >> table.shift) & table.mask) << table.place).sum(dim=-1, dtype=torch.int32)
    return codes

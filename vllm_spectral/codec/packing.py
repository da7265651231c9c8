"""Exact packing of integer codes into slot words, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.codec.layout import FieldTable


def pack(codes: Tensor, table: FieldTable, slots: Tensor) -> None:
    """Add codes to slots whose bits at the codes' places are still zero.

    Args:
        codes: ``[num_tokens, num_heads, head_dim]`` int, ``0 <= code < 2 ** bits``.
        table: where the codes go.
        slots: ``[num_tokens, num_heads, slot_bytes]`` uint8, changed in place.
    """
    words = slots.view(torch.int16)
    fields = (codes.int() << table.shift).to(torch.int16)
    # Fields of one word occupy different bits, so that adding them is the same as or-ing them.
    words.scatter_add_(-1, table.word.expand_as(codes), fields)


def unpack(slots: Tensor, table: FieldTable) -> Tensor:
    """Read codes back.

    Args:
        slots: ``[num_tokens, num_heads, slot_bytes]`` uint8.
        table: where the codes are.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` int32.
    """
    words = slots.contiguous().view(torch.int16)
    fields = words.gather(-1, table.word.expand(slots.shape[0], -1, -1)).int()
    return (fields >> table.shift) & table.mask

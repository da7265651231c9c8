"""The byte layout of a slot and of a page: the only file that knows an offset or a stride.

A **slot** is what one token stores for one KV head of one layer, keys and values together::

    byte 0        scale of the key    (bit 7: coded by the flat fallback; bits 0-6: scale index)
    byte 1        scale of the value  (likewise)
    bytes 2 ...   key payload, then value payload, then zero padding up to ``slot_bytes``

A **payload** holds one code per rotated channel in up to three planes, each starting on a byte: a nibble plane
(4 bits per entry), a pair plane (2) and a single plane (1). A channel of ``b`` bits has ``b // 4`` nibbles, then a
pair if ``b & 2``, then a single if ``b & 1``; lower bits of the code come first. Entries of a plane are ordered by
channel (first nibbles before second ones) and fill bytes from the low bits up. So a kernel expands a plane with one
shift and mask, whatever the allocation.

A **page** is vLLM's block, ``[num_kv_heads, block_size, slot_bytes]`` uint8: head-major, one contiguous region per head.

The flat fallback codes a vector with evenly spread bits in the same payload bytes; it is chosen per vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spectral.codec.allocation import flat_fill

SCALE_BYTES = 1
KEY_SCALE_OFFSET = 0
VALUE_SCALE_OFFSET = KEY_SCALE_OFFSET + SCALE_BYTES
HEADER_BYTES = VALUE_SCALE_OFFSET + SCALE_BYTES
SLOT_ALIGNMENT = 8
"""Slots are a multiple of this many bytes, so that a kernel reads whole 64-bit words."""
FLAT_FLAG = 0x80
"""Bit of the scale byte that marks a vector coded by the flat fallback."""
PLANE_WIDTHS = (4, 2, 1)
"""Bits per entry of the nibble, pair and single plane."""
MAX_PIECES = 3
"""Most plane entries one code can be cut into (7 bits: a nibble, a pair and a single)."""


def slot_bytes_for(bits: float, head_dim: int) -> int:
    """Slot size that spends at most ``bits`` per element on keys and values, header included.

    Args:
        bits: stored bits per KV element.
        head_dim: channels per head.

    Returns:
        Bytes per (token, KV head), a multiple of :data:`SLOT_ALIGNMENT`.
    """
    return int(bits * 2 * head_dim / 8) // SLOT_ALIGNMENT * SLOT_ALIGNMENT


def payload_bits(slot_bytes: int) -> int:
    """Bits a slot leaves for the codes of K and V together.

    One byte is kept free for the padding of the key's single plane, whose half-filled last byte the
    value's payload cannot use.
    """
    return 8 * (slot_bytes - HEADER_BYTES - 1)


def _plane_entries(bits: Tensor, width: int) -> list[tuple[int, int]]:
    """Channels that own an entry in the plane of ``width``, in order, with the place of its lowest bit in the code."""
    widths = list(enumerate(bits.tolist()))
    if width == PLANE_WIDTHS[0]:
        return [(c, 0) for c, b in widths if b >= 4] + [(c, 4) for c, b in widths if b >= 8]
    return [(c, b - b % (2 * width)) for c, b in widths if b & width]


def payload_bytes(bits: Tensor) -> int:
    """Bytes of the payload of one vector.

    Args:
        bits: ``[head_dim]`` int64 bits per channel.
    """
    return sum(-(-len(_plane_entries(bits, w)) * w // 8) for w in PLANE_WIDTHS)


@dataclass(frozen=True)
class PieceTable:
    """Where the pieces of every code of one kind (keys or values, spectral or flat) lie in a slot.

    All tensors are ``[num_heads, head_dim, MAX_PIECES]`` int32 except ``byte`` (int64, for gathers); absent pieces
    have a zero ``mask``. A piece of ``code`` is ``(code >> place) & mask``, stored in ``slot[byte]`` from bit ``shift``.
    """

    bits: Tensor
    """``[num_heads, head_dim]`` int64, bits per channel."""
    byte: Tensor
    shift: Tensor
    mask: Tensor
    place: Tensor


def _piece_table(bits: Tensor, start: Tensor) -> PieceTable:
    """Place the payload of each head from byte ``start[head]`` on."""
    heads, dim = bits.shape
    byte = torch.zeros(heads, dim, MAX_PIECES, dtype=torch.int64)
    shift, mask, place = (torch.zeros(heads, dim, MAX_PIECES, dtype=torch.int32) for _ in range(3))
    for head in range(heads):
        offset = int(start[head])
        used = [0] * dim
        for width in PLANE_WIDTHS:
            entries = _plane_entries(bits[head], width)
            for position, (channel, low) in enumerate(entries):
                piece = used[channel]
                used[channel] += 1
                byte[head, channel, piece] = offset + position * width // 8
                shift[head, channel, piece] = position * width % 8
                mask[head, channel, piece] = (1 << width) - 1
                place[head, channel, piece] = low
            offset += -(-len(entries) * width // 8)
    return PieceTable(bits, byte, shift, mask, place)


class SlotLayout:
    """Every byte, offset and stride of one layer's slots and pages.

    Args:
        key_bits: ``[num_heads, head_dim]`` int64, bits per rotated channel of the keys.
        value_bits: ``[num_heads, head_dim]`` int64, likewise for the values.
        slot_bytes: bytes per (token, KV head).

    Raises:
        ValueError: if a head's codes do not fit the slot.
    """

    def __init__(self, key_bits: Tensor, value_bits: Tensor, slot_bytes: int) -> None:
        if key_bits.shape != value_bits.shape or key_bits.ndim != 2:
            raise ValueError(
                f"bits of K and V must both be [num_heads, head_dim], got {key_bits.shape}, {value_bits.shape}"
            )
        if slot_bytes % SLOT_ALIGNMENT or slot_bytes <= HEADER_BYTES:
            raise ValueError(f"slot_bytes must be a positive multiple of {SLOT_ALIGNMENT}, got {slot_bytes}")
        self.num_heads, self.head_dim = key_bits.shape
        self.slot_bytes = slot_bytes
        key_size = torch.tensor([payload_bytes(b) for b in key_bits])
        value_size = torch.tensor([payload_bytes(b) for b in value_bits])
        worst = int((key_size + value_size).max()) + HEADER_BYTES
        if worst > slot_bytes:
            raise ValueError(f"codes and header need {worst} bytes, the slot has {slot_bytes}")
        key_start = torch.full((self.num_heads,), HEADER_BYTES)
        value_start = key_start + key_size
        value_room = slot_bytes - value_start
        self.key_bits_per_element = 8 * (SCALE_BYTES + float(key_size.float().mean())) / self.head_dim
        self.value_bits_per_element = 8 * (SCALE_BYTES + float(value_size.float().mean())) / self.head_dim
        self.keys = _piece_table(key_bits, key_start)
        self.values = _piece_table(value_bits, value_start)
        self.flat_keys = _piece_table(self._flat(key_size), key_start)
        self.flat_values = _piece_table(self._flat(value_room), value_start)

    def _flat(self, room: Tensor) -> Tensor:
        """``[num_heads, head_dim]`` evenly spread bits that fit ``room[head]`` bytes, plane padding included."""
        rows = []
        for size in room.tolist():
            budget = 8 * size
            while payload_bytes(flat_fill(self.head_dim, budget)) > size:
                budget -= 1
            rows.append(flat_fill(self.head_dim, budget))
        return torch.stack(rows)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one block of this layer: all heads, ``block_size`` tokens."""
        return self.num_heads * block_size * self.slot_bytes

    def write(self, pages: Tensor, slot_mapping: Tensor, slots: Tensor) -> None:
        """Store the slots of new tokens.

        Args:
            pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8, written in place.
            slot_mapping: ``[num_tokens]`` int, ``block * block_size + offset`` per token; negative: padding, skipped.
            slots: ``[num_tokens, num_heads, slot_bytes]`` uint8.
        """
        block_size = pages.shape[2]
        keep = slot_mapping >= 0
        if not bool(keep.all()):
            slot_mapping, slots = slot_mapping[keep], slots[keep]
        slot_mapping = slot_mapping.long()
        block = torch.div(slot_mapping, block_size, rounding_mode="floor")
        pages[block, :, slot_mapping % block_size] = slots

    def read(self, pages: Tensor, blocks: Tensor) -> Tensor:
        """The slots of consecutive tokens of one request.

        Args:
            pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.
            blocks: ``[n]`` int, the request's physical blocks in order.

        Returns:
            ``[n * block_size, num_heads, slot_bytes]`` uint8.
        """
        return pages[blocks.long()].transpose(1, 2).reshape(-1, self.num_heads, self.slot_bytes)

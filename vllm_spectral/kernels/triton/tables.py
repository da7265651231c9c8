"""One layer's codec as tensors that the Triton kernels read.

Per-channel tables are padded to a power of two: a padding channel has no bits, hence level 0, like a channel that
water-filling left empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_spectral.codec.codebook import MAX_BITS
from vllm_spectral.codec.layout import FIELDS_START, HEADER_WORDS, VECTOR_BYTES, FieldTable, SlotLayout, payload_words
from vllm_spectral.codec.quantizer import FALLBACK_SLACK, LayerCodec, VectorCoding

LEVEL_BYTES = 4
"""Levels are looked up as float32, which two at a time become bf16 in one instruction."""
LEVEL_TABLE_BYTES = LEVEL_BYTES << (MAX_BITS + 1)
"""The levels of ``b`` bits start at entry ``2 ** b``: field and width together are the index, without an addition."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def level_table(levels: Tensor, device: torch.device) -> Tensor:
    """Levels by ``2 ** bits + code``, at an address that is a multiple of the table's size.

    Aligned, the low half of an entry's address is made by one and-or of a rotated word; an unaligned table would cost an
    addition with carry per code.

    Args:
        levels: ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32.
        device: where to put it.

    Returns:
        ``[2 ** (MAX_BITS + 1)]`` float32.
    """
    entries = LEVEL_TABLE_BYTES // LEVEL_BYTES
    room = torch.zeros(2 * entries, dtype=torch.float32, device=device)
    start = -room.data_ptr() % LEVEL_TABLE_BYTES // LEVEL_BYTES
    table = room[start : start + entries]
    for bits in range(MAX_BITS + 1):
        table[1 << bits : 2 << bits] = levels[bits, : 1 << bits]
    return table


@dataclass(frozen=True)
class ReadTable:
    """How a kernel reads the fields of one kind (spectral or flat) of the keys, per pair of channels, or the values.

    Attributes:
        offset: ``[num_heads, n]`` int32, byte of a group where the vector of words lies.
        turn: ``[num_heads, n]`` int32, by how many bits a 32-bit word is turned right to make its lower code an index of four
            bytes each. Turned, not shifted: a field at bit 0 moves up.
        mask: ``[num_heads, n]`` int32, the bits of that index.
    """

    offset: Tensor
    turn: Tensor
    mask: Tensor


@dataclass(frozen=True)
class WriteTable:
    """How codes of one kind (spectral or flat) are found and gathered into 16-bit words.

    Rows are heads of the keys, then heads of the values: ``rows = 2 * num_heads``.

    Attributes:
        channel: ``[rows, words, fields]`` int32, the channels whose codes lie in a word; -1: none.
        bits, shift: ``[rows, head_dim]`` int32.
        width, inverse_width: ``[rows, head_dim]`` float32; as the reference computes them.
        inverse_stored: ``[rows]`` float32, 1 / number of channels that have bits.
        most_bits: ``[rows]`` int32, of the widest channel.
    """

    channel: Tensor
    bits: Tensor
    shift: Tensor
    width: Tensor
    inverse_width: Tensor
    inverse_stored: Tensor
    most_bits: Tensor


@dataclass(frozen=True)
class StoreTables:
    """What the store kernel reads; rows as in :class:`WriteTable`.

    Attributes:
        basis: ``[rows, head_dim, head_dim]`` float32, vectors as columns.
        center: ``[rows, head_dim]`` float32, see :class:`VectorCoding`.
        needed: ``[rows]`` float32: times a vector's mean square, the error at which the fallback is worth a try.
        spectral, flat: the two kinds of codes.
        word_first, word_half: ``[rows, words]`` int32, see :meth:`SlotLayout.word_places`; -1 in ``word_first``: no word of
            this side.
        boundaries: ``[MAX_BITS + 1, 2 ** MAX_BITS]`` float32, see :class:`Codebooks`.
        scales, inverse_scales, scale_bounds: float32, see :class:`LayerCodec`.
    """

    basis: Tensor
    center: Tensor
    needed: Tensor
    spectral: WriteTable
    flat: WriteTable
    word_first: Tensor
    word_half: Tensor
    boundaries: Tensor
    scales: Tensor
    inverse_scales: Tensor
    scale_bounds: Tensor


@dataclass(frozen=True)
class AttendTables:
    """What attention reads of the keys, or of the values.

    Attributes:
        basis: ``[num_heads, head_dim, head_dim]`` float32, vectors as columns; shared with :class:`StoreTables`.
        center, width, flat_width: ``[num_heads, head_dim]`` float32, see :class:`VectorCoding`.
        spectral, flat: the two kinds of codes.
    """

    basis: Tensor
    center: Tensor
    width: Tensor
    flat_width: Tensor
    spectral: ReadTable
    flat: ReadTable


@dataclass(frozen=True)
class LayerTables:
    """One layer on one device.

    Attributes:
        store: for the store kernel.
        keys, values: for attention.
        key_half: ``[num_heads]`` int32, bytes from a group's first half of key words to its second.
        levels: see :func:`level_table`.
        lane_step: bytes from a token's word to the next token's within a half.
    """

    store: StoreTables
    keys: AttendTables
    values: AttendTables
    key_half: Tensor
    levels: Tensor
    lane_step: int

    @property
    def resident_bytes(self) -> int:
        """Bytes of all tables."""
        unique = {t.data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self)}
        return sum(unique.values())


def _tensors(tables: object) -> list[Tensor]:
    found: list[Tensor] = []
    for value in vars(tables).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "__dataclass_fields__"):
            found += _tensors(value)
    return found


def layer_tables(codec: LayerCodec, device: torch.device) -> LayerTables:
    """The tables of one layer.

    Args:
        codec: the layer's codec, on the CPU.
        device: where the kernels run.
    """
    layout, sides = codec.layout, (codec.keys, codec.values)
    first, half_step, lane_step = layout.word_places()
    is_key = torch.arange(first.shape[1]) < layout.num_key_words[:, None]
    heads = layout.num_heads

    def stacked(*tables: Tensor) -> Tensor:
        return torch.cat(tables).contiguous().to(device)

    def padded(tables: Tensor, value: int) -> Tensor:
        return pad(tables.int(), (0, power_of_two(tables.shape[1]) - tables.shape[1]), value=value)

    store = StoreTables(
        basis=stacked(*(c.basis for c in sides)),
        center=stacked(*(c.center for c in sides)),
        needed=stacked(*(c.flat_distortion * FALLBACK_SLACK for c in sides)),
        spectral=_write_table([(c.spectral, c.width) for c in sides], layout, device),
        flat=_write_table([(c.flat, c.flat_width) for c in sides], layout, device),
        word_first=stacked(*(padded(torch.where(mine, first, -1), -1) for mine in (is_key, ~is_key))),
        word_half=stacked(*(padded(half_step, 0) for _ in sides)),
        boundaries=codec.codebooks.boundaries.to(device),
        scales=codec.scales.to(device),
        inverse_scales=codec.inverse_scales.to(device),
        scale_bounds=codec.scale_bounds.to(device),
    )

    def attend(coding: VectorCoding, basis: Tensor, start: Tensor, step: int) -> AttendTables:
        return AttendTables(
            basis=basis,
            center=coding.center.to(device),
            width=coding.width.to(device),
            flat_width=coding.flat_width.to(device),
            spectral=_read_table(coding.spectral, start, step, device),
            flat=_read_table(coding.flat, start, step, device),
        )

    key_start = torch.full((heads,), FIELDS_START)
    return LayerTables(
        store=store,
        keys=attend(codec.keys, store.basis[:heads], key_start, 2),
        values=attend(codec.values, store.basis[heads:], layout.value_start, 1),
        key_half=layout.key_half_bytes.int().to(device),
        levels=level_table(codec.codebooks.levels, device),
        lane_step=lane_step,
    )


def _read_table(fields: FieldTable, start: Tensor, step: int, device: torch.device) -> ReadTable:
    """``step`` 2: channels come in pairs, at the same place of both halves of a word."""

    def padded(table: Tensor) -> Tensor:
        every = table[:, ::step].int()
        return pad(every, (0, power_of_two(every.shape[1]) - every.shape[1])).contiguous().to(device)

    index_shift = LEVEL_BYTES.bit_length() - 1
    turn = (fields.vector_shift.int() - index_shift) % 32
    return ReadTable(
        padded(fields.vector * VECTOR_BYTES + start[:, None].int()), padded(turn), padded(fields.mask << index_shift)
    )


def _write_table(sides: list[tuple[FieldTable, Tensor]], layout: SlotLayout, device: torch.device) -> WriteTable:
    """Of the fields and widths of keys and values."""
    bits, word, shift = (torch.cat([getattr(f, name) for f, _ in sides]) for name in ("bits", "word", "shift"))
    width = torch.cat([w for _, w in sides])
    words = power_of_two(payload_words(layout.slot_bytes))
    lists: list[list[list[int]]] = [[[] for _ in range(words)] for _ in bits]
    for row, channel in (bits > 0).nonzero().tolist():
        lists[row][int(word[row, channel]) - HEADER_WORDS].append(channel)
    most = power_of_two(max(len(members) for row in lists for members in row))
    channel_of = torch.tensor([[members + [-1] * (most - len(members)) for members in row] for row in lists])
    return WriteTable(
        channel=channel_of.int().to(device),
        bits=bits.int().to(device),
        shift=shift.int().to(device),
        width=width.to(device),
        inverse_width=(1 / width).to(device),
        inverse_stored=(1 / (bits > 0).sum(-1).clamp_min(1).float()).to(device),
        most_bits=bits.amax(-1).int().to(device),
    )

"""The byte layout of a slot and of a page: the only file that knows an offset or a stride.

A **slot** is what one token stores for one KV head of one layer, keys and values together, as 16-bit words::

    word 0            scale of the key (low byte), scale of the value (high byte); bit 7 of a scale: flat fallback
    words 1 ...       key words, an even number: word 2i holds even channels, word 2i + 1 odd ones
    then              value words
    then              zero padding up to ``slot_bytes``

A **field** is one code, ``bits`` wide, inside one word; no code straddles words. Channels ``2j`` and ``2j + 1`` of a key
have equal widths and lie at the same place of neighbouring words, so that one shift of a 32-bit load yields both.

A **page** is vLLM's block, ``[num_kv_heads, block_size, slot_bytes]`` uint8: head-major, one contiguous region per head.
Its inside is transposed in **groups** of 32 tokens, for kernels that hold one token per vector lane::

    32 key scales | 32 value scales
    key words:    two halves of 16 tokens; in each, per pair of words, 16 x 32 bits, token by token
    value words:  per word, 16 x (token t, token t + 16), 16 bits each
    padding

The flat fallback codes a vector with evenly spread bits in the same words; it is chosen per vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_spectral.codec.allocation import flat_fill
from vllm_spectral.codec.codebook import MAX_BITS

SCALE_BYTES = 1
HEADER_WORDS = 1
WORD_BITS = 16
WORD_BYTES = WORD_BITS // 8
SLOT_ALIGNMENT = 8
"""Slots are a multiple of this many bytes, and groups hence of whole cache lines."""
FLAT_FLAG = 0x80
"""Bit of a scale that marks a vector coded by the flat fallback."""
GROUP_TOKENS = 32
"""Tokens that are transposed together; vLLM's CPU blocks are multiples of it."""
HALF_TOKENS = GROUP_TOKENS // 2
VECTOR_BYTES = WORD_BYTES * GROUP_TOKENS
"""One word of 32 tokens, or a pair of words of 16."""
FIELDS_START = 2 * SCALE_BYTES * GROUP_TOKENS
"""Byte of a group where the keys' words start, behind the scales."""


def slot_bytes_for(bits: float, head_dim: int) -> int:
    """Slot size that spends at most ``bits`` per element on keys and values, header included.

    Args:
        bits: stored bits per KV element.
        head_dim: channels per head.

    Returns:
        Bytes per (token, KV head), a multiple of :data:`SLOT_ALIGNMENT`.
    """
    return int(bits * 2 * head_dim / 8) // SLOT_ALIGNMENT * SLOT_ALIGNMENT


def payload_words(slot_bytes: int) -> int:
    """Words that a slot leaves for keys and values together."""
    return slot_bytes // WORD_BYTES - HEADER_WORDS


@dataclass(frozen=True)
class Packing:
    """Where fields lie: field ``i`` in word ``word[i]`` from bit ``shift[i]`` on; ``num_words`` are used."""

    word: tuple[int, ...]
    shift: tuple[int, ...]
    num_words: int


def pack_fields(widths: Sequence[int]) -> Packing:
    """Pack fields into 16-bit words, word by word: the widest field that is left, then the best filling for it.

    Args:
        widths: bits per field, 0 to ``MAX_BITS``; a field of no bits is at word 0, shift 0.
    """
    left = [[i for i, width in enumerate(widths) if width == bits] for bits in range(MAX_BITS, 0, -1)]
    word, shift = [0] * len(widths), [0] * len(widths)
    used = 0
    while any(left):
        start = 0
        for queue, take in zip(left, _filling(tuple(min(len(queue), WORD_BITS) for queue in left)), strict=True):
            for index in queue[:take]:
                word[index], shift[index] = used, start
                start += widths[index]
            del queue[:take]
        used += 1
    return Packing(tuple(word), tuple(shift), used)


@lru_cache(maxsize=4096)
def _filling(available: tuple[int, ...]) -> tuple[int, ...]:
    """How many fields of ``MAX_BITS`` to 1 bits fill one word best, at least one of the widest that is available."""
    widest = next(i for i, count in enumerate(available) if count)
    rest = tuple(count - (i == widest) for i, count in enumerate(available))
    best: tuple[int, tuple[int, ...]] = (-1, ())

    def search(width: int, room: int, taken: tuple[int, ...]) -> None:
        nonlocal best
        if width == 0:
            # Of equally full words, the one with wider fields: narrow ones fill the gaps of later words.
            best = max(best, (WORD_BITS - room, taken))
            return
        for count in range(min(rest[MAX_BITS - width], room // width) + 1):
            search(width - 1, room - count * width, (*taken, count))

    search(MAX_BITS, WORD_BITS - (MAX_BITS - widest), ())
    return tuple(count + (i == widest) for i, count in enumerate(best[1]))


def key_words(bits: Sequence[int]) -> int:
    """Words that a key takes, counting both of each pair.

    Args:
        bits: per channel; equal for channels ``2j`` and ``2j + 1``.
    """
    return 2 * pack_fields(bits[::2]).num_words


def value_words(bits: Sequence[int]) -> int:
    """Words that a value takes; ``bits`` per channel."""
    return pack_fields(bits).num_words


def split_words(key_bits: Tensor, value_bits: Tensor, slot_bytes: int) -> tuple[Tensor, Tensor]:
    """How a slot's words are shared: those that the key takes, and those that are left for the value.

    Args:
        key_bits, value_bits: ``[num_heads, head_dim]`` int64, bits per channel; those of the key equal in channel pairs.
        slot_bytes: bytes per (token, KV head).

    Returns:
        ``[num_heads]`` int64 each.

    Raises:
        ValueError: if a head's codes do not fit the slot, or the channels of a key are not paired.
    """
    if key_bits.shape != value_bits.shape or key_bits.ndim != 2:
        raise ValueError(
            f"bits of K and V must both be [num_heads, head_dim], got {key_bits.shape}, {value_bits.shape}"
        )
    if slot_bytes % SLOT_ALIGNMENT or slot_bytes <= HEADER_WORDS * WORD_BYTES:
        raise ValueError(f"slot_bytes must be a positive multiple of {SLOT_ALIGNMENT}, got {slot_bytes}")
    if not torch.equal(key_bits[:, ::2], key_bits[:, 1::2]):
        raise ValueError("bits of K must be equal for channels 2j and 2j + 1")
    if int(torch.cat([key_bits, value_bits]).max()) > MAX_BITS or int(torch.cat([key_bits, value_bits]).min()) < 0:
        raise ValueError(f"bits must be between 0 and {MAX_BITS}")
    taken = torch.tensor([key_words(row) for row in key_bits.tolist()])
    room = payload_words(slot_bytes) - taken
    worst = max(value_words(row) - int(space) for row, space in zip(value_bits.tolist(), room, strict=True))
    if worst > 0:
        raise ValueError(f"codes need {WORD_BYTES * worst} bytes more than the slot's {slot_bytes}")
    return taken, room


@dataclass(frozen=True)
class FieldTable:
    """Where the codes of one kind (keys or values, spectral or flat) lie in a slot.

    Attributes:
        bits: ``[num_heads, head_dim]`` int64, width of each channel's field.
        word: ``[num_heads, head_dim]`` int64, word of the slot, the header included.
        shift: ``[num_heads, head_dim]`` int32, lowest bit in the word.
        vector: ``[num_heads, head_dim]`` int32, the vector of a group that holds the field for all its tokens, counted from
            the start of the keys of a half, or of the values.
        vector_shift: ``[num_heads, head_dim]`` int32, lowest bit in a token's lane of that vector: of 32 bits for keys,
            of 16 for values.
    """

    bits: Tensor
    word: Tensor
    shift: Tensor
    vector: Tensor
    vector_shift: Tensor

    @property
    def mask(self) -> Tensor:
        """``[num_heads, head_dim]`` int32, ``2 ** bits - 1``."""
        return (1 << self.bits.int()) - 1


def _key_fields(bits: Tensor) -> FieldTable:
    word, shift = torch.zeros_like(bits), torch.zeros_like(bits)
    for head, row in enumerate(bits.tolist()):
        packing = pack_fields(row[::2])
        pair = torch.tensor(packing.word)
        word[head] = torch.stack([2 * pair, 2 * pair + 1], dim=-1).flatten() + HEADER_WORDS
        shift[head] = torch.tensor(packing.shift).repeat_interleave(2)
    vector, upper = (word - HEADER_WORDS) // 2, (word - HEADER_WORDS) % 2
    return FieldTable(bits, word, shift.int(), vector.int(), (shift + WORD_BITS * upper).int())


def _value_fields(bits: Tensor, start: Tensor) -> FieldTable:
    word, shift = torch.zeros_like(bits), torch.zeros_like(bits)
    for head, row in enumerate(bits.tolist()):
        packing = pack_fields(row)
        word[head] = torch.tensor(packing.word) + start[head]
        shift[head] = torch.tensor(packing.shift)
    return FieldTable(bits, word, shift.int(), (word - start[:, None]).int(), shift.int())


class SlotLayout:
    """Every byte, offset and stride of one layer's slots and pages.

    Args:
        key_bits: ``[num_heads, head_dim]`` int64, bits per rotated channel of the keys, equal in channel pairs.
        value_bits: ``[num_heads, head_dim]`` int64, likewise for the values.
        slot_bytes: bytes per (token, KV head).

    Attributes:
        num_key_words, num_value_words: ``[num_heads]`` int64.
        keys, values, flat_keys, flat_values: places of the fields.

    Raises:
        ValueError: if a head's codes do not fit the slot, or the channels of a key are not paired.
    """

    def __init__(self, key_bits: Tensor, value_bits: Tensor, slot_bytes: int) -> None:
        self.num_key_words, room = split_words(key_bits, value_bits, slot_bytes)
        self.num_heads, self.head_dim = key_bits.shape
        self.slot_bytes = slot_bytes
        # The flat fallback may use all words that are left, also those that the value's own fields do not need.
        self.num_value_words = room
        start = self.num_key_words + HEADER_WORDS
        self.key_bits_per_element = self._bits_per_element(self.num_key_words)
        self.value_bits_per_element = self._bits_per_element(self.num_value_words)
        self.keys = _key_fields(key_bits)
        self.values = _value_fields(value_bits, start)
        self.flat_keys = _key_fields(
            torch.stack(
                [_flat(self.head_dim // 2, words // 2).repeat_interleave(2) for words in self.num_key_words.tolist()]
            )
        )
        self.flat_values = _value_fields(
            torch.stack([_flat(self.head_dim, words) for words in self.num_value_words.tolist()]), start
        )
        self._group_offset = torch.stack([self._offsets(words) for words in self.num_key_words.tolist()])

    def _bits_per_element(self, num_words: Tensor) -> float:
        return (8 * SCALE_BYTES + WORD_BITS * float(num_words.float().mean())) / self.head_dim

    def _offsets(self, num_key_words: int) -> Tensor:
        """``[GROUP_TOKENS, slot_bytes]`` int64: where each byte of each token's slot lies in its group."""
        words = self.slot_bytes // WORD_BYTES
        token = torch.arange(GROUP_TOKENS)[:, None]
        half, lane = token // HALF_TOKENS, token % HALF_TOKENS
        index = torch.arange(words - HEADER_WORDS)[None, :]
        vector = half * (num_key_words // 2) + index // 2
        key = FIELDS_START + vector * VECTOR_BYTES + lane * 2 * WORD_BYTES + index % 2 * WORD_BYTES
        # The keys' two halves take as many vectors as they have words, so that the values' count goes on.
        value = FIELDS_START + index * VECTOR_BYTES + lane * 2 * WORD_BYTES + half * WORD_BYTES
        low = torch.where(index < num_key_words, key, value)
        payload = torch.stack([low, low + 1], dim=-1).flatten(1)
        return torch.cat([token, token + GROUP_TOKENS, payload], dim=1)

    @property
    def key_half_bytes(self) -> Tensor:
        """``[num_heads]`` int64: bytes of one half's key words in a group; the first half's start at ``FIELDS_START``."""
        return self.num_key_words // 2 * VECTOR_BYTES

    @property
    def value_start(self) -> Tensor:
        """``[num_heads]`` int64: byte of a group where the value words start."""
        return FIELDS_START + self.num_key_words * VECTOR_BYTES

    def word_places(self) -> tuple[Tensor, Tensor, int]:
        """Where a kernel that writes word by word puts the payload words of a slot.

        Returns:
            ``(first, half_step, lane_step)``: byte of a group where word ``i`` of token 0 lies, and what is added for a token
            of the second half, ``[num_heads, payload_words]`` int64 each; and what is added per token within a half. Key
            words come first, ``num_key_words`` of them, then all others.
        """
        low = self._group_offset[:, :, 2 * SCALE_BYTES :: WORD_BYTES]
        return low[:, 0], low[:, HALF_TOKENS] - low[:, 0], int(low[0, 1, 0] - low[0, 0, 0])

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tables."""
        tables = (self.keys, self.values, self.flat_keys, self.flat_values)
        tensors = [t for table in tables for t in vars(table).values()] + [self._group_offset]
        return sum(t.numel() * t.element_size() for t in tensors)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of one block of this layer: all heads, ``block_size`` tokens."""
        return self.num_heads * block_size * self.slot_bytes

    def _grouped(self, pages: Tensor) -> Tensor:
        """``[num_blocks, num_heads, groups_per_block, group_bytes]`` view of pages."""
        blocks, heads, block_size, slot_bytes = pages.shape
        if block_size % GROUP_TOKENS:
            raise ValueError(f"block_size must be a multiple of {GROUP_TOKENS}, got {block_size}")
        return pages.view(blocks, heads, block_size // GROUP_TOKENS, GROUP_TOKENS * slot_bytes)

    def write(self, pages: Tensor, slot_mapping: Tensor, slots: Tensor) -> None:
        """Store the slots of new tokens.

        Args:
            pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8, written in place.
            slot_mapping: ``[num_tokens]`` int, ``block * block_size + offset`` per token; negative: padding, skipped.
            slots: ``[num_tokens, num_heads, slot_bytes]`` uint8.

        Raises:
            ValueError: if ``block_size`` is not a multiple of :data:`GROUP_TOKENS`.
        """
        grouped, block_size = self._grouped(pages), pages.shape[2]
        keep = slot_mapping >= 0
        slot_mapping, slots = slot_mapping[keep].long(), slots[keep]
        block, offset = slot_mapping // block_size, slot_mapping % block_size
        head = torch.arange(self.num_heads)[None, :, None]
        place = self._group_offset[:, offset % GROUP_TOKENS].transpose(0, 1)
        grouped[block[:, None, None], head, (offset // GROUP_TOKENS)[:, None, None], place] = slots

    def read(self, pages: Tensor, blocks: Tensor) -> Tensor:
        """The slots of consecutive tokens of one request.

        Args:
            pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.
            blocks: ``[n]`` int, the request's physical blocks in order.

        Returns:
            ``[n * block_size, num_heads, slot_bytes]`` uint8.
        """
        groups = self._grouped(pages)[blocks.long()].transpose(1, 2).flatten(0, 1)
        index = self._group_offset.flatten(1).expand(groups.shape[0], -1, -1)
        slots = groups.gather(-1, index).view(-1, self.num_heads, GROUP_TOKENS, self.slot_bytes)
        return slots.transpose(1, 2).flatten(0, 1)


def _flat(num_fields: int, num_words: int) -> Tensor:
    """``[num_fields]`` evenly spread bits that pack into ``num_words`` words."""
    budget = WORD_BITS * num_words
    while pack_fields(flat_fill(num_fields, budget).tolist()).num_words > num_words:
        budget -= 1
    return flat_fill(num_fields, budget)

"""The byte layout: nothing overlaps, nothing leaks, packing is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spectral.codec import packing
from vllm_spectral.codec.layout import (
    GROUP_TOKENS,
    HEADER_WORDS,
    WORD_BITS,
    FieldTable,
    SlotLayout,
    key_words,
    pack_fields,
    slot_bytes_for,
    value_words,
)

DIM = 32
value_rows = st.lists(st.integers(0, 8), min_size=DIM, max_size=DIM)
key_rows = st.lists(st.integers(0, 8), min_size=DIM // 2, max_size=DIM // 2).map(
    lambda row: [bits for bits in row for _ in range(2)]
)


def layout_of(key_bits: list[list[int]], value_bits: list[list[int]]) -> SlotLayout:
    words = HEADER_WORDS + max(key_words(k) + value_words(v) for k, v in zip(key_bits, value_bits, strict=True))
    return SlotLayout(torch.tensor(key_bits), torch.tensor(value_bits), -(-2 * words // 8) * 8)


def occupied(table: FieldTable, head: int) -> list[tuple[int, int]]:
    """Every (word, bit) that a head's codes occupy."""
    return [
        (int(table.word[head, channel]), int(table.shift[head, channel]) + bit)
        for channel in range(table.bits.shape[1])
        for bit in range(int(table.bits[head, channel]))
    ]


@given(widths=st.lists(st.integers(0, 8), max_size=128))
def test_packing_wastes_little_and_straddles_nothing(widths: list[int]) -> None:
    packing_ = pack_fields(widths)
    cells = [
        (word, shift + bit)
        for word, shift, width in zip(packing_.word, packing_.shift, widths, strict=True)
        for bit in range(width)
    ]
    assert len(cells) == len(set(cells))
    assert all(word < packing_.num_words and bit < WORD_BITS for word, bit in cells)
    # Words of three fives or two sevens leave one or two bits; nothing leaves more, but for the last word.
    assert packing_.num_words <= -(-sum(widths) // (WORD_BITS - 2))


@given(keys=st.lists(key_rows, min_size=2, max_size=2), values=st.lists(value_rows, min_size=2, max_size=2))
def test_no_two_codes_share_a_bit(keys: list[list[int]], values: list[list[int]]) -> None:
    layout = layout_of(keys, values)
    for head in range(2):
        for key_table, value_table in ((layout.keys, layout.values), (layout.flat_keys, layout.values),
                                       (layout.keys, layout.flat_values)):  # fmt: skip
            cells = occupied(key_table, head) + occupied(value_table, head)
            assert len(cells) == len(set(cells))
            assert all(HEADER_WORDS <= word < layout.slot_bytes // 2 and bit < WORD_BITS for word, bit in cells)


@given(keys=key_rows)
def test_the_channels_of_a_pair_lie_side_by_side(keys: list[int]) -> None:
    """What lets a kernel expand both with one shift of a 32-bit lane."""
    table = layout_of([keys], [[2] * DIM]).keys
    stored = table.bits[0, ::2] > 0
    assert torch.equal(table.vector[0, ::2], table.vector[0, 1::2])
    assert torch.equal((table.vector_shift[0, ::2] + WORD_BITS)[stored], table.vector_shift[0, 1::2][stored])


@given(keys=key_rows, values=value_rows, seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(keys: list[int], values: list[int], seed: int) -> None:
    layout = layout_of([keys], [values])
    generator = torch.Generator().manual_seed(seed)
    slots = torch.zeros(5, 1, layout.slot_bytes, dtype=torch.uint8)
    codes = {}
    for name, table in (("k", layout.keys), ("v", layout.values)):
        codes[name] = torch.randint(0, 256, (5, 1, DIM), generator=generator) % (1 << table.bits)
        packing.pack(codes[name], table, slots)
    assert torch.equal(packing.unpack(slots, layout.keys).long(), codes["k"])
    assert torch.equal(packing.unpack(slots, layout.values).long(), codes["v"])


@given(keys=st.lists(key_rows, min_size=2, max_size=2), values=st.lists(value_rows, min_size=2, max_size=2))
def test_every_byte_of_a_slot_has_its_own_place_in_the_group(keys: list[list[int]], values: list[list[int]]) -> None:
    layout = layout_of(keys, values)
    slots = torch.randint(0, 256, (GROUP_TOKENS, 2, layout.slot_bytes)).to(torch.uint8)
    pages = torch.zeros(1, 2, GROUP_TOKENS, layout.slot_bytes, dtype=torch.uint8)
    layout.write(pages, torch.arange(GROUP_TOKENS), slots)
    assert torch.equal(layout.read(pages, torch.tensor([0])), slots)


def test_pages_hold_what_was_written_and_padding_is_skipped() -> None:
    layout = layout_of([[4] * DIM] * 2, [[3] * DIM] * 2)
    pages = torch.full((6, 2, 64, layout.slot_bytes), 255, dtype=torch.uint8)
    slots = torch.randint(0, 256, (100, 2, layout.slot_bytes)).to(torch.uint8)
    mapping = torch.cat([torch.arange(64) + 5 * 64, torch.arange(35) + 2 * 64, torch.tensor([-1])])
    layout.write(pages, mapping, slots)
    assert torch.equal(layout.read(pages, torch.tensor([5, 2]))[:99], slots[:99])
    assert (layout.read(pages, torch.tensor([2]))[35:] == 255).all()
    assert (pages[[0, 1, 3, 4]] == 255).all()


def test_blocks_that_are_no_multiple_of_a_group_are_refused() -> None:
    layout = layout_of([[4] * DIM], [[3] * DIM])
    with pytest.raises(ValueError, match="multiple of 32"):
        layout.read(torch.zeros(1, 1, 16, layout.slot_bytes, dtype=torch.uint8), torch.tensor([0]))


@pytest.mark.parametrize(("bits", "dim", "expected"), [(4.0, 64, 64), (3.0, 64, 48), (2.5, 64, 40), (4.0, 128, 128)])
def test_slot_sizes(bits: float, dim: int, expected: int) -> None:
    assert slot_bytes_for(bits, dim) == expected


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the slot's 16"):
        SlotLayout(torch.full((1, 32), 8), torch.full((1, 32), 8), 16)


def test_unpaired_keys_and_too_many_bits_are_refused() -> None:
    four, odd = torch.full((1, 32), 4), torch.full((1, 32), 4)
    odd[0, 5] = 3
    with pytest.raises(ValueError, match="equal for channels"):
        SlotLayout(odd, four, 64)
    with pytest.raises(ValueError, match="between 0 and 8"):
        SlotLayout(four, four + 5, 64)


def test_page_bytes_is_what_the_page_tensor_takes() -> None:
    layout = layout_of([[4] * DIM] * 2, [[3] * DIM] * 2)
    assert layout.page_bytes(16) == torch.empty(2, 16, layout.slot_bytes, dtype=torch.uint8).numel()

"""The byte layout: nothing overlaps, nothing leaks, packing is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_spectral.codec import packing
from vllm_spectral.codec.layout import HEADER_BYTES, PieceTable, SlotLayout, payload_bytes, slot_bytes_for

bit_rows = st.lists(st.integers(0, 8), min_size=32, max_size=32)


def layout_of(key_bits: list[list[int]], value_bits: list[list[int]]) -> SlotLayout:
    keys, values = torch.tensor(key_bits), torch.tensor(value_bits)
    need = HEADER_BYTES + max(payload_bytes(k) + payload_bytes(v) for k, v in zip(keys, values, strict=True))
    return SlotLayout(keys, values, -(-need // 8) * 8)


def occupied(table: PieceTable, head: int) -> list[tuple[int, int]]:
    """Every (byte, bit) that a head's codes occupy."""
    cells = []
    for channel in range(table.byte.shape[1]):
        for piece in range(table.byte.shape[2]):
            width = int(table.mask[head, channel, piece]).bit_length()
            start = int(table.shift[head, channel, piece])
            cells += [(int(table.byte[head, channel, piece]), start + bit) for bit in range(width)]
    return cells


@given(keys=st.lists(bit_rows, min_size=2, max_size=2), values=st.lists(bit_rows, min_size=2, max_size=2))
def test_no_two_codes_share_a_bit(keys: list[list[int]], values: list[list[int]]) -> None:
    layout = layout_of(keys, values)
    for head in range(2):
        for key_table, value_table in ((layout.keys, layout.values), (layout.flat_keys, layout.values),
                                       (layout.keys, layout.flat_values)):  # fmt: skip
            cells = occupied(key_table, head) + occupied(value_table, head)
            assert len(cells) == len(set(cells))
            assert all(HEADER_BYTES <= byte < layout.slot_bytes and bit < 8 for byte, bit in cells)


@given(keys=bit_rows, values=bit_rows, seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(keys: list[int], values: list[int], seed: int) -> None:
    layout = layout_of([keys], [values])
    generator = torch.Generator().manual_seed(seed)
    slots = torch.zeros(5, 1, layout.slot_bytes, dtype=torch.uint8)
    codes = {}
    for name, table in (("k", layout.keys), ("v", layout.values)):
        codes[name] = torch.randint(0, 256, (5, 1, 32), generator=generator) % (1 << table.bits)
        packing.pack(codes[name], table, slots)
    assert torch.equal(packing.unpack(slots, layout.keys).long(), codes["k"])
    assert torch.equal(packing.unpack(slots, layout.values).long(), codes["v"])


def test_pages_hold_what_was_written_and_padding_is_skipped() -> None:
    layout = layout_of([[4] * 32] * 2, [[3] * 32] * 2)
    pages = torch.full((6, 2, 4, layout.slot_bytes), 255, dtype=torch.uint8)
    slots = torch.randint(0, 256, (7, 2, layout.slot_bytes)).to(torch.uint8)
    blocks = torch.tensor([5, 2])
    mapping = torch.tensor([20, 21, 22, 23, 8, 9, -1])
    layout.write(pages, mapping, slots)
    assert torch.equal(layout.read(pages, blocks)[:6], slots[:6])
    untouched = torch.ones(6, 4, dtype=torch.bool)
    untouched[5], untouched[2, :2] = False, False
    assert (pages.transpose(1, 2)[untouched] == 255).all()


@pytest.mark.parametrize(("bits", "dim", "expected"), [(4.0, 64, 64), (3.0, 64, 48), (2.5, 64, 40), (4.0, 128, 128)])
def test_slot_sizes(bits: float, dim: int, expected: int) -> None:
    assert slot_bytes_for(bits, dim) == expected


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the slot has 16"):
        SlotLayout(torch.full((1, 32), 8), torch.full((1, 32), 8), 16)


def test_page_bytes_is_what_the_page_tensor_takes() -> None:
    layout = layout_of([[4] * 32] * 2, [[3] * 32] * 2)
    assert layout.page_bytes(16) == torch.empty(2, 16, layout.slot_bytes, dtype=torch.uint8).numel()

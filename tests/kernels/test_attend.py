"""The attend kernel against the float64 reference, over the same bytes, on every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.conftest import ISAS, Step, codec_of, kernels, tokens
from tests.tolerances import KERNEL_BF16, KERNEL_FLOAT, KERNEL_INT8

SHAPES = [
    (3, 64, 3.0, 3),
    (1, 128, 4.0, 4),
    (2, 32, 4.5, 1),
    (2, 80, 2.5, 7),
    (1, 256, 3.0, 2),
    (2, 96, 6.0, 5),
    (1, 64, 1.5, 71),
]


def agree(step: Step, isa: str, exact: bool, *, slack: float = 1.0) -> None:
    found, expected = step.native(kernels(isa), exact), step.reference(exact)
    assert torch.isfinite(found).all()
    close(found, expected, isa, slack=slack)


def close(found: torch.Tensor, expected: torch.Tensor, isa: str, *, slack: float = 1.0) -> None:
    tolerance = KERNEL_FLOAT
    if "vnni" in isa or "amx" in isa:
        tolerance = slack * KERNEL_INT8
    elif "bf16" in isa:
        tolerance = slack * KERNEL_BF16
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("soft_cap", "window"), [(2.0, 0), (0.0, 100), (30.0, 1), (0.0, 20), (5.0, 600)])
def test_soft_caps_and_sliding_windows(soft_cap: float, window: int, isa: str, exact: bool) -> None:
    step = Step(codec_of(2, 64, 3.0), 3, [700, 40, 1200, 9], [1, 40, 30, 0])
    found = step.native(kernels(isa), exact=exact, soft_cap=soft_cap, window=window)
    close(found, step.dense(soft_cap, window, exact), isa)


def test_the_dense_reference_is_the_paged_one_where_both_apply() -> None:
    step = Step(codec_of(2, 64, 3.0), 3, [700, 40, 1200], [1, 40, 30])
    for exact in (False, True):
        found, expected = step.dense(0.0, 0, exact), step.reference(exact)
        assert (found - expected).norm() <= KERNEL_FLOAT * expected.norm()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "dim", "bits", "group"), SHAPES)
def test_every_shape(heads: int, dim: int, bits: float, group: int, isa: str, exact: bool) -> None:
    agree(Step(codec_of(heads, dim, bits), group, [700, 33, 1, 64, 515], [1, 33, 1, 2, 40]), isa, exact)


@pytest.mark.parametrize("isa", ISAS)
@given(data=st.data())
@settings(max_examples=15)
def test_any_batch(isa: str, data: st.DataObject) -> None:
    """Odd lengths, empty requests, windows larger than contexts, copies that are gone, blocks of several groups."""
    contexts = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=4))
    queries = [data.draw(st.sampled_from(sorted({0, 1, min(3, c), c // 2, c}))) for c in contexts]
    if not sum(queries):
        queries[0] = 1
    step = Step(
        codec_of(2, 64, 3.0), data.draw(st.integers(1, 9)), contexts, queries, seed=data.draw(st.integers(0, 1000)),
        block=data.draw(st.sampled_from([32, 64, 96, 128])), copied_share=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        first=data.draw(st.sampled_from([0, 4, 40])), recent=data.draw(st.sampled_from([0, 1, 64, 300])),
    )  # fmt: skip
    # A single row has nothing to average over: two sharp scores that are nearly equal weigh what bf16 makes of them.
    agree(step, isa, exact=True, slack=3.0)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("isa", ISAS)
def test_the_cut_of_a_prompt_and_the_batch_change_no_bit(isa: str, exact: bool) -> None:
    """One request whole, in pieces, token by token at its end, and beside others: the same operations in the same order."""
    context, codec = 1500, codec_of(2, 64, 3.0)
    whole = Step(codec, 3, [context], [context], copied_share=1.0)
    expected = whole.native(kernels(isa), exact)
    cuts = [0, 1, 7, 300, 512, 1024, 1497, 1498, 1499, 1500]
    for low, high in itertools.pairwise(cuts):
        part = Step(codec, 3, [high], [high - low], copied_share=1.0)
        part.sequences[0].keys, part.sequences[0].values = (
            whole.sequences[0].keys[:high],
            whole.sequences[0].values[:high],
        )
        part.sequences[0].blocks, part.pages = whole.sequences[0].blocks, whole.pages
        part.query = whole.query[low:high]
        assert torch.equal(part.native(kernels(isa), exact), expected[low:high])
        batch = Step(codec, 3, [high, 200], [high - low, 3], copied_share=1.0)
        offset = len(whole.pages)
        batch.sequences[0] = part.sequences[0]
        batch.sequences[1].blocks = batch.sequences[1].blocks + offset
        batch.pages = torch.cat([whole.pages, batch.pages])
        batch.query = torch.cat([part.query, batch.query[high - low :]])
        assert torch.equal(batch.native(kernels(isa), exact)[: high - low], expected[low:high])


SHARP = 400.0
"""Makes scores of several hundred, positive and negative, of the queries of a step."""


@pytest.mark.parametrize("isa", ISAS)
def test_no_score_is_too_large_or_too_small(isa: str) -> None:
    """A token that sees itself alone answers its own value, whatever its score; with several, the largest ones win."""
    alone = Step(codec_of(2, 64, 3.0), 3, [1] * 24, [1] * 24)
    alone.query *= SHARP
    agree(alone, isa, exact=False)
    agree(alone, isa, exact=True)
    several = Step(codec_of(2, 64, 3.0), 3, [1500, 600], [40, 600])
    several.query *= SHARP
    found, expected = several.native(kernels(isa), exact=False), several.reference(exact=False)
    assert torch.isfinite(found).all()
    if isa in ("portable", "avx2", "avx512"):
        # A score of 300 has an error of 300 * 2 ** -24, and its weight the same, relatively, times what the sum rounds.
        assert (found - expected).norm() <= 1e-3 * expected.norm()
    last = Step(codec_of(2, 64, 3.0), 3, [1500, 600], [1, 1])
    last.query = several.query[[39, 639]]
    last.pages, last.sequences = several.pages, several.sequences
    assert torch.equal(last.native(kernels(isa), exact=False), found[[39, 639]])


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa: str) -> None:
    step, threads = Step(codec_of(2, 64, 3.0), 3, [3000, 100], [1, 30]), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(step.native(kernels(isa), exact=True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 40, 0]])
def test_one_call_stores_and_attends_as_two_do(queries: list[int], isa: str) -> None:
    step = Step(codec_of(2, 64, 3.0), 3, [1500, 40, 90], queries)
    expected, pages = step.native(kernels(isa), exact=False), step.pages.clone()
    slots = step.slots()
    other = tokens(len(slots), 5, 2, 64, torch.bfloat16)
    step.codec.layout.write(step.pages, slots, step.codec.encode(other, other))
    assert not torch.equal(step.pages, pages)
    assert torch.equal(step.native(kernels(isa), exact=False, store=True), expected)
    assert torch.equal(step.pages, pages)

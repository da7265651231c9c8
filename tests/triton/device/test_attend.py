"""The attention kernels against the float64 reference, over the same bytes."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import Step, codec_of, tokens
from tests.tolerances import KERNEL_BF16
from tests.triton.device.cases import SHAPES, attend, close, store
from vllm_spectral.kernels.interface import Bounds
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.triton.plan import Tuning, plan_step

SHARES = Tuning(least_tiles=1, programs_per_processor=64)
"""Cuts short contexts into shares."""
WHOLE = Tuning(least_tiles=10**6)
"""Never cuts: one program has all tokens of its rows."""


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("heads", "dim", "bits", "group"), SHAPES)
def test_every_shape_in_a_mixed_step(heads: int, dim: int, bits: float, group: int, exact: bool) -> None:
    """Prefill, decode and a chunk at once, each request with a context of its own; in shares with copies, else whole."""
    step = Step(codec_of(min(heads, 2), dim, bits), group, [100, 5, 1, 70], [1, 5, 1, 2])
    close(attend(step, exact, tuning=SHARES if exact else WHOLE), step.reference(exact), KERNEL_BF16)


@pytest.mark.parametrize(
    ("groups", "block", "tuning"), [(1, 32, SHARES), (2, 96, SHARES), (4, 64, WHOLE), (4, 128, SHARES)]
)
def test_tiles_and_blocks_of_every_size(groups: int, block: int, tuning: Tuning) -> None:
    """Tiles within a block, and tiles that span blocks; the last block is partly garbage."""
    step = Step(codec_of(1, 64, 3.0), 4, [150, 95], [1, 1], block=block)
    tuning = Tuning(groups, least_tiles=tuning.least_tiles, programs_per_processor=tuning.programs_per_processor)
    close(attend(step, True, tuning=tuning), step.reference(True), KERNEL_BF16)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("soft_cap", "window"), [(2.0, 0), (0.0, 100), (30.0, 1), (0.0, 20), (5.0, 600)])
def test_soft_caps_and_sliding_windows(soft_cap: float, window: int, exact: bool) -> None:
    step = Step(codec_of(1, 64, 3.0), 3, [150, 40], [1, 30])
    found = attend(step, exact, tuning=SHARES if window else WHOLE, soft_cap=soft_cap, window=window)
    close(found, step.dense(soft_cap, window, exact), KERNEL_BF16)


@pytest.mark.parametrize(
    ("first", "recent", "copied"),
    [(0, 64, 0.5), (4, 0, 1.0), (4, 64, 0.0), (4, 64, 0.5), (40, 1, 0.5), (40, 300, 1.0), (0, 0, 1.0)],
)
def test_windows_of_every_size_with_copies_that_are_gone(first: int, recent: int, copied: float) -> None:
    for queries in ([1, 3, 0], [40, 20, 1]):
        step = Step(
            codec_of(1, 64, 3.0), 3, [90, 20, 70], queries, first=first, recent=recent, copied_share=copied,
            dtype=torch.float32,
        )  # fmt: skip
        # A single row has nothing to average over: two sharp scores that are nearly equal weigh what bf16 makes of them.
        close(attend(step, True, tuning=SHARES), step.reference(True), 3 * KERNEL_BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type(dtype: torch.dtype) -> None:
    step = Step(codec_of(1, 64, 3.0), 2, [70, 20], [1, 20], dtype=dtype)
    close(attend(step, True, tuning=SHARES), step.reference(True), KERNEL_BF16)


def test_a_plan_for_longer_steps_serves_shorter_ones() -> None:
    """What a captured graph does: bounds and padding stay, lengths change."""
    for contexts in ([200, 30], [64, 1]):
        step = Step(codec_of(1, 64, 3.0), 4, contexts, [1, 1])
        found = attend(step, True, bounds=Bounds(1, 4096), padding=3, tuning=SHARES)
        close(found, step.reference(True), KERNEL_BF16)


def test_reading_what_the_cpu_wrote_and_the_cpu_what_was_written_here() -> None:
    step = Step(codec_of(1, 64, 3.0), 3, [60], [1])
    close(attend(step, False), step.reference(False), KERNEL_BF16)
    slots = step.sequences[0].blocks[torch.arange(60) // 32] * 32 + torch.arange(60) % 32
    others = tokens(60, 5, 1, 64, torch.bfloat16), tokens(60, 6, 1, 64, torch.bfloat16)
    native = step.pages.clone()
    NativeLayer(step.codec).store(*others, native, slots)
    store(step.codec, *others, step.pages, slots)
    assert torch.equal(step.pages, native)
    # Three rows average over little, as above; the CPU's bf16 kernel is as far from the reference here.
    close(attend(step, False), step.reference(False), 3 * KERNEL_BF16)


def test_shares_of_a_context_agree_with_the_whole() -> None:
    step = Step(codec_of(1, 128, 4.0), 4, [300], [1])
    whole = attend(step, False, tuning=WHOLE)
    for least in (1, 3):
        close(attend(step, False, tuning=Tuning(least_tiles=least, programs_per_processor=64)), whole, KERNEL_BF16 / 4)


def test_steps_are_cut_so_that_the_machine_is_full() -> None:
    decode = plan_step(32, 32, 1, 16384, 4, 8, 132)
    assert not decode.whole and decode.tiles == 32 and decode.rows == 16
    assert decode.tiles * 8 * decode.splits >= 4 * 132
    assert plan_step(1, 8192, 8192, 8192, 4, 8, 132).whole
    mixed = plan_step(33, 8224, 8192, 16384, 4, 8, 132)
    assert mixed.tiles_per_request == 0 and mixed.tiles < 600

"""The directory against a plain model of a paged cache: a held copy always equals what the slot holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_spectral.exact import ExactDirectory, ExactWindow
from vllm_spectral.exact.window import GROUP_TOKENS, group_tokens

BLOCK = 32


class Cache:
    """Pages and pool that hold a unique number per stored token, driven as vLLM drives a backend."""

    def __init__(self, window: ExactWindow, entries: int, blocks: int = 64) -> None:
        self.directory = ExactDirectory(window, entries, BLOCK)
        self.pages = np.full(blocks * BLOCK, -1)
        self.pool = np.full(entries * self.directory.group_tokens, -2)
        self.serial = 0

    def step(self, requests: list[tuple[list[int], int, int]]) -> list[set[int]]:
        """Requests are ``(blocks, tokens before, new tokens)``; returns the earlier positions found exact."""
        table = np.zeros((len(requests), max(len(blocks) for blocks, _, _ in requests)), dtype=np.int32)
        slots: list[int] = []
        for row, (blocks, before, new) in enumerate(requests):
            table[row, : len(blocks)] = blocks
            slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(before, before + new)]
        lens = np.array([before + new for _, before, new in requests])
        plan = self.directory.step(
            table, lens, np.array([new for _, _, new in requests]), np.array(slots, dtype=np.int64)
        )
        values = np.arange(self.serial, self.serial + len(slots))
        self.serial += len(slots)
        self.pages[slots] = values
        self.pool[plan.write_rows.numpy()] = values[plan.write_tokens.numpy()]
        found = []
        for request, (blocks, before, _) in enumerate(requests):
            positions, rows = plan.found(request)
            assert positions.tolist() == sorted(set(positions.tolist()))
            for position, row in zip(positions.tolist(), rows.tolist(), strict=True):
                assert position < before
                assert self.pool[row] == self.pages[blocks[position // BLOCK] * BLOCK + position % BLOCK]
            found.append(set(positions.tolist()))
        return found


def expected(window: ExactWindow, before: int) -> set[int]:
    recent = max(window.recent - 1, 0)
    return {p for p in range(before) if p < window.first or p >= before - recent}


WINDOWS = (ExactWindow(4, 64), ExactWindow(0, 64), ExactWindow(4, 0), ExactWindow(20, 1), ExactWindow(4, 33, 3))


@pytest.mark.parametrize("window", WINDOWS)
def test_with_room_a_request_always_finds_its_whole_window(window: ExactWindow) -> None:
    cache = Cache(window, entries=3 * window.entries_per_request(GROUP_TOKENS))
    blocks, before = list(range(1, 20)), 0
    for new in (5, 1, 1, 200, 16, 1, 15, 1, 1, 31, 1, 100, 1):
        assert cache.step([(blocks, before, new)])[0] == expected(window, before)
        before += new


def test_entries_per_request_are_enough_and_needed() -> None:
    window = ExactWindow(4, 64)
    for entries, whole in (
        (window.entries_per_request(GROUP_TOKENS), True),
        (window.entries_per_request(GROUP_TOKENS) - 1, False),
    ):
        cache, blocks = Cache(window, entries), [1, 2, 3, 4, 5, 6]
        cache.step([(blocks, 0, 80)])
        found = [cache.step([(blocks, before, 1)])[0] == expected(window, before) for before in range(80, 180)]
        assert all(found) is whole


def test_a_shared_prefix_shares_its_first_tokens() -> None:
    window = ExactWindow(4, 64)
    cache = Cache(window, entries=24)
    cache.step([([1, 2, 3, 4], 0, 100)])
    # Another request finds blocks 1 and 2 in vLLM's cache. The first one kept its group of first tokens and its last 63.
    assert cache.step([([1, 2, 9, 10], 64, 1)])[0] == set(range(GROUP_TOKENS)) | set(range(32, 64))


def test_two_requests_of_one_step_may_share_what_the_step_writes() -> None:
    cache = Cache(ExactWindow(4, 64), entries=48)
    first, second = cache.step([([1, 2, 3], 0, 70), ([1, 2, 4], 64, 6)])
    assert first == set()
    assert second == expected(ExactWindow(4, 64), 64)


def test_a_reused_block_never_shows_its_last_owner() -> None:
    cache = Cache(ExactWindow(4, 64), entries=48)
    cache.step([([1, 2, 3], 0, 90)])
    cache.step([([3, 2, 1], 0, 10)])
    assert cache.step([([3, 2, 1], 10, 1)])[0] == set(range(10))


def test_rejected_tokens_are_written_again() -> None:
    window = ExactWindow(4, 16, slack=3)
    cache = Cache(window, entries=24)
    before = 0
    cache.step([([1, 2, 3, 4, 5], 0, 40)])
    before = 40
    for rejected in (3, 0, 2, 1, 3, 3):
        assert cache.step([([1, 2, 3, 4, 5], before, 4)])[0] == expected(window, before)
        before += 4 - rejected


def test_more_requests_than_entries_lose_alike_and_keep_their_first_tokens() -> None:
    window = ExactWindow(4, 64)
    requests = [list(range(8 * i + 1, 8 * i + 9)) for i in range(6)]
    cache = Cache(window, entries=12)
    cache.step([(blocks, 0, 200) for blocks in requests])
    for before in range(200, 232):
        found = cache.step([(blocks, before, 1) for blocks in requests])
        assert all({0, 1, 2, 3} <= positions for positions in found)
        # One entry each remains for the most recent group.
        assert all(positions >= set(range(before - before % GROUP_TOKENS, before)) for positions in found)
    assert cache.directory.counters.found < cache.directory.counters.wanted
    assert cache.directory.used_entries == 12


def test_padding_and_empty_requests_are_skipped() -> None:
    directory = ExactDirectory(ExactWindow(4, 64), 8, BLOCK)
    plan = directory.step(
        np.array([[1, 2], [0, 0]]), np.array([3, 0]), np.array([3, 0]), np.array([32, 33, 34, -1, -1])
    )
    assert plan.write_tokens.tolist() == [0, 1, 2]
    assert [plan.found(request)[0].tolist() for request in (0, 1)] == [[], []]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_history_makes_a_copy_differ_from_its_page(data: st.DataObject) -> None:
    """Random prompts, decodes, preemptions, shared prefixes, rejections and reused blocks on a small pool."""
    window = ExactWindow(data.draw(st.integers(0, 20)), data.draw(st.integers(0, 70)), data.draw(st.integers(0, 3)))
    cache = Cache(window, entries=data.draw(st.integers(1, 20)), blocks=25)
    free = list(range(1, 25))
    running: list[dict[str, Any]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            gone = running.pop(data.draw(st.integers(0, len(running) - 1)))
            free += [b for b in gone["blocks"] if not any(b in r["blocks"] for r in running)]
        if len(free) >= 4 and data.draw(st.booleans()):
            blocks, before = [free.pop(0) for _ in range(4)], 0
            if running and data.draw(st.booleans()):
                other = running[data.draw(st.integers(0, len(running) - 1))]
                shared = min(other["before"] // BLOCK, 3)
                free += blocks[:shared]
                blocks[:shared], before = other["blocks"][:shared], shared * BLOCK
            running.append({"blocks": blocks, "before": before})
        batch = []
        for request in running:
            new = min(data.draw(st.sampled_from([0, 1, 1, 3, 17, 64])), 4 * BLOCK - request["before"])
            batch.append((request["blocks"], request["before"], new))
            request["before"] += new - min(data.draw(st.integers(0, window.slack)), max(new - 1, 0))
        if batch:
            cache.step(batch)
        assert cache.directory.used_entries <= cache.directory.num_entries


def test_groups_never_straddle_blocks() -> None:
    assert [group_tokens(size) for size in (16, 32, 128, 8, 48, 20)] == [8, 8, 8, 8, 8, 4]

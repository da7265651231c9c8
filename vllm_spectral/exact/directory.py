"""Which tokens have an exact copy, decided once per step for all layers.

The key of an entry is a place in vLLM's page pool: a *group* of neighbouring slots in one physical block. So requests
that share a prefix share its copies, and a request that resumes on cached blocks finds what is left of its own.

An entry is written whenever its slots are, from the moment it is assigned, and only the tokens written since then count
as held. So a held copy always equals what was compressed into the slot, whoever owned the block before; and any entry
can be taken away at any moment, since the compressed page has every token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spectral.exact.window import ExactWindow, group_tokens

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """What one step writes into the pool and reads from it; the same for every layer.

    Attributes:
        write_tokens: ``[n]`` int64, tokens of the step that get a copy.
        write_rows: ``[n]`` int64, the pool rows they go to.
        positions: per request ``[m]`` int64, earlier positions that have a copy and may be read.
        rows: per request ``[m]`` int64, the pool rows they are in.
    """

    write_tokens: Tensor
    write_rows: Tensor
    positions: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


@dataclass
class ExactCounters:
    """Running totals, in tokens times requests unless said otherwise.

    Attributes:
        wanted: earlier tokens inside a step's windows, counted at each step's first query.
        found: those that had a copy.
        evicted: entries taken from one group for another.
    """

    wanted: int = 0
    found: int = 0
    evicted: int = 0


class ExactDirectory:
    """Assigns the pool's entries to groups of slots.

    When the pool cannot hold all requests' windows, first tokens come first, then the most recent group of every
    request, then the second most recent, and so on: all requests lose alike, and none loses an answer.

    Args:
        window: what is to be kept.
        num_entries: entries in the pool.
        block_size: tokens per physical block.
    """

    def __init__(self, window: ExactWindow, num_entries: int, block_size: int) -> None:
        self.window = window
        self.num_entries = num_entries
        self.block_size = block_size
        self.group_tokens = group_tokens(block_size)
        self.counters = ExactCounters()
        self._groups_per_block = block_size // self.group_tokens
        self._entry: OrderedDict[int, int] = OrderedDict()  # group -> entry, least recently used first
        self._entry_of = np.full(1, -1, dtype=np.int64)  # the same by group, for looking up many at once
        self._free = list(range(num_entries - 1, -1, -1))
        self._held = np.zeros((num_entries, self.group_tokens), dtype=bool)

    @property
    def used_entries(self) -> int:
        """Entries assigned to a group."""
        return len(self._entry)

    def step(self, block_table: Indices, context_lens: Indices, query_lens: Indices, slots: Indices) -> StepPlan:
        """Assign entries for one step.

        Args:
            block_table: ``[num_requests, max_blocks]`` int, physical blocks in order.
            context_lens: ``[num_requests]`` int, tokens after the step, the queries included.
            query_lens: ``[num_requests]`` int, tokens of the step per request.
            slots: ``[num_tokens]`` int, where the step's tokens go; -1 for padding.
        """
        lengths = list(zip(context_lens.tolist(), query_lens.tolist(), strict=True))
        readable = [self._readable(context - queries if queries else 0) for context, queries in lengths]
        for request, positions in enumerate(readable):
            for index in np.unique(positions // self.group_tokens).tolist():
                group = self._group(block_table, request, index)
                if group in self._entry:
                    self._entry.move_to_end(group)
        self._assign(block_table, lengths)
        write_tokens, write_rows = self._write(slots)
        found = [self._find(block_table, request, positions) for request, positions in enumerate(readable)]
        self.counters.wanted += sum(map(len, readable))
        self.counters.found += sum(len(positions) for positions, _ in found)
        return StepPlan(write_tokens, write_rows, tuple(p for p, _ in found), tuple(r for _, r in found))

    def _readable(self, before: int) -> Indices:
        """Earlier positions that the step's queries may read exactly, given how many tokens precede the first query."""
        first = min(self.window.first, before)
        recent = max(before - max(self.window.recent - 1, 0), first)
        return np.concatenate([np.arange(first), np.arange(recent, before)])

    def _group(self, block_table: Indices, request: int, index: int) -> int:
        """Group that holds a request's tokens from ``index * group_tokens`` on."""
        block, offset = divmod(index, self._groups_per_block)
        return int(block_table[request, block]) * self._groups_per_block + offset

    def _ranked(self, block_table: Indices, lengths: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, bool]]:
        """``(rank, request, group, written in this step)`` of every group to be kept after the step."""
        size = self.group_tokens
        for request, (context, queries) in enumerate(lengths):
            if not queries:
                continue
            first = -(-min(self.window.first, context) // size)
            oldest = max((context - self.window.kept) // size, first, 0) if self.window.kept else -(-context // size)
            newest = (context - 1) // size
            for index in (*range(first), *range(oldest, newest + 1)):
                rank = -1 if index < first else newest - index
                group = self._group(block_table, request, index)
                yield rank, request, group, (index + 1) * size > context - queries

    def _assign(self, block_table: Indices, lengths: list[tuple[int, int]]) -> None:
        wanted: dict[int, None] = {}
        for _, _, group, written in sorted(self._ranked(block_table, lengths)):
            # A group that lost its copies before this step cannot get them back, and claims nothing.
            if written or group in self._entry:
                wanted.setdefault(group)
        kept = list(wanted)[: self.num_entries]
        for group in reversed(kept):
            if group in self._entry:
                self._entry.move_to_end(group)
        for group in kept:
            if group in self._entry:
                continue
            if self._free:
                entry = self._free.pop()
            else:
                # All kept groups are newer in the order than any other, so the oldest is never one of them.
                old, entry = self._entry.popitem(last=False)
                self._entry_of[old] = -1
                self.counters.evicted += 1
            self._entry[group] = entry
            if group >= len(self._entry_of):
                self._entry_of = np.pad(self._entry_of, (0, group + 1), constant_values=-1)
            self._entry_of[group] = entry
            self._held[entry] = False

    def _write(self, slots: Indices) -> tuple[Tensor, Tensor]:
        rows = self._rows(slots)
        tokens = np.flatnonzero(rows >= 0)
        self._held.reshape(-1)[rows[tokens]] = True
        return torch.from_numpy(tokens), torch.from_numpy(rows[tokens])

    def _find(self, block_table: Indices, request: int, positions: Indices) -> tuple[Tensor, Tensor]:
        block, offset = np.divmod(positions, self.block_size)
        rows = self._rows(block_table[request, block].astype(np.int64) * self.block_size + offset)
        there = rows >= 0
        there[there] = self._held.reshape(-1)[rows[there]]
        return torch.from_numpy(positions[there]), torch.from_numpy(rows[there])

    def _rows(self, slots: Indices) -> Indices:
        """Pool rows of slots; -1 for a slot without an entry and for padding."""
        group, offset = np.divmod(slots, self.group_tokens)
        known = (group >= 0) & (group < len(self._entry_of))
        entry = np.where(known, self._entry_of[np.where(known, group, 0)], -1)
        return np.where(entry >= 0, entry * self.group_tokens + offset, -1)

"""Which tokens have an exact copy, decided once per step for all layers.

The key of an entry is a place in vLLM's page pool: a *group* of neighbouring slots in one physical block. So requests
that share a prefix share its copies, and a request that resumes on cached blocks finds what is left of its own.

An entry is written whenever its slots are, from the moment it is assigned, and only the tokens written since then count
as held. So a held copy always equals what was compressed into the slot, whoever owned the block before; and any entry
can be taken away at any moment, since the compressed page has every token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_spectral.exact.window import ExactWindow, group_tokens

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class StepPlan:
    """What one step writes into the pool and reads from it; the same for every layer.

    Attributes:
        write_tokens: ``[n]`` int64, tokens of the step that get a copy.
        write_rows: ``[n]`` int64, the pool rows they go to.
        positions: ``[num_requests, first + recent]`` int64: positions 0 to ``first``, then ``recent`` positions up to the
            request's first token of the step (from position 0 on if there are fewer).
        rows: the same shape, int32: the pool rows of those that have a copy and may be read; -1 for all others.
    """

    write_tokens: Tensor
    write_rows: Tensor
    positions: Tensor
    rows: Tensor

    def found(self, request: int) -> tuple[Tensor, Tensor]:
        """Rising positions of one request that have a copy, and their rows, ``[m]`` int64 each."""
        there = self.rows[request] >= 0
        return self.positions[request][there], self.rows[request][there].long()


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
        self._entry_of = np.full(1, -1, dtype=np.int64)  # by group; -1: none
        self._group_of = np.full(num_entries, -1, dtype=np.int64)  # by entry
        self._last_used = np.zeros(num_entries)
        self._held = np.zeros((num_entries, self.group_tokens), dtype=bool)
        self._steps = 0

    @property
    def used_entries(self) -> int:
        """Entries assigned to a group."""
        return int((self._group_of >= 0).sum())

    def step(self, block_table: Indices, context_lens: Indices, query_lens: Indices, slots: Indices) -> StepPlan:
        """Assign entries for one step.

        Args:
            block_table: ``[num_requests, max_blocks]`` int, physical blocks in order.
            context_lens: ``[num_requests]`` int, tokens after the step, the queries included.
            query_lens: ``[num_requests]`` int, tokens of the step per request.
            slots: ``[num_tokens]`` int, where the step's tokens go; -1 for padding.
        """
        self._steps += 1
        before = np.where(query_lens > 0, context_lens - query_lens, 0)
        positions, readable = self._readable(before)
        groups = self._groups(block_table, positions // self.group_tokens, readable)
        self._reserve(int(block_table.max(initial=0)))
        used = self._entry_of[groups[readable]]
        self._last_used[used[used >= 0]] = self._steps
        self._assign(block_table, context_lens, query_lens)
        written = self._rows(slots)
        tokens = np.flatnonzero(written >= 0)
        self._held.reshape(-1)[written[tokens]] = True
        rows = np.full(positions.shape, -1, dtype=np.int32)
        rows[readable] = self._held_rows(groups[readable], positions[readable] % self.group_tokens)
        self.counters.wanted += int(np.count_nonzero(readable))
        self.counters.found += int(np.count_nonzero(rows >= 0))
        return StepPlan(*map(torch.from_numpy, (tokens, written[tokens], positions, rows)))

    def _readable(self, before: Indices) -> tuple[Indices, Mask]:
        """The table of positions, and which of them the step's queries may read, given how many tokens precede them."""
        first, recent = self.window.first, self.window.recent
        start = np.maximum(before - recent, 0)[:, None] + np.arange(recent)
        leading = np.broadcast_to(np.arange(first), (len(before), first))
        newest = (start >= first) & (start < before[:, None]) & (start > before[:, None] - recent)
        return np.concatenate([leading, start], axis=1), np.concatenate([leading < before[:, None], newest], axis=1)

    def _groups(self, block_table: Indices, index: Indices, valid: Mask) -> Indices:
        """Groups that hold the tokens from ``index * group_tokens`` on, ``[num_requests, n]``; 0 where not valid."""
        index = np.where(valid, index, 0)
        request = np.arange(len(block_table))[:, None]
        block = block_table[request, index // self._groups_per_block].astype(np.int64)
        groups: Indices = block * self._groups_per_block + index % self._groups_per_block
        return groups

    def _reserve(self, block: int) -> None:
        """Have room for the groups of blocks up to this one."""
        need = (block + 1) * self._groups_per_block
        if need > len(self._entry_of):
            self._entry_of = np.pad(self._entry_of, (0, 2 * need - len(self._entry_of)), constant_values=-1)

    def _wanted(self, block_table: Indices, context_lens: Indices, query_lens: Indices) -> Indices:
        """Groups to be kept after the step, the most important first; one that requests share may come several times."""
        size, kept = self.group_tokens, self.window.kept
        leading = -(-np.minimum(self.window.first, context_lens) // size)
        newest = (context_lens - 1) // size
        oldest = np.maximum(np.maximum(context_lens - kept, 0) // size, leading) if kept else newest + 1
        spread = int((newest - oldest).max(initial=-1)) + 1
        most = int(leading.max(initial=0))
        index = np.concatenate(
            [np.broadcast_to(np.arange(most), (len(leading), most)), newest[:, None] - np.arange(spread)], axis=1
        )
        valid = np.concatenate([index[:, :most] < leading[:, None], index[:, most:] >= oldest[:, None]], axis=1)
        valid &= query_lens[:, None] > 0
        groups = self._groups(block_table, index, valid)
        # A group that lost its copies before this step cannot get them back, and claims nothing.
        valid &= ((index + 1) * size > (context_lens - query_lens)[:, None]) | (self._entry_of[groups] >= 0)
        # All requests' groups of one rank, then those of the next.
        ranked: Indices = groups.T[valid.T]
        return ranked

    def _assign(self, block_table: Indices, context_lens: Indices, query_lens: Indices) -> None:
        wanted = self._wanted(block_table, context_lens, query_lens)
        entry = self._entry_of[wanted]
        if (entry < 0).any():
            _, first_seen = np.unique(wanted, return_index=True)
            wanted = wanted[np.sort(first_seen)][: self.num_entries]
            entry = self._entry_of[wanted]
        # Above all that was only read; of these, the more important are the later to go.
        use = self._steps + 1 - np.arange(len(wanted)) / (len(wanted) + 1)
        had = entry >= 0
        # Backwards: of a group that comes several times, the most important place is written last.
        self._last_used[entry[had][::-1]] = use[had][::-1]
        missing = wanted[~had]
        if not len(missing):
            return
        # Free entries have never been used or are the oldest; no wanted group's entry is among the oldest.
        age = np.where(self._group_of < 0, -1.0, self._last_used)
        taken = (
            np.argpartition(age, len(missing) - 1)[: len(missing)] if len(missing) < len(age) else np.arange(len(age))
        )
        old = self._group_of[taken]
        self._entry_of[old[old >= 0]] = -1
        self.counters.evicted += int((old >= 0).sum())
        self._entry_of[missing] = taken
        self._group_of[taken] = missing
        self._last_used[taken] = use[~had]
        self._held[taken] = False

    def _held_rows(self, groups: Indices, offset: Indices) -> Indices:
        """Pool rows of tokens that have a copy, -1 for others."""
        entry = self._entry_of[groups]
        held = (entry >= 0) & self._held[entry, offset]
        return np.where(held, entry * self.group_tokens + offset, -1)

    def _rows(self, slots: Indices) -> Indices:
        """Pool rows of slots; -1 for a slot without an entry and for padding."""
        group, offset = np.divmod(slots, self.group_tokens)
        entry = np.where(group >= 0, self._entry_of[np.maximum(group, 0)], -1)
        return np.where(entry >= 0, entry * self.group_tokens + offset, -1)

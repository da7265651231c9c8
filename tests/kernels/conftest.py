"""Layers of every shape, and pages that kernel and reference read alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tests.conftest import correlated
from vllm_spectral.calibration.allocate import hadamard_layer, spectral_layer
from vllm_spectral.codec.attention import ExactTokens, paged_attention
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import unrotate
from vllm_spectral.kernels.interface import Exact, Pool, Requests
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.library import ISA_VARIABLE, Library, isas, library
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.moments import LayerMoments

ISAS = isas()


def kernels(isa: str) -> Library:
    return library({ISA_VARIABLE: isa})


@lru_cache(maxsize=64)
def codec_of(heads: int, dim: int, bits: float, basis: str = "spectral") -> LayerCodec:
    """A codec with a sink that the fallback knows."""
    slot = slot_bytes_for(bits, dim)
    if basis == "hadamard":
        layer = hadamard_layer(heads, dim, slot, seed=0)
    else:
        moments = LayerMoments(heads, dim)
        keys, values = correlated(2000, 0, heads, dim), correlated(2000, 1, heads, dim)
        moments.add(torch.randn(2000, heads, dim), keys, values, torch.arange(2000) % 500)
        layer = spectral_layer(moments, slot)
    sink = 8 * correlated(1, 77, heads, dim)[0]
    return LayerProfile(**{**vars(layer), "key_sink": sink, "value_sink": sink}).codec(
        slot, Codebooks(normal_codebooks())
    )


def tokens(count: int, seed: int, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``[count, heads, dim]`` of ordinary vectors, sinks, outliers, tiny ones and zeros."""
    x = correlated(count, seed, heads, dim)
    x[::13] = 8 * correlated(1, 77, heads, dim) + 0.05 * x[::13]
    x[5::29] *= 20
    x[7::31] *= 1e-3
    x[11::97] = 0
    return x.to(dtype)


@dataclass
class Sequence:
    """One request's context in pages and copies."""

    keys: torch.Tensor
    values: torch.Tensor
    blocks: torch.Tensor
    copied: torch.Tensor


class Step:
    """Pages and a pool of copies with several requests, full of garbage elsewhere; kernel and reference over both."""

    def __init__(
        self, codec: LayerCodec, group: int, contexts: list[int], queries: list[int], *, seed: int = 0, block: int = 32,
        dtype: torch.dtype = torch.bfloat16, copied_share: float = 0.7, first: int = 4, recent: int = 64,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.codec, self.group, self.contexts, self.queries, self.dtype = codec, group, contexts, queries, dtype
        self.first, self.recent = first, recent
        heads, dim, slot = codec.layout.num_heads, codec.layout.head_dim, codec.layout.slot_bytes
        self.heads, self.dim, self.scale = heads, dim, dim**-0.5
        needed = [-(-max(c, 1) // block) for c in contexts]
        free = torch.randperm(sum(needed) + 3, generator=generator)
        self.pages = torch.randint(0, 256, (len(free), heads, block, slot), generator=generator).to(torch.uint8)
        self.sequences: list[Sequence] = []
        for index, context in enumerate(contexts):
            keys, values = (tokens(context, 10 * index + k + seed, heads, dim, dtype) for k in (1, 2))
            blocks, free = free[: needed[index]], free[needed[index] :]
            mapping = (blocks[:, None] * block + torch.arange(block)).flatten()[:context]
            if context:
                codec.layout.write(self.pages, mapping, codec.encode(keys, values))
            copied = torch.rand(context, generator=generator) < copied_share
            self.sequences.append(Sequence(keys, values, blocks, copied))
        # Outliers and sinks of the sample would make sharper scores than models have: a bf16 query's error grows with them.
        self.query = (0.25 * torch.randn(sum(queries), group * heads, dim, generator=generator)).to(dtype)

    def own(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The step's keys and values of one request."""
        start = self.contexts[index] - self.queries[index]
        return self.sequences[index].keys[start:], self.sequences[index].values[start:]

    def reference(self, exact: bool) -> torch.Tensor:
        """``[tokens, query heads, dim]`` float32."""
        rows = self.query.split(self.queries)
        outputs = []
        for index, (sequence, context, count) in enumerate(
            zip(self.sequences, self.contexts, self.queries, strict=True)
        ):
            if not count:
                continue
            copies = None
            if exact:
                at = self._copied(index).nonzero().flatten()
                copies = ExactTokens(
                    at, sequence.keys[at].bfloat16(), sequence.values[at].bfloat16(), self.first, self.recent
                )
            outputs.append(
                paged_attention(rows[index], self.pages, sequence.blocks, context, self.codec, self.scale, copies)
            )
        return torch.cat(outputs)

    def _held(self, index: int) -> torch.Tensor:
        before = self.contexts[index] - self.queries[index]
        position = torch.arange(before)
        near = (position < self.first) | (position > before - self.recent)
        return position[near & self.sequences[index].copied[:before]]

    def dense(self, soft_cap: float, window: int, exact: bool = False) -> torch.Tensor:
        """Plain attention over the restored vectors, or their copies, with what the paged reference does not have."""
        rows, outputs = self.query.split(self.queries), []
        for index, (sequence, context, count) in enumerate(
            zip(self.sequences, self.contexts, self.queries, strict=True)
        ):
            if not count:
                continue
            slots = self.codec.layout.read(self.pages, sequence.blocks)[:context]
            position, column = torch.arange(context - count, context)[:, None], torch.arange(context)
            read = ((column < self.first) | (position - column < self.recent)) & self._copied(index) & exact
            query = rows[index].double().view(count, self.heads, self.group, self.dim)
            restored = unrotate(self.codec.decode_keys(slots), self.codec.keys.basis)
            of_pages, of_copies = (
                torch.einsum("thgd,shd->hgts", query, keys.double()) for keys in (restored, sequence.keys.bfloat16())
            )
            scores = torch.where(read, of_copies, of_pages) * self.scale
            if soft_cap:
                scores = soft_cap * (scores / soft_cap).tanh()
            hidden = column > position
            if window:
                hidden |= position - column >= window
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            restored = unrotate(self.codec.decode_values(slots), self.codec.values.basis)
            found = torch.einsum("hgts,shd->thgd", weights * ~read, restored.double())
            found += torch.einsum("hgts,shd->thgd", weights * read, sequence.values.bfloat16().double())
            outputs.append(found.flatten(1, 2))
        return torch.cat(outputs).float()

    def _copied(self, index: int) -> torch.Tensor:
        """Which positions of a request have a copy or are the step's own, ``[context]`` bool."""
        found = torch.zeros(self.contexts[index], dtype=torch.bool)
        found[self._held(index)] = True
        found[self.contexts[index] - self.queries[index] :] = True
        return found

    def slots(self) -> torch.Tensor:
        """Where the step's tokens lie, ``[num_tokens]`` int64."""
        block, found = self.pages.shape[2], []
        for sequence, context, count in zip(self.sequences, self.contexts, self.queries, strict=True):
            position = torch.arange(context - count, context)
            found.append(sequence.blocks[position // block] * block + position % block)
        return torch.cat(found)

    def native(
        self, lib: Library, exact: bool, *, soft_cap: float = 0.0, window: int = 0, store: bool = False
    ) -> torch.Tensor:
        """The same by a kernel, which may store the step's tokens first; the output starts as NaN."""
        longest = max(len(s.blocks) for s in self.sequences)
        table = torch.full((len(self.sequences), longest), 10**6, dtype=torch.int32)
        for row, sequence in enumerate(self.sequences):
            table[row, : len(sequence.blocks)] = sequence.blocks
        starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        pool, copied = self._copies() if exact else (None, None)
        slots = self.slots() if store else None
        requests = Requests(table, starts, torch.tensor(self.contexts, dtype=torch.int32), slots, copied)
        output = torch.full(self.query.shape, torch.nan)
        keys, values = (torch.cat([self.own(i)[k] for i in range(len(self.sequences))]) for k in (0, 1))
        NativeLayer(self.codec, lib).attend(
            self.query, keys, values, self.pages, requests, output, self.scale, pool, soft_cap=soft_cap, window=window
        )
        return output

    def _copies(self) -> tuple[Pool, Exact]:
        """A pool in groups of eight, in shuffled order, whose other places are poisoned."""
        total = sum(self.contexts) + 8
        entries = -(-total // 8)
        pool = torch.full((2, entries, self.heads, 8, self.dim), torch.nan, dtype=torch.bfloat16)
        free = torch.randperm(total).tolist()
        rows = torch.full((len(self.sequences), self.first + self.recent), -1, dtype=torch.int32)
        for index, sequence in enumerate(self.sequences):
            before = self.contexts[index] - self.queries[index]
            start = max(before - self.recent, 0)
            for position in self._held(index).tolist():
                row = free.pop()
                for which, source in enumerate((sequence.keys, sequence.values)):
                    pool[which, row // 8, :, row % 8] = source[position].bfloat16()
                column = position if position < self.first else self.first + position - start
                rows[index, column] = row
        none = torch.zeros(0, dtype=torch.int64)
        return Pool(pool[0].contiguous(), pool[1].contiguous()), Exact(none, none, rows, self.first, self.recent)

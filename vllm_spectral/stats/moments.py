"""Second moments of keys, values and queries, accumulated over a calibration run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

SINK_TOKENS = 4
"""Leading tokens of every request that the covariances leave out: attention sinks are outliers that none describes."""


class LayerMoments:
    """Running sums for one layer.

    Args:
        num_heads: KV heads.
        head_dim: channels per head.

    Attributes:
        keys, values, queries: ``[num_heads, head_dim, head_dim]`` float64 sums of outer products; queries are summed
            over the query heads that share a KV head.
        value_sum: ``[num_heads, head_dim]`` float64.
        key_sink, value_sink: ``[num_heads, head_dim]`` float64 sums over the first token of every request.
        num_tokens: tokens in the sums.
        num_prior: how many of them were not measured but added from an earlier profile.
        num_queries: query vectors per KV head in the sums.
        num_sinks: first tokens in the sums.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        self.keys = torch.zeros(num_heads, head_dim, head_dim, dtype=torch.float64)
        self.values = torch.zeros_like(self.keys)
        self.queries = torch.zeros_like(self.keys)
        self.value_sum = torch.zeros(num_heads, head_dim, dtype=torch.float64)
        self.key_sink = torch.zeros_like(self.value_sum)
        self.value_sink = torch.zeros_like(self.value_sum)
        self.num_tokens = 0
        self.num_prior = 0
        self.num_queries = 0
        self.num_sinks = 0

    def add(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Add the tokens of one step.

        Args:
            query: ``[num_tokens, num_query_heads, head_dim]``, after RoPE.
            key, value: ``[num_tokens, num_heads, head_dim]``, the key after RoPE.
            positions: ``[num_tokens]`` int, position of each token in its request.
        """
        first = positions == 0
        if bool(first.any()):
            self.key_sink += key[first].double().sum(0)
            self.value_sink += value[first].double().sum(0)
            self.num_sinks += int(first.sum())
        keep = positions >= SINK_TOKENS
        if not bool(keep.all()):
            key, value, query = key[keep], value[keep], query[keep]
        if not key.shape[0]:
            return
        heads = self.keys.shape[0]
        query = query.view(query.shape[0], heads, -1, query.shape[-1]).transpose(1, 2).flatten(0, 1)
        self.keys += _outer_sum(key)
        self.values += _outer_sum(value)
        self.queries += _outer_sum(query)
        self.value_sum += value.double().sum(0)
        self.num_tokens += key.shape[0]
        self.num_queries += query.shape[0]

    @property
    def num_measured(self) -> int:
        """Tokens in the sums that were measured."""
        return self.num_tokens - self.num_prior

    def occupy(self) -> int:
        """Clear the sums, so that they are resident before anybody measures what memory is free; how many bytes they take."""
        sums = [value.zero_() for value in vars(self).values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in sums)

    def halve(self) -> None:
        """Let what was measured so far count half: for means that follow what is measured."""
        for name, value in vars(self).items():
            setattr(self, name, value // 2 if isinstance(value, int) else value / 2)

    def to_tensors(self) -> dict[str, Tensor]:
        """All sums and counts by name, as tensors: what a file or a message holds."""
        return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerMoments:
        """The inverse of :meth:`to_tensors`."""
        moments = cls(*tensors["value_sum"].shape)
        for name, value in vars(moments).items():
            setattr(moments, name, int(tensors[name]) if isinstance(value, int) else tensors[name])
        return moments

    @classmethod
    def joined(cls, ranks: Sequence[LayerMoments]) -> LayerMoments:
        """The heads of several tensor-parallel ranks, one after the other; the counts are the first one's."""
        moments = cls(0, 0)
        for name, value in vars(ranks[0]).items():
            setattr(moments, name, value if isinstance(value, int) else torch.cat([getattr(r, name) for r in ranks]))
        return moments


def _outer_sum(vectors: Tensor) -> Tensor:
    """``[N, H, D]`` to ``[H, D, D]`` float32: the sum of outer products within a step."""
    rows = vectors.float().transpose(0, 1)
    return rows.transpose(1, 2) @ rows

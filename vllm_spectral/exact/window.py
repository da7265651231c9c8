"""Which tokens of a request are read exactly, and what that takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

GROUP_TOKENS = 8
"""Most tokens per entry of the pool: neighbours within one physical block that are kept or dropped together. Smaller
groups waste fewer copies at a window's ends (at 8 a default window of 4 + 63 takes 80, at 16 it takes 96), larger ones
need fewer entries to be looked after."""
COPY_BYTES = 2
"""Copies are bf16."""
LARGEST_SHARE = 24
"""Without a configured size the tier takes at most this fraction (one over it) of the memory: capacity falls by 4 %."""


@dataclass(frozen=True)
class ExactWindow:
    """A query reads these positions from exact copies, if they are there, and all others from compressed pages.

    Attributes:
        first: the request's first tokens. Attention sinks live there.
        recent: the tokens up to the query, the query's own included.
        slack: how many of a step's newest tokens may be taken back (rejected speculative tokens).
    """

    first: int = 4
    recent: int = 64
    slack: int = 0

    def __bool__(self) -> bool:
        return self.first > 0 or self.recent > 0

    @property
    def kept(self) -> int:
        """Newest tokens that must be kept after a step: whatever the next step's first query may read."""
        return max(self.recent - 1, 0) + self.slack

    def entries_per_request(self, group_tokens: int) -> int:
        """Entries that hold one request's first and kept tokens, however the window lies over the groups."""
        recent = (self.kept + group_tokens - 2) // group_tokens + 1 if self.kept else 0
        return -(-self.first // group_tokens) + recent


def group_tokens(block_size: int) -> int:
    """Tokens per entry for a block size: groups never straddle blocks."""
    return math.gcd(GROUP_TOKENS, block_size)


def copy_bytes(num_heads: int, head_dim: int) -> int:
    """Bytes of one token's exact key and value in one layer."""
    return 2 * num_heads * head_dim * COPY_BYTES


def default_pool_bytes(memory: int, window_bytes: int, max_requests: int) -> int:
    """Bytes that the pool takes of the cache's memory where nobody says how many.

    Args:
        memory: bytes given for the cache.
        window_bytes: what one request's window takes.
        max_requests: requests that run at once.
    """
    # A small cache still gets one request's window, if that leaves most of it to pages.
    return min(max_requests * window_bytes, max(memory // LARGEST_SHARE, min(window_bytes, memory // 4)))

"""How a step is cut into programs: chosen on the host from maxima alone, so that a captured graph fits every shorter step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_spectral.codec.layout import GROUP_TOKENS
from vllm_spectral.kernels.triton.tables import power_of_two

SMALLEST_TILE = 16
"""Rows of a tensor-core product; fewer are padded."""
_LARGEST_TILE = 64
"""Rows whose sums still fit the registers."""
PROMPT_WARPS = 8
"""Sums of so many rows fill the registers of twice as many warps as a decode step has by default."""
_MOST_SPLITS = 64


@dataclass(frozen=True)
class Tuning:
    """What a machine may want otherwise; the defaults are reckoned, not yet measured on a GPU.

    Attributes:
        groups: groups of 32 tokens per tile.
        warps: warps per program of the pages kernel whose tile is the smallest, a decode step's; others have
            :data:`PROMPT_WARPS`.
        programs_per_processor: shares are cut until each multiprocessor has so many programs.
        least_tiles: a share has at least so many tiles.
        registers: most registers per thread of such a program; 0: the compiler's choice.
    """

    groups: int = 2
    warps: int = 4
    programs_per_processor: int = 4
    least_tiles: int = 4
    registers: int = 0


@dataclass(frozen=True)
class Plan:
    """One step's cut.

    Attributes:
        rows: rows per tile, a row being one query and one head of the group.
        tiles: tiles of all requests.
        tiles_per_request: 1: each request has one; 0: as many as it needs, found by bisection on the device.
        splits: shares of each tile's tokens.
        whole: a program finishes its rows alone.
        tuning: what else was chosen.
    """

    rows: int
    tiles: int
    tiles_per_request: int
    splits: int
    whole: bool
    tuning: Tuning

    def scratch_floats(self, num_heads: int, head_dim: int) -> tuple[int, int]:
        """Elements of the shares' sums and of their states."""
        rows = 0 if self.whole else self.tiles * num_heads * self.splits * self.rows
        return rows * head_dim, rows * 2


def plan_step(
    num_requests: int, num_tokens: int, max_queries: int, max_context: int, group: int, num_heads: int,
    processors: int, tuning: Tuning | None = None,
) -> Plan:  # fmt: skip
    """Cut a step.

    Args:
        num_requests, num_tokens: of the step, padding included.
        max_queries: most tokens of the step that a request has.
        max_context: most tokens that a request has after the step.
        group: query heads per KV head.
        num_heads: KV heads.
        processors: multiprocessors of the GPU.
        tuning: default: :class:`Tuning`.
    """
    tuning = tuning or Tuning()
    most_rows = max(max_queries, 1) * group
    rows = min(max(power_of_two(most_rows), SMALLEST_TILE), _LARGEST_TILE)
    # Only decoding has its tiles in a table of equal rows: as a constant of the kernel, the number of a prompt's tiles would
    # have each length compiled anew.
    one_each = most_rows <= rows
    tiles = num_requests if one_each else num_tokens * group // rows + num_requests
    shares = math.ceil(max_context / (tuning.groups * GROUP_TOKENS * tuning.least_tiles))
    splits = min(_splits(tiles * num_heads, processors, tuning), power_of_two(max(shares, 1)))
    return Plan(rows, tiles, int(one_each), splits, splits == 1, tuning)


def _splits(programs: int, processors: int, tuning: Tuning) -> int:
    """Shares per tile that fill the machine, a power of two: each number is compiled for itself.

    Every program walks its whole context where the tiles alone fill the machine.
    """
    wanted = math.ceil(tuning.programs_per_processor * processors / programs)
    return min(power_of_two(max(wanted, 1)), _MOST_SPLITS)


def most_scratch(
    max_tokens: int, group: int, num_heads: int, processors: int, tuning: Tuning | None = None
) -> tuple[int, int]:
    """The most scratch of any step that is cut into shares; others need none.

    Args:
        max_tokens: most tokens of a step, padding included; it has no more requests than these.
        group, num_heads, processors, tuning: as of :func:`plan_step`.

    Returns:
        Rows of rotated queries per KV head, and rows of partial sums, all heads and shares.
    """
    tuning = tuning or Tuning()
    queries = partial = 0
    for rows in (SMALLEST_TILE, 2 * SMALLEST_TILE, _LARGEST_TILE):
        most_tiles = max_tokens * group // rows + max_tokens
        for tiles in range(1, most_tiles + 1):
            splits = _splits(tiles * num_heads, processors, tuning)
            if splits == 1:
                break
            queries = max(queries, min(tiles * rows, max_tokens * group))
            partial = max(partial, tiles * num_heads * splits * rows)
    return queries, partial

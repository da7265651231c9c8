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
_MOST_SPLITS = 64


@dataclass(frozen=True)
class Tuning:
    """What a machine may want otherwise; the defaults are reckoned, not yet measured on a GPU.

    Attributes:
        groups: groups of 32 tokens per tile.
        warps: warps per program of the pages kernel whose tile is the smallest, a decode step's; others have twice as many.
        programs_per_processor: shares are cut until each multiprocessor has so many programs.
        least_tiles: a share has at least so many tiles.
        registers: most registers per thread of the pages kernel; 0: the compiler's choice.
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
        tiles_per_request: of each request; 0: as many as it needs, found by bisection on the device.
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
    per_request = math.ceil(most_rows / rows)
    dense, sparse = num_requests * per_request, num_tokens * group // rows + num_requests
    tiles = min(dense, sparse)
    # Every program walks its whole context where the tiles alone fill the machine.
    wanted = tuning.programs_per_processor * processors / (tiles * num_heads)
    shares = math.ceil(max_context / (tuning.groups * GROUP_TOKENS * tuning.least_tiles))
    splits = max(1, min(math.ceil(wanted), shares, _MOST_SPLITS))
    return Plan(rows, tiles, per_request if dense <= sparse else 0, splits, splits == 1, tuning)

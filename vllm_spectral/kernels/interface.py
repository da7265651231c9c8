"""What a layer's kernels are asked, the same on every device: who implements :class:`LayerKernels` can serve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from vllm_spectral.kernels.library import StepCall


@dataclass(frozen=True)
class Exact:
    """What a step writes into the pool of exact copies, and may then read from it; the same for all layers.

    Attributes:
        write_tokens, write_rows: ``[n]`` int64, tokens of the step to be copied before anything is read, and their rows. A
            row of -1 goes nowhere: only kernels that a graph may capture take it.
        rows: ``[num_requests, first + recent]`` int32: the rows of positions 0 to ``first``, then of the ``recent``
            positions before the request's tokens of this step (from position 0 on if there are fewer); -1 without a copy.
        first, recent: a query at ``p`` reads ``j`` exactly if ``j < first`` or ``p - j < recent``.
    """

    write_tokens: Tensor
    write_rows: Tensor
    rows: Tensor
    first: int
    recent: int


@dataclass(frozen=True)
class Bounds:
    """What the host knows of a step without asking the device: upper bounds, constant while a captured graph is used.

    Attributes:
        max_queries: most tokens of the step that a request has.
        max_context: most tokens that a request has after the step.
    """

    max_queries: int
    max_context: int


@dataclass(frozen=True)
class Requests:
    """The requests of one step, the same for all layers.

    Attributes:
        block_table: ``[num_requests, max_blocks]`` int32, physical blocks in order.
        query_start: ``[num_requests + 1]`` int32, first token of each request in the step, and the end.
        context_lens: ``[num_requests]`` int32, tokens after the step, the queries included.
        slot_mapping: ``[num_tokens]`` int64, where the step's tokens are stored before anything is read, negative:
            padding; None: they are in their pages.
        exact: what is read exactly; None: nothing.
        bounds: of the lengths, for kernels that do not read them on the host.
    """

    block_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    slot_mapping: Tensor | None = None
    exact: Exact | None = None
    bounds: Bounds | None = None

    @cached_property
    def call(self) -> StepCall:
        """The native kernels' arguments of all layers, for each of them to complete."""
        call = StepCall()
        if self.slot_mapping is not None:
            call.slot_mapping, call.num_stored = self.slot_mapping.data_ptr(), self.slot_mapping.shape[0]
        call.block_table, call.block_table_stride = self.block_table.data_ptr(), self.block_table.stride(0)
        call.query_start, call.context_lens = self.query_start.data_ptr(), self.context_lens.data_ptr()
        call.num_requests = self.context_lens.shape[0]
        if (exact := self.exact) is not None:
            call.first, call.recent, call.num_writes = exact.first, exact.recent, exact.write_rows.shape[0]
            call.write_tokens, call.write_rows = exact.write_tokens.data_ptr(), exact.write_rows.data_ptr()
            call.exact_rows = exact.rows.data_ptr()
        return call


@dataclass(frozen=True)
class Pool:
    """One layer's exact copies.

    Attributes:
        keys, values: ``[entries, num_heads, group_tokens, head_dim]`` bf16; row ``r`` is token ``r % group_tokens`` of entry
            ``r // group_tokens``.
    """

    keys: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        assert self.keys.shape[2].bit_count() == 1, "groups are a power of two: they divide 8"


class LayerKernels(Protocol):
    """The kernels of one layer. All tensors are on the kernels' device, and the last dimension of each is contiguous."""

    @property
    def name(self) -> str:
        """What computes, for logs and reports."""

    @property
    def graphs(self) -> bool:
        """Whether calls may be captured in a graph: then no length is read on the host, and tensors must stay in place."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that the kernels keep for this layer, beside the codec's."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch that all layers of the worker share."""

    def reserve(self, max_tokens: int, group: int) -> None:
        """Take the scratch of every step to come; whoever captures graphs calls this before.

        Args:
            max_tokens: most tokens of a step, padding included.
            group: query heads per KV head.
        """

    def store(self, keys: Tensor, values: Tensor, pages: Tensor, slot_mapping: Tensor) -> None:
        """Compress new tokens into their pages: the bytes that ``LayerCodec.encode`` and ``SlotLayout.write`` would write.

        Args:
            keys, values: ``[num_tokens, num_heads, head_dim]``, float32, bfloat16 or float16.
            pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.
            slot_mapping: ``[num_tokens]`` int64, negative: padding.
        """

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        requests: Requests,
        output: Tensor,
        scale: float,
        pool: Pool | None = None,
        *,
        soft_cap: float = 0.0,
        window: int = 0,
    ) -> None:
        """Store the step's tokens and their exact copies, then attend causally; what ``paged_attention`` computes.

        Args:
            query, output: ``[num_tokens, num_query_heads, head_dim]``, float32, bfloat16 or float16.
            keys, values: ``[num_tokens, num_heads, head_dim]``, the step's own.
            pages: ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.
            requests: the step's requests; whether its tokens are stored first, and what is read exactly.
            scale: factor of the scores.
            pool: the copies of what is read exactly; None: nothing is.
            soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0: they do not.
            window: how many tokens up to its own a query sees; 0: all.
        """

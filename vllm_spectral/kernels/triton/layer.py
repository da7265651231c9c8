"""One layer's Triton kernels: :class:`LayerKernels` on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from vllm_spectral.codec.codebook import MAX_BITS
from vllm_spectral.codec.layout import FLAT_FLAG, GROUP_TOKENS
from vllm_spectral.codec.quantizer import FALLBACK_GAIN, NUM_SCALES, SCALE_SEARCH, LayerCodec
from vllm_spectral.errors import KernelError
from vllm_spectral.kernels.interface import Bounds, Exact, Pool, Requests
from vllm_spectral.kernels.library import TRITON
from vllm_spectral.kernels.triton.attend import LOG2_E, finish_kernel, pages_kernel, prepare_kernel
from vllm_spectral.kernels.triton.plan import PROMPT_WARPS, SMALLEST_TILE, Plan, Tuning, most_scratch, plan_step
from vllm_spectral.kernels.triton.store import copy_kernel, store_kernel
from vllm_spectral.kernels.triton.tables import AttendTables, ReadTable, WriteTable, layer_tables, power_of_two

_STORE_TOKENS = 16
_STORE_PROGRAMS_PER_PROCESSOR = 4
_COPY_TILE = 32
_PROCESSORS = 132
"""Multiprocessors of an H100, to plan for where there is no GPU to ask."""
_HEAD_SIZE_STEP = 16

Launch = Callable[..., None]
"""``launch(kernel, grid, *arguments, **options)``."""


class Scratch:
    """Memory of a step that all layers of a worker use in turn.

    A captured graph keeps the addresses. So whoever captures reserves the largest step's before, and from then on nothing
    grows: memory that an older graph still writes to would be given back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._reserved = False

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def reserve(self, counts: dict[str, tuple[int, torch.dtype]]) -> None:
        """Take all that will ever be needed, by name; what is there already stays."""
        self._reserved = False
        for name, (count, dtype) in counts.items():
            self.take(name, count, dtype)
        self._reserved = True

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """``count`` elements under a name; what they hold is undefined.

        Raises:
            KernelError: if the buffer would have to grow after it was reserved, or while a graph is being captured.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
            if self._reserved:
                raise KernelError(
                    f"scratch memory {name!r} needs {count} elements, more than were reserved for any step"
                )
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise KernelError(
                    f"scratch memory {name!r} must grow to {count} elements while a CUDA graph is captured: run the "
                    "largest step once before capturing"
                )
            buffer = self._buffers[name] = torch.empty(max(count, 1), dtype=dtype, device=self._device)
        return buffer


class TritonLayer:
    """The kernels of one layer on one GPU.

    Args:
        codec: the layer's codec, on the CPU.
        device: the GPU; the CPU if Triton's interpreter is on.
        scratch: shared by all layers of the worker.
        tuning: how steps are cut.
        launch: what runs a kernel. Whoever has no GPU can compile it instead.

    Raises:
        KernelError: for a head size that the kernels do not serve, or a device that Triton cannot run on.
    """

    def __init__(
        self,
        codec: LayerCodec,
        device: torch.device,
        scratch: Scratch | None = None,
        tuning: Tuning | None = None,
        *,
        launch: Launch | None = None,
    ) -> None:
        layout = codec.layout
        if layout.head_dim % _HEAD_SIZE_STEP:
            raise KernelError(
                f"the kernels serve head sizes that are multiples of {_HEAD_SIZE_STEP}, not {layout.head_dim}"
            )
        self._interpreted = bool(knobs.runtime.interpret)
        if device.type != "cuda" and not self._interpreted and launch is None:
            raise KernelError(f"Triton kernels need an NVIDIA GPU, not {device}; without one: TRITON_INTERPRET=1")
        self._layout, self._device = layout, device
        self._launch = launch or _run
        self._tuning = tuning or Tuning()
        self.scratch = scratch or Scratch(device)
        self._tables = layer_tables(codec, device)
        self._processors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _PROCESSORS
        )
        self._shape = {
            "HEADS": layout.num_heads, "D": layout.head_dim, "DP": power_of_two(layout.head_dim),
        }  # fmt: skip

    @property
    def name(self) -> str:
        """See :class:`LayerKernels`."""
        return f"{TRITON} (interpreted)" if self._interpreted else TRITON

    @property
    def graphs(self) -> bool:
        """No length is read on the host."""
        return True

    @property
    def resident_bytes(self) -> int:
        """See :class:`LayerKernels`; on the device."""
        return self._tables.resident_bytes

    @property
    def workspace_bytes(self) -> int:
        """See :class:`LayerKernels`; on the device."""
        return self.scratch.num_bytes

    def reserve(self, max_tokens: int, group: int) -> None:
        """See :class:`LayerKernels`."""
        heads, dim = self._layout.num_heads, self._layout.head_dim
        rows, partial = most_scratch(max_tokens, group, heads, self._processors, self._tuning)
        self.scratch.reserve(
            {
                "store": (self._store_programs(max_tokens) * self._store_floats, torch.float32),
                "rotated": (rows * heads * dim, torch.bfloat16),
                "flat": (rows * heads * dim, torch.bfloat16),
                "centers": (rows * heads, torch.float32),
                "sums": (partial * dim, torch.float32),
                "state": (partial * 2, torch.float32),
            }
        )

    @property
    def _store_tokens(self) -> int:
        return 64 if self._interpreted else _STORE_TOKENS

    @property
    def _store_floats(self) -> int:
        """Scratch of one program of the store kernel."""
        return len(SCALE_SEARCH) * self._layout.head_dim * self._store_tokens

    def _store_programs(self, num_tokens: int) -> int:
        units = -(-num_tokens // self._store_tokens) * 2 * self._layout.num_heads
        return min(units, _STORE_PROGRAMS_PER_PROCESSOR * self._processors)

    def store(self, keys: Tensor, values: Tensor, pages: Tensor, slot_mapping: Tensor) -> None:
        """See :class:`LayerKernels`."""
        count, tokens = slot_mapping.shape[0], self._store_tokens
        if not count:
            return
        store, layout = self._tables.store, self._layout
        programs = self._store_programs(count)
        scratch = self.scratch.take("store", programs * self._store_floats, torch.float32)
        self._launch(
            store_kernel, (programs,),
            *_rows(keys), *_rows(values), slot_mapping, count, *_rows(pages), pages.shape[2],
            store.basis, store.center, store.needed, store.word_first, store.word_half,
            *_written(store.spectral), *_written(store.flat),
            store.boundaries, self._tables.levels, store.scales, store.inverse_scales, store.scale_bounds, scratch,
            FALLBACK_GAIN, **self._shape, TOKENS=tokens, ROW=1 << MAX_BITS, SEARCH=len(SCALE_SEARCH),
            SEARCH_FIRST=SCALE_SEARCH.start, LAST_SCALE=NUM_SCALES - 1, WORDS=store.spectral.channel.shape[1],
            FIELDS=store.spectral.channel.shape[2], FLAT_FIELDS=store.flat.channel.shape[2], SLOT=layout.slot_bytes,
            GROUP=GROUP_TOKENS, LANE=self._tables.lane_step, FLAT_FLAG=FLAT_FLAG, COORDINATES=_HEAD_SIZE_STEP,
            **self.options("store"),
        )  # fmt: skip

    def keep(self, keys: Tensor, values: Tensor, pool: Pool, exact: Exact) -> None:
        """Write the step's exact copies into the pool.

        Args:
            keys, values: ``[num_tokens, num_heads, head_dim]``, the step's own.
            pool: the copies.
            exact: which tokens go where; a row of -1 goes nowhere.
        """
        count = exact.write_rows.shape[0]
        if count:
            self._launch(
                copy_kernel, (count, self._layout.num_heads),
                *_rows(keys), *_rows(values), exact.write_tokens, exact.write_rows, pool.keys, pool.values,
                **self._shape, COPY_GROUP=pool.keys.shape[2], EMULATE=self._interpreted, **self.options("copy"),
            )  # fmt: skip

    def plan(self, num_requests: int, num_tokens: int, bounds: Bounds, group: int) -> Plan:
        """How a step is cut; arguments as of :func:`plan_step`."""
        return plan_step(
            num_requests, num_tokens, bounds.max_queries, bounds.max_context, group, self._layout.num_heads,
            self._processors, self._tuning,
        )  # fmt: skip

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
        """See :class:`LayerKernels`; ``requests`` must have bounds. All lengths stay on the device."""
        assert requests.bounds is not None
        exact = requests.exact if pool is not None else None
        if requests.slot_mapping is not None:
            self.store(keys, values, pages, requests.slot_mapping)
        if exact is not None and pool is not None:
            self.keep(keys, values, pool, exact)
        num_tokens, num_query_heads, dim = query.shape
        heads, group = self._layout.num_heads, num_query_heads // self._layout.num_heads
        num_requests = requests.context_lens.shape[0]
        if not num_tokens or not num_requests:
            return
        plan = self.plan(num_requests, num_tokens, requests.bounds, group)
        t = self._tables
        page_factor = scale if soft_cap else scale * float(LOG2_E)
        sums, state = plan.scratch_floats(heads, dim)
        partial = (self.scratch.take("sums", sums, torch.float32), self.scratch.take("state", state, torch.float32))
        rotated, flat, centers = query, query, t.levels
        if not plan.whole:
            count = num_tokens * num_query_heads
            rotated = self.scratch.take("rotated", count * dim, torch.bfloat16)
            flat = self.scratch.take("flat", count * dim, torch.bfloat16)
            centers = self.scratch.take("centers", count, torch.float32)
            self._launch(
                prepare_kernel, (-(-num_tokens * group // plan.rows), heads),
                *_rows(query), num_tokens * group, *_sides(t.keys), page_factor, rotated, flat, centers,
                **self._shape, G=group, M=plan.rows, EMULATE=self._interpreted, **self.options("prepare"),
            )  # fmt: skip
        shape: dict[str, Any] = {
            **self._shape, "G": group, "M": plan.rows, "SUBS": plan.tuning.groups, "MOST_TILES": plan.tiles_per_request,
            "SPLITS": plan.splits, "LEAST": plan.tuning.least_tiles, "EXACT": exact is not None,
            "FIRST": exact.first if exact else 0, "RECENT": exact.recent if exact else 0,
            "COPY_GROUP": pool.keys.shape[2] if pool else 1, "COPIES": _COPY_TILE, "SOFT_CAP": soft_cap,
            "WINDOW": window, "EMULATE": self._interpreted,
        }  # fmt: skip
        where = (requests.query_start, requests.context_lens, num_requests)
        rows = exact.rows if exact else requests.block_table
        own = (*_rows(keys), *_rows(values), *((pool.keys, pool.values) if pool else (keys, values)))
        to = (*_rows(output), *partial)
        self._launch(
            pages_kernel, (plan.tiles, heads, plan.splits),
            *_rows(query), rotated, flat, centers, page_factor, page_factor, *where,
            requests.block_table, requests.block_table.stride(0), *_rows(pages), rows,
            *_sides(t.keys), *_read(t.keys.spectral), *_read(t.keys.flat), t.key_half,
            *_sides(t.values), *_read(t.values.spectral), *_read(t.values.flat), t.levels, *own, *to,
            **shape, BLOCK=pages.shape[2], SLOT=self._layout.slot_bytes, WHOLE=plan.whole, **self.options("pages", plan),
        )  # fmt: skip
        if not plan.whole:
            self._launch(
                finish_kernel,
                (plan.tiles, heads),
                *_rows(query),
                page_factor,
                *where,
                rows,
                t.values.basis,
                *own,
                *to,
                **shape,
                **self.options("finish"),
            )

    @staticmethod
    def options(kernel: str, plan: Plan | None = None) -> dict[str, Any]:
        """How a kernel is compiled."""
        options: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": kernel != "store"}
        if kernel == "copy":
            options["num_warps"] = 1
        if plan is not None and plan.rows > SMALLEST_TILE:
            options["num_warps"] = PROMPT_WARPS
        elif plan is not None:
            options["num_warps"] = plan.tuning.warps
            if plan.tuning.registers:
                options["maxnreg"] = plan.tuning.registers
        return options


def _run(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)


def _rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    return tensor, tensor.stride(0), tensor.stride(1)


def _sides(tables: AttendTables) -> tuple[Tensor, ...]:
    return tables.basis, tables.center, tables.width, tables.flat_width


def _read(table: ReadTable) -> tuple[Tensor, ...]:
    return table.offset, table.turn, table.mask


def _written(table: WriteTable) -> tuple[Tensor, ...]:
    return (
        table.bits, table.shift, table.width, table.inverse_width, table.inverse_stored, table.most_bits, table.channel,
    )  # fmt: skip

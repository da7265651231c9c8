"""One layer's codec, handed to the native kernels: :class:`LayerKernels` on the CPU."""

from __future__ import annotations

import ctypes
import threading
import weakref

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import MAX_BITS
from vllm_spectral.codec.layout import FIELDS_START, GROUP_TOKENS, VECTOR_BYTES
from vllm_spectral.codec.quantizer import (
    FALLBACK_GAIN,
    FALLBACK_SLACK,
    NUM_SCALES,
    SCALE_SEARCH,
    LayerCodec,
    VectorCoding,
)
from vllm_spectral.errors import KernelError
from vllm_spectral.kernels.interface import Pool, Requests
from vllm_spectral.kernels.library import CodingSpec, LayerSpec, Library, Pages, Rows, StepCall, library

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LANES = 16
_LARGEST_HEAD = 256
"""What a row of a query has room for in registers and on the stack."""
_MOST_SCALES = 8
"""Scales that a kernel tries at once, one per lane, for two tokens."""


class Workspace:
    """Scratch of the kernels, shared by all layers of a process: they run one after another.

    Attributes:
        lock: held by whoever uses it: a process may have engines in several threads.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._buffer.numel()

    @property
    def address(self) -> int:
        """Where it lies."""
        return self._buffer.data_ptr()

    def grow(self, num_bytes: int) -> None:
        """Make room for at least so many bytes; a few more, since a longer context needs them."""
        self._buffer = torch.empty(num_bytes + num_bytes // 4, dtype=torch.uint8)


WORKSPACE = Workspace()


class NativeLayer:
    """The kernels of one layer.

    Args:
        codec: the layer's codec.
        lib: the kernels; default: the best for this machine.

    Raises:
        KernelError: for a head size that the kernels do not serve.
        MemoryError: if there is no room for the kernels' tables.
    """

    def __init__(self, codec: LayerCodec, lib: Library | None = None) -> None:
        self._lib = lib or library()
        layout = codec.layout
        if layout.head_dim % _LANES or layout.head_dim > _LARGEST_HEAD:
            raise KernelError(
                f"the kernels serve head sizes that are multiples of {_LANES} up to {_LARGEST_HEAD}, not {layout.head_dim}"
            )
        assert len(SCALE_SEARCH) <= _MOST_SCALES and SCALE_SEARCH.step == 1
        keep: list[Tensor] = []

        def pointer(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
            keep.append(tensor.to(dtype).contiguous())
            return keep[-1].data_ptr()

        def coding(part: VectorCoding) -> CodingSpec:
            integers = []
            for table in (part.spectral, part.flat):
                integers += [
                    pointer(t, torch.int32) for t in (table.bits, table.vector * VECTOR_BYTES, table.vector_shift)
                ]
            needed = part.flat_distortion * FALLBACK_SLACK
            assert part.basis.dtype == torch.float32 and part.basis.is_contiguous()
            floats = (part.center, part.width, part.flat_width, needed)
            return CodingSpec(part.basis.data_ptr(), *map(pointer, floats), *integers)

        starts = torch.full((layout.num_heads,), FIELDS_START)
        spec = LayerSpec(
            layout.num_heads, layout.head_dim, layout.slot_bytes, MAX_BITS, coding(codec.keys), coding(codec.values),
            pointer(starts, torch.int32), pointer(layout.key_half_bytes, torch.int32),
            pointer(layout.value_start, torch.int32), pointer(codec.codebooks.levels), pointer(codec.codebooks.boundaries),
            pointer(codec.scales), pointer(codec.inverse_scales), pointer(codec.scale_bounds), SCALE_SEARCH.start,
            len(SCALE_SEARCH), FALLBACK_GAIN,
        )  # fmt: skip
        assert len(codec.scales) == NUM_SCALES
        self._handle: int | None = self._lib.layer_create(ctypes.byref(spec))
        if self._handle is None:
            raise MemoryError("no memory for the kernels' tables of a layer")
        self._pages: tuple[weakref.ref[Tensor], Pages] | None = None
        self._bases = (codec.keys.basis, codec.values.basis)  # the kernels read them where they are
        weakref.finalize(self, self._lib.layer_destroy, self._handle)

    @property
    def name(self) -> str:
        """The instruction set in use."""
        return self._lib.isa

    @property
    def graphs(self) -> bool:
        """Lengths are read on the host, where the kernels run."""
        return False

    @property
    def resident_bytes(self) -> int:
        """See :class:`LayerKernels`."""
        return int(self._lib.layer_bytes(self._handle))

    @property
    def workspace_bytes(self) -> int:
        """See :class:`LayerKernels`; what was needed so far."""
        return WORKSPACE.num_bytes

    def reserve(self, max_tokens: int, group: int) -> None:
        """Nothing keeps the address of scratch here, so that it grows with the steps that come."""

    def store(self, keys: Tensor, values: Tensor, pages: Tensor, slot_mapping: Tensor) -> None:
        """See :class:`LayerKernels`."""
        slot_mapping = slot_mapping.long()
        call = StepCall()
        _point(call.keys, keys)
        _point(call.values, values)
        call.slot_mapping, call.num_stored = slot_mapping.data_ptr(), slot_mapping.shape[0]
        self._run(call, pages)

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
        """See :class:`LayerKernels`."""
        call = requests.call
        _point(call.query, query)
        _point(call.keys, keys)
        _point(call.values, values)
        _point(call.output, output)
        call.num_query_heads = query.shape[1]
        call.exact_on = pool is not None and requests.exact is not None
        if pool is not None:
            call.copy_keys, call.copy_values = pool.keys.data_ptr(), pool.values.data_ptr()
            call.copy_shift = pool.keys.shape[2].bit_length() - 1
        call.scale, call.soft_cap, call.window = scale, soft_cap, window
        self._run(call, pages)

    def _run(self, call: StepCall, pages: Tensor) -> None:
        if self._pages is None or self._pages[0]() is not pages:
            # Mostly the same tensor as in the last step.
            self._pages = (weakref.ref(pages), _place(pages))
        call.pages = self._pages[1]
        call.num_threads = torch.get_num_threads()
        with WORKSPACE.lock:
            needed = self._try(call)
            if needed > 0:
                WORKSPACE.grow(needed)
                needed = self._try(call)
        if needed:
            raise MemoryError("no memory for a step's plan")

    def _try(self, call: StepCall) -> int:
        call.workspace, call.workspace_bytes = WORKSPACE.address, WORKSPACE.num_bytes
        return int(self._lib.step(self._handle, call))


def _place(pages: Tensor) -> Pages:
    """Where pages lie.

    Raises:
        ValueError: if groups of tokens are no whole vectors there.
    """
    block, head, _, _ = pages.stride()
    if pages.shape[2] % GROUP_TOKENS:
        raise ValueError(f"blocks hold whole groups of {GROUP_TOKENS} tokens, not {pages.shape[2]} tokens")
    if any(number % VECTOR_BYTES for number in (pages.data_ptr(), block, head)):
        raise ValueError(f"pages begin at multiples of {VECTOR_BYTES} bytes: vectors are read from them whole")
    return Pages(pages.data_ptr(), block, head, pages.shape[2])


def _point(rows: Rows, tensor: Tensor) -> None:
    """Make a field of a call describe a tensor. In place: a structure made anew costs more than its four numbers."""
    rows.token_stride, rows.head_stride, _ = tensor.stride()
    rows.data, rows.dtype = tensor.data_ptr(), _DTYPES[tensor.dtype]

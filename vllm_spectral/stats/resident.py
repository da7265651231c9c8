"""What the kernel says is in memory."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
from torch import Tensor

_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_bytes() -> int:
    """Resident memory of this process (``proc(5)``: the second field of ``statm``, in pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def tensor_bytes(tensor: Tensor) -> int | None:
    """The part of a tensor that is in memory: the host's is not, until it is written (``mincore(2)``); a GPU's is at once.

    Args:
        tensor: contiguous; its memory pages are counted whole where they lie inside it.

    Returns:
        Bytes; None if the kernel does not say.
    """
    if tensor.device.type != "cpu":
        return tensor.numel() * tensor.element_size()
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    first, last = start // _PAGE, -(-end // _PAGE)
    resident = np.zeros(last - first, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    where, length = ctypes.c_void_p(first * _PAGE), ctypes.c_size_t((last - first) * _PAGE)
    if libc.mincore(where, length, ctypes.c_void_p(resident.ctypes.data)):
        return None
    # The lowest bit is the one that means something.
    pages = int(np.count_nonzero(resident & 1))
    return min(pages * _PAGE, end - start)

"""Loading the compiled kernels: the best instruction set that the machine has, chosen once per process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch  # noqa: F401 - first: its OpenMP runtime then serves the kernels too, and there is one pool of threads

import vllm_spectral.kernels
from vllm_spectral.errors import KernelError

ISA_VARIABLE = "VLLM_SPECTRAL_ISA"
"""Names another instruction set than the best, or the torch reference."""
FOLDER_VARIABLE = "VLLM_SPECTRAL_KERNELS"
"""Names a folder to load the libraries from instead of the installed ones: for builds under sanitizers."""
REFERENCE = "reference"
"""In place of an instruction set: the torch code that defines what the kernels compute, and is far slower."""
TRITON = "triton"
"""In place of an instruction set: the GPU's kernels, under Triton's interpreter. Slower still: for tests."""


class CodingSpec(ctypes.Structure):
    """``CodingSpec`` of ``native/abi.h``."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "basis", "center", "width", "flat_width", "flat_needed", "bits", "offset", "shift", "flat_bits", "flat_offset",
            "flat_shift",
        )
    ]  # fmt: skip


class LayerSpec(ctypes.Structure):
    """``LayerSpec`` of ``native/abi.h``."""

    _fields_ = [
        *((name, c_int64) for name in ("num_heads", "head_dim", "slot_bytes", "max_bits")),
        ("keys", CodingSpec),
        ("values", CodingSpec),
        *((name, c_void_p) for name in ("key_start", "key_half", "value_start", "levels", "boundaries")),
        *((name, c_void_p) for name in ("scales", "inverse_scales", "scale_bounds")),
        *((name, c_int64) for name in ("search_first", "search_count")),
        ("fallback_gain", c_float),
    ]


class Rows(ctypes.Structure):
    """``Rows`` of ``native/abi.h``."""

    _fields_ = [("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64), ("dtype", c_int32)]


class Pages(ctypes.Structure):
    """``Pages`` of ``native/abi.h``."""

    _fields_ = [("data", c_void_p), ("block_stride", c_int64), ("head_stride", c_int64), ("block_size", c_int64)]


class StepCall(ctypes.Structure):
    """``StepCall`` of ``native/abi.h``."""

    _fields_ = [
        ("query", Rows), ("keys", Rows), ("values", Rows), ("output", Rows), ("pages", Pages),
        ("slot_mapping", c_void_p), ("num_stored", c_int64),
        ("block_table", c_void_p), ("block_table_stride", c_int64), ("query_start", c_void_p), ("context_lens", c_void_p),
        ("num_requests", c_int64), ("num_query_heads", c_int64),
        ("exact_on", c_int32), ("first", c_int32), ("recent", c_int32),
        ("copy_keys", c_void_p), ("copy_values", c_void_p), ("copy_shift", c_int32),
        ("write_tokens", c_void_p), ("write_rows", c_void_p), ("num_writes", c_int64), ("exact_rows", c_void_p),
        ("scale", c_float), ("soft_cap", c_float), ("window", c_int32), ("num_threads", c_int32),
        ("workspace", c_void_p), ("workspace_bytes", c_int64),
    ]  # fmt: skip


class Library:
    """One loaded library.

    Args:
        path: the shared library.

    Raises:
        KernelError: if it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            handle = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(
                f"cannot load the compiled kernels ({error}): install the package from its wheel, or from its source with "
                "a C++ compiler"
            ) from None
        self.layer_create = handle.vs_layer_create
        self.layer_create.argtypes, self.layer_create.restype = [POINTER(LayerSpec)], c_void_p
        self.layer_destroy = handle.vs_layer_destroy
        self.layer_destroy.argtypes, self.layer_destroy.restype = [c_void_p], None
        self.layer_bytes = handle.vs_layer_bytes
        self.layer_bytes.argtypes, self.layer_bytes.restype = [c_void_p], c_int64
        self.step = handle.vs_step
        self.step.argtypes, self.step.restype = [c_void_p, POINTER(StepCall)], c_int64
        self.read = handle.vs_read
        self.read.argtypes, self.read.restype = [c_void_p, c_int64, c_int32], c_int64
        handle.vs_isa.restype = handle.vs_machine_isas.restype = c_char_p
        self.isa: str = handle.vs_isa().decode()
        self.machine_isas: tuple[str, ...] = tuple(handle.vs_machine_isas().decode().split(","))


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run and this build has, best first.

    Raises:
        KernelError: if the package was installed without its kernels.
    """
    return tuple(isa for isa in _load("portable").machine_isas if _path(isa).exists())


def chosen(environment: Mapping[str, str] = os.environ) -> str:
    """What this process computes with on the CPU: an instruction set, ``reference`` or ``triton``.

    Raises:
        KernelError: if the environment names one that does not exist here.
    """
    wanted = environment.get(ISA_VARIABLE)
    return wanted if wanted in (REFERENCE, TRITON) else library(environment).isa


def library(environment: Mapping[str, str] = os.environ) -> Library:
    """The library to use: the best, or the one that ``VLLM_SPECTRAL_ISA`` names.

    Raises:
        KernelError: if the named one does not exist here.
    """
    known = isas()
    wanted = environment.get(ISA_VARIABLE) or known[0]
    if wanted not in known:
        raise KernelError(f"{ISA_VARIABLE}={wanted}: this machine and build have {', '.join(known)}, and {REFERENCE}")
    return _load(wanted)


def _path(isa: str) -> Path:
    # An editable install keeps what was compiled apart from the sources: the package then has two folders.
    other = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(folder) for folder in ([other] if other else vllm_spectral.kernels.__path__)]
    return next((f / _file(isa) for f in folders if (f / _file(isa)).exists()), folders[0] / _file(isa))


def _file(isa: str) -> str:
    return f"vllm_spectral_{isa}.so"


@lru_cache
def _load(isa: str) -> Library:
    return Library(_path(isa))

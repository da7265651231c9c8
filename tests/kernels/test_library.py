"""Loading, choosing and registering."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.conftest import ISAS, codec_of, tokens
from vllm_spectral.errors import KernelError
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.library import ISA_VARIABLE, REFERENCE, Library, chosen, isas, library
from vllm_spectral.kernels.ops import register_layer


def test_the_best_is_the_default_and_any_other_can_be_asked_for() -> None:
    assert library({}).isa == chosen({}) == ISAS[0]
    assert ISAS[-1] == "portable"
    for isa in ISAS:
        assert library({ISA_VARIABLE: isa}).isa == isa
    assert chosen({ISA_VARIABLE: REFERENCE}) == REFERENCE


def test_an_instruction_set_that_is_not_here_is_refused_by_name() -> None:
    with pytest.raises(KernelError, match=r"VLLM_SPECTRAL_ISA=avx1024: this machine and build have .*portable"):
        chosen({ISA_VARIABLE: "avx1024"})


def test_missing_kernels_are_an_error_that_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="install the package from its wheel"):
        Library(tmp_path / "vllm_spectral_portable.so")


def test_kernels_share_torchs_threads() -> None:
    """One OpenMP runtime in the process: two would oversubscribe the cores."""
    code = (
        "from vllm_spectral.kernels.library import library; library({});"
        "maps = open('/proc/self/maps').read().splitlines();"
        "print(len({line.split()[-1] for line in maps if 'libgomp' in line}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_head_size_that_no_vector_divides_is_refused() -> None:
    with pytest.raises(KernelError, match="multiples of 16"):
        NativeLayer(codec_of(1, 40, 4.0))


def test_a_head_size_that_has_no_room_is_refused() -> None:
    with pytest.raises(KernelError, match="up to 256, not 320"):
        NativeLayer(codec_of(1, 320, 4.0))


def test_pages_in_which_groups_of_tokens_are_no_whole_vectors_are_refused() -> None:
    codec = codec_of(2, 64, 3.0)
    layer, keys = NativeLayer(codec), tokens(16, 0, 2, 64, torch.bfloat16)
    slot = codec.layout.slot_bytes
    with pytest.raises(ValueError, match="whole groups of 32 tokens, not 16"):
        layer.store(keys, keys, torch.zeros(2, 2, 16, slot, dtype=torch.uint8), torch.arange(16))
    shifted = torch.zeros(2 * 2 * 32 * slot + 8, dtype=torch.uint8)[8:].view(2, 2, 32, slot)
    with pytest.raises(ValueError, match="multiples of 64 bytes"):
        layer.store(keys, keys, shifted, torch.arange(16))


def test_what_the_kernels_keep_is_counted() -> None:
    codec = codec_of(2, 64, 3.0)
    basis = 2 * 64 * 64 * 4
    kept = basis * (2 if "amx" in isas()[0] else 1)  # tiles of both, or the values' transposed
    assert kept < NativeLayer(codec).resident_bytes < kept + 2 * basis


def test_the_operators_can_be_traced() -> None:
    codec = codec_of(2, 64, 3.0)
    layer = NativeLayer(codec)
    number = register_layer(layer)
    keys = tokens(40, 0, 2, 64, torch.bfloat16)
    pages = torch.zeros(2, 2, 32, codec.layout.slot_bytes, dtype=torch.uint8)
    starts, lens = torch.tensor([0, 40], dtype=torch.int32), torch.tensor([40], dtype=torch.int32)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    query, output = torch.randn(40, 4, 64), torch.empty(40, 4, 64)
    store = torch.ops.vllm_spectral.store
    attend = torch.ops.vllm_spectral.attend
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(store, (keys, keys, pages, torch.arange(40), number), test_utils=utilities)
    arguments = (
        query,
        keys,
        keys,
        pages,
        table,
        starts,
        lens,
        None,
        None,
        None,
        None,
        None,
        output,
        number,
        0,
        0,
        0.1,
        0.0,
        0,
    )
    torch.library.opcheck(attend, arguments, test_utils=utilities)
    # The check above works on copies of its arguments.
    output.fill_(torch.nan)
    store(keys, keys, pages, torch.arange(40), number)
    attend(*arguments)
    assert output.isfinite().all()

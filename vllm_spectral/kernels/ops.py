"""The kernels as torch operators, ``torch.ops.vllm_spectral.store`` and ``.attend``, with what tracing needs.

For graphs that call the kernels themselves. Inside vLLM, attention is one operator of vLLM's already, and the backend
calls the kernels directly: dispatching an operator with as many arguments costs as much as attending to a short context.

A layer is named by a number, since an operator's arguments are tensors and plain values.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from vllm_spectral.kernels.interface import Exact, Pool, Requests
from vllm_spectral.kernels.layer import NativeLayer

_LIBRARY: Any = torch.library.Library("vllm_spectral", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("store(Tensor keys, Tensor values, Tensor(a!) pages, Tensor slot_mapping, int layer) -> ()")
_LIBRARY.define(
    "attend(Tensor query, Tensor keys, Tensor values, Tensor pages, Tensor block_table, Tensor query_start, "
    "Tensor context_lens, Tensor(a!)? copy_keys, Tensor(b!)? copy_values, Tensor? write_tokens, Tensor? write_rows, "
    "Tensor? copy_rows, Tensor(c!) output, int layer, "
    "int first, int recent, float scale, float soft_cap, int window) -> ()"
)
_LAYERS: weakref.WeakValueDictionary[int, NativeLayer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


def register_layer(layer: NativeLayer) -> int:
    """A number for the operators; valid as long as the layer lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


def _store(keys: Tensor, values: Tensor, pages: Tensor, slot_mapping: Tensor, layer: int) -> None:
    _LAYERS[layer].store(keys, values, pages, slot_mapping)


def _attend(  # noqa: PLR0913, PLR0917 - an operator's arguments are tensors and plain values
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    copy_keys: Tensor | None,
    copy_values: Tensor | None,
    write_tokens: Tensor | None,
    write_rows: Tensor | None,
    copy_rows: Tensor | None,
    output: Tensor,
    layer: int,
    first: int,
    recent: int,
    scale: float,
    soft_cap: float,
    window: int,
) -> None:
    exact = pool = None
    if copy_keys is not None:
        assert copy_values is not None and write_tokens is not None and write_rows is not None and copy_rows is not None
        exact, pool = Exact(write_tokens, write_rows, copy_rows, first, recent), Pool(copy_keys, copy_values)
    requests = Requests(block_table, query_start, context_lens, exact=exact)
    _LAYERS[layer].attend(query, keys, values, pages, requests, output, scale, pool, soft_cap=soft_cap, window=window)


def _no_result(*_args: object) -> None:
    """Both operators write into tensors they were given: nothing to infer."""


_LIBRARY.impl("store", _store, "CPU")
_LIBRARY.impl("attend", _attend, "CPU")
torch.library.register_fake("vllm_spectral::store", _no_result, lib=_LIBRARY)
torch.library.register_fake("vllm_spectral::attend", _no_result, lib=_LIBRARY)

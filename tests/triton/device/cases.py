"""The CPU kernels' generated steps, answered by the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch

from tests.kernels.conftest import Step
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.kernels.interface import Bounds, Exact, Pool, Requests
from vllm_spectral.kernels.triton.layer import TritonLayer
from vllm_spectral.kernels.triton.plan import Tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

SHAPES = [
    (3, 64, 3.0, 3),
    (1, 128, 4.0, 4),
    (2, 32, 4.5, 1),
    (2, 80, 2.5, 7),
    (1, 256, 3.0, 2),
    (2, 96, 6.0, 5),
    (1, 64, 1.5, 71),
]
"""Heads, head size, bits, group: those of the CPU kernels' tests."""


def layer_of(codec: LayerCodec, tuning: Tuning | None = None) -> TritonLayer:
    return TritonLayer(codec, DEVICE, tuning=tuning)


def store(
    codec: LayerCodec, keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store on the device, into pages on the CPU."""
    there = pages.to(DEVICE)
    layer_of(codec).store(keys.to(DEVICE), values.to(DEVICE), there, slots.to(DEVICE))
    pages.copy_(there)


def attend(
    step: Step,
    exact: bool,
    *,
    bounds: Bounds | None = None,
    tuning: Tuning | None = None,
    padding: int = 0,
    **options: Any,
) -> torch.Tensor:
    """``[tokens, query heads, dim]`` float32; ``padding``: empty requests behind the others, as in a captured graph."""
    longest = max(len(s.blocks) for s in step.sequences)
    table = torch.full((len(step.sequences) + padding, longest), 10**6, dtype=torch.int32)
    for row, sequence in enumerate(step.sequences):
        table[row, : len(sequence.blocks)] = sequence.blocks
    starts = torch.tensor([0, *step.queries, *[0] * padding]).cumsum(0).int()
    pool, copied = step._copies() if exact else (None, None)
    if pool is not None and copied is not None:
        rows = torch.cat([copied.rows, torch.full((padding, copied.rows.shape[1]), -1, dtype=torch.int32)])
        none = torch.zeros(0, dtype=torch.int64)
        pool = Pool(pool.keys.to(DEVICE), pool.values.to(DEVICE))
        copied = Exact(none, none, rows.to(DEVICE), copied.first, copied.recent)
    contexts = torch.tensor(step.contexts + [0] * padding, dtype=torch.int32)
    bounds = bounds or Bounds(max(step.queries), max(step.contexts))
    requests = Requests(table.to(DEVICE), starts.to(DEVICE), contexts.to(DEVICE), None, copied, bounds)
    keys, values = (torch.cat([step.own(i)[k] for i in range(len(step.sequences))]).to(DEVICE) for k in (0, 1))
    output = torch.full(step.query.shape, torch.nan, device=DEVICE)
    layer_of(step.codec, tuning).attend(
        step.query.to(DEVICE),
        keys,
        values,
        step.pages.to(DEVICE),
        requests,
        output,
        step.scale,
        pool,
        **options,
    )
    return output.cpu()


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.isfinite(found).all()
    assert (found - expected).norm() <= tolerance * expected.norm()

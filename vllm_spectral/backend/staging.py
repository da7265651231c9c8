"""Where a step's plan lies on the device: at fixed addresses, because a captured graph keeps them."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_spectral.exact.directory import StepPlan
from vllm_spectral.exact.window import ExactWindow
from vllm_spectral.kernels.interface import Exact


class StepBuffers:
    """The exact tier's part of a step.

    Args:
        window: what is read exactly.
        max_requests, max_tokens: most of a step, padding included.
        device: the kernels'.
    """

    def __init__(self, window: ExactWindow, max_requests: int, max_tokens: int, device: torch.device) -> None:
        self._window = window
        width = window.first + window.recent
        shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
            ((max_tokens,), torch.int64), ((max_tokens,), torch.int64), ((max_requests, width), torch.int32),
        )  # fmt: skip
        # Pinned, or the copies would hold up the host.
        self._host = [torch.full(shape, -1, dtype=dtype, pin_memory=device.type == "cuda") for shape, dtype in shapes]
        self._there = [torch.full(shape, -1, dtype=dtype, device=device) for shape, dtype in shapes]

    def show(self, plan: StepPlan | None, num_requests: int, num_tokens: int, *, captured: bool) -> Exact:
        """Put a step's plan where the kernels read it.

        The step before must have read its own: whoever makes the plan has waited for the lengths on the device, and those
        are written after it.

        Args:
            plan: None: nothing is written, and nothing read.
            num_requests, num_tokens: of the step, padding included.
            captured: whether a graph may replay the step: it then copies as many tokens as the step has, whatever is to be
                copied.
        """
        writes = len(plan.write_tokens) if plan is not None else 0
        used = num_tokens if captured else writes
        for host, there, planned, count in zip(
            self._host,
            self._there,
            (plan.write_tokens, plan.write_rows, plan.rows) if plan is not None else (None,) * 3,
            (used, used, num_requests),
            strict=True,
        ):
            filled = len(planned) if planned is not None else 0
            if planned is not None:
                host[:filled] = planned
            host[filled:count] = -1
            there[:count].copy_(host[:count], non_blocking=True)
        tokens, write_rows, rows = self._there
        return Exact(tokens[:used], write_rows[:used], rows[:num_requests], self._window.first, self._window.recent)

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._there)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor where the host can read it; on a GPU this waits for all that was asked of it before."""
    return tensor if tensor.device.type == "cpu" else tensor.cpu()

"""Which kernels serve a layer: decided by the device, and on the CPU by what the environment asks for."""

from __future__ import annotations

import torch

from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.kernels.interface import LayerKernels
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.kernels.library import REFERENCE, TRITON, chosen


def layer_kernels(codec: LayerCodec, device: torch.device, peer: LayerKernels | None = None) -> LayerKernels | None:
    """A layer's kernels.

    Args:
        codec: the layer's codec, on the CPU.
        device: where its pages are.
        peer: those of another layer of the worker, to share scratch with.

    Returns:
        None where the torch reference was asked for.

    Raises:
        KernelError: if they cannot serve the layer, or what the environment asks for does not exist here.
    """
    if device.type == "cpu" and chosen() == REFERENCE:
        return None
    if device.type == "cpu" and chosen() != TRITON:
        return NativeLayer(codec)
    from vllm_spectral.kernels.triton.layer import TritonLayer

    return TritonLayer(codec, device, peer.scratch if isinstance(peer, TritonLayer) else None)

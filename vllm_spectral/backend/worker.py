"""Remote procedures that run inside vLLM's workers, reached by ``collective_rpc``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from vllm_spectral.backend.capture import CaptureImpl
from vllm_spectral.backend.impl import SpectralImpl
from vllm_spectral.stats.fidelity import compare_logits
from vllm_spectral.stats.memory import LayerMemory, WorkerMemory
from vllm_spectral.stats.moments import LayerMoments

EXTENSION = f"{__name__}.WorkerExtension"
"""For vLLM's ``worker_extension_cls``."""
_LOGIT_ROWS = 128


class WorkerExtension:
    """Mixed into vLLM's worker class; every public method is prefixed so that it cannot hide one of vLLM's."""

    model_runner: Any
    _spectral_hidden: dict[str, Tensor]

    def _spectral_layers(self) -> Iterator[tuple[str, Any]]:
        context = self.model_runner.vllm_config.compilation_config.static_forward_context
        return ((name, layer) for name, layer in context.items() if isinstance(layer, Attention))

    def spectral_capture(self, enabled: bool) -> None:
        """CALIBRATE: measure the following steps, or do not."""
        for _, layer in self._spectral_layers():
            layer.impl.capturing = enabled

    def spectral_moments(self) -> list[LayerMoments]:
        """CALIBRATE: this rank's moments, in the order of layers."""
        return [layer.impl.moments for _, layer in self._spectral_layers() if isinstance(layer.impl, CaptureImpl)]

    def spectral_memory(self) -> dict[str, Any]:
        """What this rank keeps resident for the cache, in the form of :meth:`WorkerMemory.to_wire`."""
        layers, shared = [], 0
        for name, layer in self._spectral_layers():
            compressed = isinstance(layer.impl, SpectralImpl) and layer.impl.codec is not None
            pages = layer.kv_cache
            if compressed:
                shared = layer.impl.codec.codebooks.resident_bytes
            layers.append(
                LayerMemory.of_codec(name, layer.impl.codec, layer.impl.num_heads, pages)
                if compressed
                else LayerMemory.of_dense(name, pages)
            )
        return WorkerMemory(tuple(layers), shared).to_wire()

    def spectral_record_hidden(self, name: str, exact: bool) -> None:
        """EVALUATE: keep the final hidden states of the next steps under ``name``, computed exactly or from pages."""
        for _, layer in self._spectral_layers():
            layer.impl.exact = exact
        if not hasattr(self, "_spectral_hidden"):
            self._spectral_hidden = {}
            self.model_runner.get_model().register_forward_hook(self._spectral_keep)
        self._spectral_recording = name
        self._spectral_hidden.pop(name, None)

    def _spectral_keep(self, _module: Any, _args: Any, output: Any) -> None:
        if self._spectral_recording not in self._spectral_hidden:
            self._spectral_hidden[self._spectral_recording] = output.detach().clone()

    def spectral_compare(self, reference: str, candidate: str, token_ids: list[int]) -> dict[str, list[float]]:
        """EVALUATE: per-position metrics of two recordings of the same tokens; see :func:`compare_logits`."""
        model = self.model_runner.get_model()
        merged: dict[str, list[float]] = {}
        targets = torch.tensor(token_ids[1:])
        for low in range(0, len(targets), _LOGIT_ROWS):
            rows = slice(low, min(low + _LOGIT_ROWS, len(targets)))
            part = compare_logits(
                model.compute_logits(self._spectral_hidden[reference][rows]),
                model.compute_logits(self._spectral_hidden[candidate][rows]),
                targets[rows],
            )
            for key, values in part.items():
                merged.setdefault(key, []).extend(values.tolist())
        return merged

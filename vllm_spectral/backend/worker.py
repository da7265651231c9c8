"""Remote procedures that run inside vLLM's workers, reached by ``collective_rpc``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention

from vllm_spectral.backend.capture import CaptureImpl
from vllm_spectral.backend.dense import Attend
from vllm_spectral.backend.impl import SpectralImpl
from vllm_spectral.kernels.library import REFERENCE
from vllm_spectral.stats.fidelity import compare_logits
from vllm_spectral.stats.memory import LayerMemory, WorkerMemory
from vllm_spectral.stats.moments import LayerMoments

EXTENSION = f"{__name__}.WorkerExtension"
"""For vLLM's ``worker_extension_cls``."""
_LOGIT_ROWS = 128


class WorkerExtension:
    """Mixed into vLLM's worker class; every public method is prefixed so that it cannot hide one of vLLM's."""

    model_runner: Any
    _spectral_hidden: Tensor | None
    _spectral_file: str | None

    def _spectral_layers(self) -> Iterator[tuple[str, Any]]:
        context = self.model_runner.vllm_config.compilation_config.static_forward_context
        return ((name, layer) for name, layer in context.items() if isinstance(layer, Attention))

    def spectral_capture(self, enabled: bool) -> None:
        """CALIBRATE: measure the following steps, or do not."""
        for _, layer in self._spectral_layers():
            layer.impl.capturing = enabled

    def spectral_moments(self) -> list[LayerMoments]:
        """CALIBRATE: this rank's moments since they were last asked for, in the order of layers."""
        return [layer.impl.take() for _, layer in self._spectral_layers() if isinstance(layer.impl, CaptureImpl)]

    def spectral_memory(self) -> dict[str, Any]:
        """What this rank keeps resident for the cache, in the form of :meth:`WorkerMemory.to_wire`."""
        layers, shared, exact, kernels = [], 0, 0, ""
        for name, layer in self._spectral_layers():
            compressed = isinstance(layer.impl, SpectralImpl) and layer.impl.codec is not None
            pages = layer.kv_cache
            if compressed:
                shared = layer.impl.codec.codebooks.resident_bytes
                kernels = layer.impl.native.isa if layer.impl.native else REFERENCE
                if layer.impl.copies is not None:
                    exact += layer.impl.copies.resident_bytes
            layers.append(
                LayerMemory.of_codec(name, layer.impl.codec, layer.impl.num_heads, pages, layer.impl.native)
                if compressed
                else LayerMemory.of_dense(name, pages)
            )
        return WorkerMemory(tuple(layers), shared, exact, kernels).to_wire()

    def spectral_exact_counters(self) -> dict[str, int]:
        """Running totals of the exact tier, in the words of :class:`ExactCounters`; empty without a tier."""
        for _, layer in self._spectral_layers():
            if isinstance(layer.impl, SpectralImpl) and layer.impl.copies is not None:
                directory = layer.impl.copies.tier.directory
                return vars(directory.counters) | {"entries": directory.num_entries, "used": directory.used_entries}
        return {}

    def spectral_attend(self, attend: Attend | None) -> None:
        """COMPARE: how to attend from now on; None for stock vLLM."""
        for _, layer in self._spectral_layers():
            layer.impl.attend = attend

    def spectral_record(self, file: str | None) -> None:
        """Keep the final hidden states of the next step, and write them to a file if one is named."""
        if not hasattr(self, "_spectral_hidden"):
            self.model_runner.get_model().register_forward_hook(self._spectral_keep)
        self._spectral_hidden, self._spectral_file = None, file

    def _spectral_keep(self, _module: Any, _args: Any, output: Any) -> None:
        if self._spectral_hidden is None:
            self._spectral_hidden = output.detach().clone()
            if self._spectral_file:
                torch.save(self._spectral_hidden, self._spectral_file)

    def spectral_compare(self, reference: str, token_ids: list[int], spans: list[tuple[int, int]]) -> dict[str, Any]:
        """Compare the recorded step with one in a file.

        Args:
            reference: file of the reference's hidden states for the same tokens.
            token_ids: the request.
            spans: ``(start, stop)`` positions of the tokens whose prediction is compared; from 1 on.

        Returns:
            Lists over all those positions, in order; see :func:`compare_logits`.
        """
        model, candidate = self.model_runner.get_model(), self._spectral_hidden
        assert candidate is not None
        exact = torch.load(reference, weights_only=True)
        position = torch.cat([torch.arange(start, stop) for start, stop in spans])
        merged: dict[str, list[float]] = {}
        targets = torch.tensor(token_ids)
        for low in range(0, len(position), _LOGIT_ROWS):
            rows = position[low : low + _LOGIT_ROWS]
            part = compare_logits(
                model.compute_logits(exact[rows - 1]), model.compute_logits(candidate[rows - 1]), targets[rows]
            )
            for key, values in part.items():
                merged.setdefault(key, []).extend(values.tolist())
        return merged

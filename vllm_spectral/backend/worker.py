"""Remote procedures that run inside vLLM's workers, reached by ``collective_rpc``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention

from vllm_spectral.backend.capture import CaptureImpl
from vllm_spectral.backend.dense import Attend
from vllm_spectral.backend.impl import SpectralImpl
from vllm_spectral.backend.observer import Observer, moments_of
from vllm_spectral.kernels.library import REFERENCE
from vllm_spectral.stats.fidelity import compare_logits
from vllm_spectral.stats.memory import LayerMemory, WorkerMemory
from vllm_spectral.stats.moments import LayerMoments
from vllm_spectral.stats.resident import process_bytes, tensor_bytes

EXTENSION = f"{__name__}.WorkerExtension"
"""For vLLM's ``worker_extension_cls``."""
_LOGIT_ROWS = 128
_RESIDENT_SECONDS = 60.0


class WorkerExtension:
    """Mixed into vLLM's worker class; every public method is prefixed so that it cannot hide one of vLLM's."""

    model_runner: Any
    _spectral_hidden: Tensor | None
    _spectral_file: str | None
    _spectral_resident: int
    _spectral_resident_until: float

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

    def spectral_keep(self) -> None:
        """CALIBRATE: keep the keys and values of the next request, a prompt of one step."""
        for _, layer in self._spectral_layers():
            layer.impl.keeping = True

    def spectral_kept(self) -> list[tuple[Tensor, Tensor]]:
        """CALIBRATE: exactly those, in the order of layers."""
        return [layer.impl.take_kept() for _, layer in self._spectral_layers() if isinstance(layer.impl, CaptureImpl)]

    def _spectral_compressed(self) -> list[SpectralImpl]:
        impls = (layer.impl for _, layer in self._spectral_layers())
        return [impl for impl in impls if isinstance(impl, SpectralImpl) and impl.codec is not None]

    def spectral_memory(self) -> dict[str, Any]:
        """What this rank keeps resident for the cache, in the form of :meth:`WorkerMemory.to_wire`."""
        layers, exact_used = [], 0
        for name, layer in self._spectral_layers():
            impl, pages = layer.impl, layer.kv_cache
            if not isinstance(impl, SpectralImpl) or impl.codec is None:
                layers.append(LayerMemory.of_dense(name, pages))
                continue
            exact = impl.copies.resident_bytes if impl.copies else 0
            if impl.copies:
                exact_used += impl.copies.used_bytes
            watched = impl.seen.resident_bytes if impl.seen else 0
            layers.append(LayerMemory.of_codec(name, impl.codec, impl.num_heads, pages, impl.kernels, exact, watched))
        first = next(iter(self._spectral_compressed()), None)
        on_cpu = all(layer.kv_cache.device.type == "cpu" for _, layer in self._spectral_layers())
        config = self.model_runner.kv_cache_config
        return WorkerMemory(
            layers=tuple(layers),
            num_blocks=config.num_blocks,
            # One allocation: every entry has the size of all of it, and pages of several sizes are several entries.
            allocated_bytes=max((tensor.size for tensor in config.kv_cache_tensors), default=0),
            # On a GPU every layer's kernels have tables of their own, which are counted there.
            shared_bytes=first.codec.codebooks.resident_bytes if first and first.codec and on_cpu else 0,
            exact_used_bytes=exact_used,
            resident_page_bytes=self._spectral_resident_pages(),
            process_bytes=process_bytes(),
            kernels=(first.kernels.name if first.kernels else REFERENCE) if first else "",
            rank=get_tensor_model_parallel_rank(),
        ).to_wire()

    def _spectral_resident_pages(self) -> int:
        """Asked of the kernel once a minute: it goes through all pages."""
        now = time.monotonic()
        if now >= getattr(self, "_spectral_resident_until", 0.0):
            self._spectral_resident = sum(tensor_bytes(layer.kv_cache) or 0 for _, layer in self._spectral_layers())
            self._spectral_resident_until = now + _RESIDENT_SECONDS
        return self._spectral_resident

    def spectral_state(self) -> dict[str, Any]:
        """All that a monitor wants to know, in one call: for every call the engine waits until its workers are at rest."""
        return {
            "memory": self.spectral_memory(),
            "fidelity": self.spectral_fidelity(),
            "exact": self.spectral_exact_counters(),
        }

    def _spectral_observer(self) -> Observer | None:
        for impl in self._spectral_compressed():
            assert impl.seen is not None
            return impl.seen.observer
        return None

    def spectral_fidelity(self) -> dict[str, Any] | None:
        """What sampling found, with the probes since this was last asked; None for the stock cache."""
        observer = self._spectral_observer()
        return observer.report() if observer else None

    def spectral_live_moments(self) -> bytes | None:
        """Moments of live traffic, a safetensors file by ``layer.name``; None for the stock cache."""
        observer = self._spectral_observer()
        return save(moments_of(observer.layers)) if observer else None

    def spectral_expect_canary(self, num_tokens: int) -> None:
        """Probe all layers in the step that prefills the canary."""
        if observer := self._spectral_observer():
            observer.expect(num_tokens)

    def spectral_answer_exactly(self, enabled: bool) -> int:
        """Answer whole prompts as an exact cache would, or stop; how many (request, layer) pairs were, since the start."""
        observer = self._spectral_observer()
        if observer is None:
            return 0
        observer.exact = enabled
        return observer.exact_requests

    def spectral_exact_counters(self) -> dict[str, int]:
        """Running totals of the exact tier, in the words of :class:`ExactCounters`; empty without a tier."""
        for impl in self._spectral_compressed():
            if impl.copies is not None:
                directory = impl.copies.tier.directory
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

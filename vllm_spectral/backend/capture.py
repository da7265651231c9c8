"""Calibration mode of the backend: the model runs exactly, second moments are accumulated on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_spectral.backend.layers import layer_of, positions_of, require_supported
from vllm_spectral.stats.moments import LayerMoments


class CaptureImpl(CPUAttentionBackendImpl):
    """Stock attention that also measures.

    Attributes:
        moments: what was accumulated so far, for this rank's KV heads.
        capturing: whether the steps that run now are measured.
        keeping: whether the keys and values of the step that runs now are kept as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()
        self.moments = LayerMoments(self.num_kv_heads, self.head_size)
        self.capturing = self.keeping = False
        self._kept: tuple[Tensor, Tensor] | None = None

    def take(self) -> LayerMoments:
        """The moments so far; counting starts anew."""
        taken, self.moments = self.moments, LayerMoments(self.num_kv_heads, self.head_size)
        return taken

    def take_kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the last step that was kept, ``[num_tokens, num_kv_heads, head_dim]`` each; no more are kept."""
        assert self._kept is not None
        kept, self._kept, self.keeping = self._kept, None, False
        return kept

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Refuse, before any token is measured, layers that could not be served later."""
        super().process_weights_after_loading(act_dtype)
        require_supported(self, layer_of(self, self._vllm_config)[0])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Measure the step's tokens, then attend as stock does."""
        if self.capturing and attn_metadata is not None:
            count = attn_metadata.num_actual_tokens
            self.moments.add(query[:count], key[:count], value[:count], positions_of(attn_metadata))
        if self.keeping and attn_metadata is not None:
            count = attn_metadata.num_actual_tokens
            self._kept = key[:count].clone(), value[:count].clone()
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        return output

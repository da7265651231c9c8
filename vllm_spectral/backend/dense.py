"""Attention without compressed pages, for comparison: stock, exact, or as a rival's cache would answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_spectral.backend.layers import requests_of
from vllm_spectral.codec.attention import exact_attention
from vllm_spectral.rivals import Rival
from vllm_spectral.rivals.attention import windowed_attention


@dataclass(frozen=True)
class Attend:
    """How a :class:`DenseImpl` attends.

    Attributes:
        rival: read all tokens as this cache restores them, but for the exact ones; None: all exactly.
        first, recent: tokens read exactly all the same; see :func:`windowed_attention`.
    """

    rival: Rival | None = None
    first: int = 0
    recent: int = 0


class DenseImpl(CPUAttentionBackendImpl):
    """Stock attention, until :attr:`attend` says otherwise.

    Attributes:
        attend: None for stock vLLM. Otherwise every request must be one step long: its keys and values are taken
            from the step, not from pages.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attend: Attend | None = None

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
        """As vLLM's."""
        if self.attend is None or attn_metadata is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
            return output
        for _, rows, context_len in requests_of(attn_metadata):
            if context_len != rows.stop - rows.start:
                raise RuntimeError("comparison needs the whole context in one step")
            result = self._attend(self.attend, query[rows], key[rows], value[rows])
            output[rows] = result.view_as(output[rows])
        return output

    def _attend(self, how: Attend, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if how.rival is None:
            return exact_attention(query, keys, values, self.scale)
        restored = how.rival.restore(keys.float(), values.float())
        return windowed_attention(query, keys, values, restored, how.first, how.recent, self.scale)

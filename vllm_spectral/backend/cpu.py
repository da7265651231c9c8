"""The implementation on the CPU: exempt layers run on vLLM's CPU attention."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_spectral.backend.impl import SpectralImpl
from vllm_spectral.backend.selection import SpectralCPUBackend


class SpectralCPUImpl(SpectralImpl, CPUAttentionBackendImpl):
    """See :class:`SpectralImpl`."""

    own = SpectralCPUBackend
    dense = CPUAttentionBackend

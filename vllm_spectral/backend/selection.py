"""The backend class that vLLM sees on the CPU, and the choice of an implementation, made once per layer."""

from __future__ import annotations

from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from vllm_spectral.config import Mode, parse_config


class SpectralCPUBackend(CPUAttentionBackend):
    """Stock CPU attention until our configuration asks for more.

    vLLM caches the class per process, and one process may hold several engines. So this class is always the same,
    and the configuration decides in :meth:`get_impl_cls`, which vLLM calls for every layer of every engine.
    """

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The implementation that the current configuration asks for."""
        config = parse_config(get_current_vllm_config().additional_config)
        if config is None:
            stock: type[CPUAttentionBackendImpl] = CPUAttentionBackendImpl
            return stock
        if config.mode is Mode.CALIBRATE:
            from vllm_spectral.backend.capture import CaptureImpl

            return CaptureImpl
        if config.mode is Mode.COMPARE:
            from vllm_spectral.backend.dense import DenseImpl

            return DenseImpl
        from vllm_spectral.backend.cpu import SpectralCPUImpl

        return SpectralCPUImpl

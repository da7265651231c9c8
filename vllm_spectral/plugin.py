"""Entry point of ``vllm.general_plugins``: vLLM calls :func:`register` in every one of its processes."""

from __future__ import annotations

import logging

from vllm_spectral.errors import UnsupportedVersionError
from vllm_spectral.versions import require_tested_vllm

CPU_BACKEND = "vllm_spectral.backend.selection.SpectralCPUBackend"
CUDA_BACKEND = "vllm_spectral.backend.cuda.SpectralCUDABackend"


def register() -> None:
    """Put our backend in the place of CPU attention; on CUDA make it vLLM's CUSTOM. Idempotent, cheap, loads nothing.

    The backend stays stock unless ``additional_config`` names us (see :mod:`vllm_spectral.config`): the choice is
    made per layer, when vLLM's configuration is known. Outside the tested range of vLLM, and on other platforms,
    nothing is registered: whoever merely has this package installed keeps a working vLLM, and is told.
    """
    try:
        require_tested_vllm()
    except UnsupportedVersionError as error:
        logging.getLogger("vllm.spectral").warning("vllm-spectral is inactive: %s", error)
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # Where no layer is asked to use our backend, there is no place that would meet our configuration and could refuse it: so
    # it is said at once.
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
        logging.getLogger("vllm.spectral").warning(
            "vllm-spectral was not yet run on a GPU. Its backend is used with --attention-backend CUSTOM only: without it, a "
            '"spectral" entry in additional_config has NO effect here, the cache is vLLM\'s own'
        )
    else:
        logging.getLogger("vllm.spectral").warning(
            'vllm-spectral is inactive: its backends are for the CPU and for CUDA, and this vLLM runs on %s; a "spectral" '
            "entry in additional_config has NO effect here, the cache is vLLM's own",
            current_platform.device_type,
        )

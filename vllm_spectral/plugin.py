"""Entry point of ``vllm.general_plugins``: vLLM calls :func:`register` in every one of its processes."""

from __future__ import annotations

import logging

from vllm_spectral.errors import UnsupportedVersionError
from vllm_spectral.versions import require_tested_vllm

_BACKEND = "vllm_spectral.backend.selection.SpectralCPUBackend"


def register() -> None:
    """Put our backend in the place of CPU attention. Idempotent, imports little, loads nothing.

    The backend stays stock unless ``additional_config`` names us (see :mod:`vllm_spectral.config`): the choice is
    made per layer, when vLLM's configuration is known. Outside the tested range of vLLM, and on other platforms than the
    CPU, nothing is registered: whoever merely has this package installed keeps a working vLLM, and is told.
    """
    try:
        require_tested_vllm()
    except UnsupportedVersionError as error:
        logging.getLogger("vllm.spectral").warning("vllm-spectral is inactive: %s", error)
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        # There is no place where this platform would meet our configuration and could refuse it: so it is said at once.
        logging.getLogger("vllm.spectral").warning(
            'vllm-spectral is inactive: its backend is for the CPU, and this vLLM runs on %s; a "spectral" entry in '
            "additional_config has NO effect here, the cache is vLLM's own",
            current_platform.device_type,
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND)

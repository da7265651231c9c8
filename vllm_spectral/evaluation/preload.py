"""Imported once, by the process that engines are forked from: what they all need, which takes ten seconds to import.

No thread runs and no engine exists yet when it is done, so that forking is safe.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What libraries write while they are imported would land in the middle of a progress bar."""
    error = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(error, 2)
        os.close(error)


with _silence():
    import vllm_spectral.backend.engine
    import vllm_spectral.backend.worker  # noqa: F401

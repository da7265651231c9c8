"""The server that the tests in this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.conftest import Server, serving


@pytest.fixture(scope="session")
def server(calibrated: Path, work: Path) -> Iterator[Server]:
    """The server that most tests ask. It samples and sings often, so that a test need not wait."""
    with serving(calibrated, work / "server.log", "--canary-seconds", "10", "--fidelity-every", "2") as running:
        yield running

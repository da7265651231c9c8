"""A wall clock that jumps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.conftest import ANSWER_TOKENS, Account, Serving
from tests.faults.traffic import Load, company, status

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
JUMPS = {"a day ahead": "+1d", "a day back": "-1d", "a year ahead": "+365d"}


@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed (Debian: faketime)")
def test_jumps(serve: Serving, account: Account, texts: list[str], tmp_path: Path) -> None:
    """Under load the clock goes a day ahead, back and a year ahead: same answers, still ready, no alarm."""
    offset = tmp_path / "offset"
    offset.write_text("+0d")
    faked = {
        "LD_PRELOAD": str(LIBRARIES[0]), "FAKETIME_TIMESTAMP_FILE": str(offset), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    runs = []
    with serve("--canary-seconds", "5", "--fidelity-every", "20", environment=faked) as server, company(server.url):
        for jump in JUMPS.values():
            load = Load(server.url, texts, ANSWER_TOKENS, 8)
            time.sleep(0.5)
            offset.write_text(jump)
            runs.append(load.outcomes())
            assert all(outcome.status == 200 for outcome in runs[-1]), runs[-1]
            assert status(f"{server.url}/ready") == 200
            time.sleep(6)
            assert status(f"{server.url}/ready") == 200, "after a canary on the new time"
    account.add("the clock jumps: " + ", ".join(JUMPS), "every request answered, always ready", runs)

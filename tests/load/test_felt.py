"""What the load test makes of its clients' records."""

from __future__ import annotations

from typing import Any

import pytest

from tests.load.compare import felt

BEGIN, END = 1060.0, 1120.0


def record(start: float, progress: list[tuple[float, int]], seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "scenario": "Chat", "start": start, "status": 200, "progress": progress, "cut": False, "seconds": seconds,
    } | more  # fmt: skip


def test_tokens_waits_and_paces_are_those_of_the_window() -> None:
    found = felt(
        [
            # 10 tokens before the window, 30 in it, half a second each; the first token came before.
            record(1040.0, [(15.0 + 0.5 * n, n) for n in range(1, 41)], 35.0),
            # Waits four seconds, two tokens, and goes on after the window.
            record(1100.0, [(4.0, 1), (6.0, 2), (21.0, 3)], 22.0),
            # Cut off by the end before anything came, after ten seconds and a little.
            record(1110.0, [], 10.2, status=0, cut=True),
            # Its first token comes after the window.
            record(1105.0, [(20.0, 1)], 21.0),
            # Over before the window.
            record(1000.0, [(1.0, 1), (2.0, 2)], 2.0),
            # A user who hangs up has a wait and tokens, but no pace.
            record(1070.0, [(1.0, 1), (50.0, 2)], 50.0, scenario="HangUp"),
        ],
        BEGIN,
        END,
    )
    assert found["output_tokens_per_second"] == pytest.approx((30 + 2 + 2) / 60)
    assert found["requests"] == 2
    assert found["failures"] == 0
    assert found["ttft_p50_seconds"] == pytest.approx((4.0 + 10.0) / 2)
    assert found["ttft_p99_seconds"] == pytest.approx(15.0, rel=0.02)
    assert found["tpot_p50_seconds"] == pytest.approx((0.5 + 2.0) / 2)


def test_an_answer_that_broke_is_a_failure() -> None:
    found = felt([record(1070.0, [(1.0, 1)], 2.0, status=0), record(1070.0, [(1.0, 1)], 2.0, status=503)], BEGIN, END)
    assert found["failures"] == 2
    assert found["output_tokens_per_second"] == 0

"""What many ranks say, as one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from vllm_spectral_server.monitor import LayerState, join_probes

FIGURES = {"output_error": 0.1, "attention_kl": 0.02, "fallback_share": 0.0, "clipped_share": 0.0}


def report(ratio: float, drift: float, kernel_error: float = 0.002, samples: int = 5) -> dict[str, Any]:
    means = FIGURES | {"error_ratio": ratio, "kernel_error": kernel_error}
    return {
        "layer": 3, "samples": samples, "time": 1.0 if samples else None, "means": means if samples else {},
        "key_drift": drift, "value_drift": drift / 2, "moment_tokens": 4096,
    }  # fmt: skip


def probe(layer: int, ratio: float, canary: bool = True, kernel_error: float = 0.002) -> dict[str, Any]:
    rest = {"error_ratio": ratio, "drift": 0.03 * ratio, "kernel_error": kernel_error}
    return FIGURES | {"time": float(layer), "layer": layer, "canary": canary} | rest


def test_heads_on_several_ranks_are_judged_like_heads_on_one() -> None:
    """The limits were chosen for means over a layer's heads; one head alone scatters past them."""
    heads = [(1.0, 0.02), (1.1, 0.03), (1.8, 0.09)]
    state = LayerState.joined([[report(*head) for head in heads]])
    assert state.error_ratio == pytest.approx(1.3)
    assert state.drift == pytest.approx(0.14 / 3)
    (joined,) = join_probes([[probe(0, ratio)] for ratio, _ in heads])
    assert joined["error_ratio"] == pytest.approx(1.3)
    assert joined["drift"] == pytest.approx(0.03 * 1.3)


def test_the_worst_engine_and_the_worst_kernel_count() -> None:
    sound, damaged = report(1.0, 0.02), report(3.0, 0.3)
    state = LayerState.joined([[sound, sound], [damaged, damaged]])
    assert (state.error_ratio, state.key_drift, state.samples) == (3.0, 0.3, 10)
    assert LayerState.joined([[sound, report(1.0, 0.02, kernel_error=0.5)]]).kernel_error == 0.5
    (joined,) = join_probes([[probe(0, 1.0)], [probe(0, 1.0, kernel_error=0.5)]])
    assert joined["kernel_error"] == 0.5


def test_what_is_no_number_on_one_rank_is_none_in_sum() -> None:
    assert math.isnan(LayerState.joined([[report(1.0, 0.02), report(math.nan, 0.02)]]).error_ratio or 0)
    (joined,) = join_probes([[probe(0, 1.0)], [probe(0, math.nan)]])
    assert math.isnan(joined["error_ratio"])


def test_an_engine_without_traffic_says_nothing() -> None:
    state = LayerState.joined([[report(1.2, 0.02)], [report(0.0, 0.0, samples=0)]])
    assert (state.error_ratio, state.figures["output_error"]) == (1.2, 0.1)
    assert LayerState.joined([[report(0.0, 0.0, samples=0)]]).error_ratio is None


def test_ranks_that_saw_different_steps_are_not_mixed() -> None:
    assert [p["error_ratio"] for p in join_probes([[probe(0, 1.0), probe(1, 1.0)], [probe(1, 3.0)]])] == [1.0, 1.0, 3.0]

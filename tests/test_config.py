"""The configuration inside vLLM: parsed once, unknown keys refused, a kill switch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from vllm_spectral.config import Mode, SpectralConfig, parse_config
from vllm_spectral.errors import ConfigError


@pytest.mark.parametrize("additional", [None, {}, {"other": {"profile": "x"}}])
def test_nothing_for_us(additional: dict[str, Any] | None) -> None:
    assert parse_config(additional, {}) is None


def test_the_kill_switch() -> None:
    given = {"spectral": {"profile": "p"}}
    assert parse_config(given, {"VLLM_SPECTRAL_DISABLE": "1"}) is None
    assert parse_config(given, {"VLLM_SPECTRAL_DISABLE": "0"}) is not None


def test_round_trip() -> None:
    config = SpectralConfig(Path("/p"), "abc", frozenset({1, 3}), 2, 48, 1 << 20)
    assert parse_config(config.to_additional_config(), {}) == config
    config = SpectralConfig(Path("/p"), exact_bytes=0)
    assert parse_config(config.to_additional_config(), {}) == config
    assert parse_config(SpectralConfig(mode=Mode.CALIBRATE).to_additional_config(), {}) is not None


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpectralConfig().mode = Mode.SERVE  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"profile": "p", "bitz": 3}, "unknown keys: bitz"),
        ({}, "needs a profile"),
        ({"profile": "p", "mode": "fast"}, "mode"),
        ({"profile": 3}, "strings"),
        ({"profile": "p", "exempt_layers": "0"}, "exempt_layers"),
        ({"profile": "p", "exempt_layers": [-1]}, "exempt_layers"),
        ({"profile": "p", "exact_bytes": -1}, "exact_bytes"),
        ({"profile": "p", "exact_bytes": "1G"}, "exact_bytes"),
        ({"profile": "p", "exact_first_tokens": True}, "exact_first_tokens"),
        ({"profile": "p", "exact_recent_tokens": None}, "exact_recent_tokens"),
        ("p", "object"),
    ],
)
def test_refusals(section: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config({"spectral": section}, {})

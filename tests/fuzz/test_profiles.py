"""The fuzzer of profiles, briefly; ``make fuzz`` runs it at length."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.profiles import watch


def test_hostile_profiles_are_refused_or_sound(tmp_path: Path) -> None:
    result = watch(300, 20261124, tmp_path)
    assert not result.escape, f"{result.escape}\nsteps: {result.steps}"
    assert result.done >= 300
    # It reaches what stands behind the digest, and what loads.
    assert result.outcomes["another sound profile"] > 10
    assert result.outcomes["the original"] > 3
    assert result.outcomes["ProfileFormatError"] > 100
    assert result.grown < 256 << 20

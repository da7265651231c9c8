"""Strict quality at the default 4 bits, every token compressed, on text that calibration never saw."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.engine.conftest import cli
from vllm_spectral.profile.storage import load_profile


def test_answers_stay_close_to_the_exact_cache(calibrated: Path, texts: dict[str, Path]) -> None:
    result = subprocess.run(
        cli("evaluate", "demo", "--profile", str(calibrated), "--windows", "6", "--json",
            "--text", *map(str, texts.values())),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert report["profile"]["bits_per_element"] <= 4.0
    assert len(report["texts"]) == len(texts)
    for text in report["texts"]:
        assert text["delta_percent"] <= 3.0, text
        assert text["kl"] <= 0.035, text
        assert text["top1"] >= 0.90, text
        # Exact against exact would show nothing: make sure that something was compressed.
        assert text["kl"] > 1e-4, text


def test_provenance_says_what_was_measured(calibrated: Path) -> None:
    provenance = load_profile(calibrated).provenance
    assert provenance.text_source == "built-in prompts"
    assert provenance.num_tokens > 10_000


@pytest.mark.parametrize("name", ["prose"])
def test_the_users_own_text(name: str, texts: dict[str, Path], tmp_path: Path) -> None:
    """``--text`` measures the file, and the same seed gives the same profile."""
    short = tmp_path / "short.txt"
    short.write_text(texts[name].read_text()[:30_000])
    digests = set()
    for index in range(2):
        path = tmp_path / "own.spectral"
        command = cli("calibrate", "demo", "-o", str(path), "--text", str(short), "--bits", "3", "--seed", "5")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (index, result.stderr[-4000:])
        profile = load_profile(path)
        assert profile.provenance.text_source == "short.txt"
        assert profile.bits_per_element == 3.0
        digests.add(profile.digest)
    assert len(digests) == 1

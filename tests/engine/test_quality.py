"""Quality at the default 4 bits on text that calibration never saw: as served, and with every token compressed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from deploy.process import command as cli
from vllm_spectral.evaluation.candidates import fp8_runs_here
from vllm_spectral.profile.storage import load_profile


def test_answers_stay_close_to_the_exact_cache(calibrated: Path, texts: dict[str, Path]) -> None:
    command = cli("evaluate", "demo", "--profile", str(calibrated), "--text", *map(str, texts.values()), "--json")
    against = ["bf16", "turboquant_k4v4", *(["fp8"] if fp8_runs_here() else [])]
    command += ["--windows", "4", "--strict", "--against", *against]
    command += ["--greedy", "2", "--haystacks", "1", "--retrieval-contexts", "512"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert report["profile"]["bits_per_element"] <= 4.0
    assert len(report["texts"]) == len(texts)
    served, strict, bf16, turboquant, *fp8 = report["candidates"]
    assert served["texts"] == report["texts"]
    for index in range(len(texts)):
        ours, alone, floor, rival = (c["texts"][index] for c in (served, strict, bf16, turboquant))
        assert alone["delta_percent"] <= 3.0, alone
        assert alone["kl"] <= 0.035, alone
        assert alone["top1"] >= 0.90, alone
        # Exact against exact would show nothing: more must differ than by the kernels' rounding.
        assert floor["kl"] < ours["kl"] < alone["kl"], (floor, ours)
        assert ours["kl"] < rival["kl"], (ours, rival)
        for theirs in (c["texts"][index] for c in fp8):
            assert ours["kl"] < theirs["kl"], (ours, theirs)
            assert ours["top1"] >= theirs["top1"], (ours, theirs)
    for candidate in report["candidates"]:
        assert {g["prompts"] for g in candidate["greedy"]} == {2}
        assert candidate["retrieval"][0]["needles"] == 5
    # With AMX the model's own products differ between a prompt's many rows and generation's one.
    if not torch.cpu._is_amx_tile_supported():
        assert all(g["unchanged"] == 1.0 for g in bf16["greedy"]), "teacher forcing must agree with generation"


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
        assert "this text is narrow" in result.stderr
        profile = load_profile(path)
        assert profile.provenance.text_source == "short.txt"
        assert profile.bits_per_element == 3.0
        digests.add(profile.digest)
    assert len(digests) == 1

"""Figures from metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vllm_spectral.evaluation.candidates import Candidate
from vllm_spectral.evaluation.cases import Case
from vllm_spectral.evaluation.report import markdown, plot, to_json
from vllm_spectral.evaluation.results import figure, summarize_greedy, summarize_retrieval, summarize_text
from vllm_spectral.evaluation.run import CandidateResult


def metrics(kl: list[float], rise: float = 0.0, hit: list[float] | None = None) -> dict[str, list[float]]:
    ones = [1.0] * len(kl)
    return {
        "nll_reference": [2.0] * len(kl), "nll_candidate": [2.0 + rise] * len(kl), "kl": kl, "top1": ones,
        "hit_reference": ones, "hit": hit or ones,
    }  # fmt: skip


def test_a_figure_has_its_standard_error_and_an_interval_around_the_mean() -> None:
    found = figure([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.error == pytest.approx((5 / 3) ** 0.5 / 2)
    assert found.low is not None
    assert found.high is not None
    assert 1.0 <= found.low < 2.5 < found.high <= 4.0
    assert figure([3.0]).error is None


def test_text_by_window_and_by_position() -> None:
    case = Case("text", "a", list(range(130)), ((1, 130),))
    kl = [0.1] * 63 + [0.2] * 64 + [0.4] * 2
    result = summarize_text("a", [(case, metrics(kl, 0.01)), (case, metrics(kl, 0.03))])
    assert (result.windows, result.tokens) == (2, 258)
    assert result.delta_percent == pytest.approx(100 * math.expm1(0.02))
    assert result.delta.mean == pytest.approx(result.delta_percent)
    assert [(row["from"], row["to"], row["tokens"]) for row in result.kl_by_position] == [
        (0, 64, 126),
        (64, 128, 128),
        (128, 256, 4),
    ]
    assert [row["kl"] for row in result.kl_by_position] == pytest.approx([0.1, 0.2, 0.4])


def test_greedy_length_ends_at_the_first_difference() -> None:
    case = Case("greedy", "a", list(range(10)), ((6, 10),))
    cases = [(case, metrics([0.0] * 4, hit=[1, 1, 0, 1])), (case, metrics([0.0] * 4))]
    result = summarize_greedy("a", cases)
    assert result.same_tokens.mean == 3.0
    assert result.unchanged == 0.5


def test_a_needle_needs_its_whole_answer() -> None:
    case = Case("retrieval", "512", list(range(20)), ((5, 8), (10, 12), (15, 17)), (0.9, 0.1, 0.5))
    measured = metrics([0.0] * 7, hit=[1, 1, 0, 1, 1, 1, 1])
    measured["hit_reference"] = [1, 1, 1, 1, 1, 0, 1]
    result = summarize_retrieval(512, [(case, measured)])
    assert (result.needles, result.found_exact, result.found) == (3, 2, 2)
    assert result.kept == 0.5
    assert [(row["needles"], row["found"]) for row in result.by_depth] == [(1, 1), (0, 0), (1, 1), (0, 0), (1, 0)]


def test_a_number_is_as_likely_as_all_its_digits() -> None:
    case = Case("retrieval", "512", list(range(20)), ((5, 7), (10, 12)), (0.9, 0.1))
    measured = metrics([0.0] * 4) | {
        "nll_reference": [math.log(2), math.log(2), 0.0, 0.0],
        "nll_candidate": [math.log(2), math.log(4), 0.0, math.log(2)],
    }
    result = summarize_retrieval(512, [(case, measured)])
    assert [needle["probability_exact"] for needle in result.each] == pytest.approx([1 / 4, 1])
    assert [needle["probability"] for needle in result.each] == pytest.approx([1 / 8, 1 / 2])
    assert (result.probability_exact, result.probability) == pytest.approx((5 / 8, 5 / 16))
    assert [needle["depth"] for needle in result.each] == [0.9, 0.1]


def test_reports_name_every_cache(tmp_path: Path) -> None:
    case = Case("text", "a.txt", list(range(130)), ((1, 130),))
    text = summarize_text("a.txt", [(case, metrics([0.1] * 129)), (case, metrics([0.2] * 129))])
    names = ("bf16", "turboquant_k4v4", "turboquant_k3v3", "turboquant_k3v3/strict")
    results = [CandidateResult(Candidate(name, "dense", 4.0 + i), (text,), (), ()) for i, name in enumerate(names)]
    table = markdown(results)
    assert all(f"| {name} |" in table for name in names)
    assert "0.1500 ± 0.0500" in table
    assert [entry["name"] for entry in to_json(results)] == list(names)
    written = plot(results, tmp_path / "plots")
    assert {file.name for file in written} == {"rate-distortion.png", "kl-by-position.png"}
    assert all(file.stat().st_size > 5000 for file in written)

"""What is asked: windows of text, and numbers hidden in haystacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_spectral.errors import ConfigError
from vllm_spectral.evaluation.candidates import named
from vllm_spectral.evaluation.cases import greedy_case, greedy_prompts, labels, retrieval_cases, text_cases
from vllm_spectral.evaluation.run import Plan
from vllm_spectral.models.description import ModelDescription

WORDS = [ord(c) for c in "lorem ipsum dolor sit amet " * 200]


def tokenize(text: str) -> list[int]:
    return [ord(c) for c in text]


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_windows_are_spread_over_the_text_and_do_not_overlap() -> None:
    cases = text_cases("a", list(range(1000)), 100, 4)
    assert [case.ids[0] for case in cases] == [0, 200, 500, 700]
    assert all(case.spans == ((1, 100),) for case in cases)
    assert len(text_cases("a", list(range(50)), 100, 4)[0].ids) == 50
    with pytest.raises(ConfigError, match="only 5 tokens"):
        text_cases("a", list(range(5)), 100, 4)


def test_texts_that_share_a_name_are_told_apart() -> None:
    assert labels([Path("a/x.txt"), Path("b/x.txt"), Path("y.txt")]) == ["a/x.txt", "b/x.txt", "y.txt"]


def test_a_greedy_case_compares_the_continuation_alone() -> None:
    ((name, prompt),) = greedy_prompts("a", list(range(300)), 256, 1)
    case = greedy_case(name, prompt, [7, 8, 9])
    assert case.spans == ((256, 259),)
    assert case.ids[256:] == [7, 8, 9]


@pytest.mark.parametrize("context", [700, 2000])
def test_a_haystack_has_its_length_its_needles_and_its_questions(context: int) -> None:
    cases = retrieval_cases(WORDS, tokenize, [context], needles=3, count=4, seed=1)
    assert len(cases) == 4
    for case in cases:
        assert len(case.ids) == context
        whole = text_of(case.ids)
        for (start, stop), depth in zip(case.spans, case.depths, strict=True):
            number = text_of(case.ids[start:stop]).strip()
            assert number.isdigit()
            assert whole.count(number) == 2, "once hidden, once as the answer"
            asked = text_of(case.ids[:start]).rsplit("\n", 1)[1]
            hidden = whole.index(f"{asked} {number}. Remember")
            assert hidden < start
            assert abs(hidden / context - depth) < 0.35
    assert cases[0].depths != cases[1].depths
    assert cases == retrieval_cases(WORDS, tokenize, [context], needles=3, count=4, seed=1)


def test_a_haystack_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="no room"):
        retrieval_cases(WORDS, tokenize, [100], needles=5, count=1)


def test_fp8_is_refused_where_vllm_has_no_kernel_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_spectral.evaluation.candidates.fp8_runs_here", lambda: False)
    assert "fp8" not in [c.name for c in named(["all"], 64, first=4, recent=64)]
    with pytest.raises(ConfigError, match="needs AVX-512 or AMX"):
        named(["fp8"], 64, first=4, recent=64)


def test_all_means_all_with_and_without_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_spectral.evaluation.candidates.fp8_runs_here", lambda: True)
    names = [c.name for c in named(["all"], 64, first=4, recent=64)]
    assert names[:2] == ["bf16", "fp8"]
    assert "turboquant_k4v4" in names
    assert "turboquant_k4v4/strict" in names
    by_name = {c.name: c for c in named(["turboquant_k3v3", "turboquant_k3v3/strict"], 64, first=4, recent=64)}
    assert (by_name["turboquant_k3v3"].first, by_name["turboquant_k3v3"].recent) == (4, 64)
    assert (by_name["turboquant_k3v3/strict"].first, by_name["turboquant_k3v3/strict"].recent) == (0, 0)
    with pytest.raises(ConfigError, match="unknown cache 'fp9': known are all, bf16"):
        named(["fp9"], 64, first=4, recent=64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": 8}, "--context"), ({"context": 9000}, "--context"), ({"windows": 0}, "--windows"),
        ({"greedy": -1}, "--greedy"), ({"greedy": 1, "greedy_tokens": 8000}, "--greedy-tokens"),
        ({"haystacks": 1, "retrieval_contexts": (9000,)}, "--retrieval-contexts"), ({"needles": 0}, "--needles"),
    ],
)  # fmt: skip
def test_bad_plans_are_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    shape = {"model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 2, "hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 8192}))
    model = ModelDescription.from_directory(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        Plan((), **change).check(model)

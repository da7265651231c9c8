"""Evaluation through the real engine: every cache on the same sequences in one run.

Decode conditions hold by construction: a token of a prompt reads what it would read if it were generated, the tokens that
its window holds exactly and all others from compressed pages.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from vllm_spectral.calibration.run import read_texts
from vllm_spectral.errors import ConfigError
from vllm_spectral.evaluation.candidates import Candidate
from vllm_spectral.evaluation.cases import (
    MIN_CONTEXT,
    Case,
    greedy_case,
    greedy_prompts,
    labels,
    retrieval_cases,
    text_cases,
)
from vllm_spectral.evaluation.results import (
    GreedyResult,
    Metrics,
    RetrievalResult,
    TextResult,
    summarize_greedy,
    summarize_retrieval,
    summarize_text,
)
from vllm_spectral.evaluation.worker import EngineRequest, RemoteEngine, engine
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.progress import token_bar

GREEDY_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class Plan:
    """What to ask.

    Attributes:
        texts: UTF-8 files.
        context: tokens per window of text.
        windows: most windows per text.
        greedy: continuations per text; 0 for none.
        greedy_tokens: their length.
        haystacks: haystacks per length; 0 for none.
        retrieval_contexts: their lengths in tokens.
        needles: needles per haystack.
    """

    texts: tuple[Path, ...]
    context: int = 1024
    windows: int = 8
    greedy: int = 0
    greedy_tokens: int = 128
    haystacks: int = 0
    retrieval_contexts: tuple[int, ...] = ()
    needles: int = 5

    def check(self, model: ModelDescription) -> None:
        """Refuse bad input before any model is loaded.

        Raises:
            ConfigError: naming the cause.
        """
        most = model.max_positions - 1
        if not MIN_CONTEXT <= self.context <= most:
            raise ConfigError(f"--context must be between {MIN_CONTEXT} and {most}, got {self.context}")
        for name, value, least in (
            ("windows", self.windows, 1), ("greedy", self.greedy, 0), ("greedy-tokens", self.greedy_tokens, 1),
            ("haystacks", self.haystacks, 0), ("needles", self.needles, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"--{name} must be at least {least}, got {value}")
        if self.greedy and GREEDY_PROMPT_TOKENS + self.greedy_tokens > most:
            raise ConfigError(
                f"--greedy-tokens must be at most {most - GREEDY_PROMPT_TOKENS}, got {self.greedy_tokens}"
            )
        outside = [c for c in self.retrieval_contexts if not MIN_CONTEXT <= c <= most]
        if self.haystacks and outside:
            raise ConfigError(f"--retrieval-contexts must be between {MIN_CONTEXT} and {most}, got {outside}")


@dataclass(frozen=True)
class CandidateResult:
    """All results of one cache."""

    candidate: Candidate
    texts: tuple[TextResult, ...]
    greedy: tuple[GreedyResult, ...]
    retrieval: tuple[RetrievalResult, ...]


def evaluate(
    model: ModelDescription,
    candidates: Sequence[Candidate],
    plan: Plan,
    *,
    progress: bool = True,
    verbose: bool = False,
    on_result: Callable[[CandidateResult], None] = lambda _: None,
) -> list[CandidateResult]:
    """Compare every candidate with the exact cache.

    Args:
        model: the model.
        candidates: caches with different names.
        plan: what to ask.
        progress: show a bar.
        verbose: let the engines write their logs to standard error.
        on_result: told of each cache when it is done: what was measured until an interruption is not lost.

    Raises:
        SpectralError: for bad input, before any model is loaded; or if an engine fails.
    """
    plan.check(model)
    names = [candidate.name for candidate in candidates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two caches have the name {', '.join(twice)}: rename one profile's file before it is calibrated"
        )
    tokenize = tokenizer(model)
    documents = [tokenize(text) for text in read_texts(plan.texts)]
    named = list(zip(labels(plan.texts), documents, strict=True))
    cases = [case for name, ids in named for case in text_cases(name, ids, plan.context, plan.windows)]
    prompts = [prompt for name, ids in named for prompt in greedy_prompts(name, ids, GREEDY_PROMPT_TOKENS, plan.greedy)]
    if plan.haystacks:
        cases += retrieval_cases(documents[0], tokenize, plan.retrieval_contexts, plan.needles, plan.haystacks)
    longest = max([len(case.ids) for case in cases] + [GREEDY_PROMPT_TOKENS + plan.greedy_tokens] * bool(prompts))
    results: dict[str, CandidateResult] = {}

    def score(remote: RemoteEngine, candidate: Candidate) -> None:
        scored: list[tuple[Case, Metrics]] = []
        with _bar(candidate.name, cases, progress) as advance:
            for case, file in zip(cases, references, strict=True):
                scored.append((case, remote.score(candidate, case, file)))
                advance(len(case.ids))
        results[candidate.name] = _summary(candidate, scored)
        on_result(results[candidate.name])

    with tempfile.TemporaryDirectory(prefix="vllm-spectral-") as folder:
        log = None if verbose else Path(folder) / "engine.log"
        with engine(EngineRequest(model, "dense", None, longest, log)) as dense:
            if prompts:
                answers = dense.generate([ids for _, ids in prompts], plan.greedy_tokens)
                cases += [greedy_case(name, ids, a) for (name, ids), a in zip(prompts, answers, strict=True) if a]
            references = [Path(folder) / f"{index}.pt" for index in range(len(cases))]
            with _bar("exact cache", cases, progress) as advance:
                for case, file in zip(cases, references, strict=True):
                    dense.record(case.ids, file)
                    advance(len(case.ids))
            for candidate in candidates:
                if candidate.engine == "dense":
                    score(dense, candidate)
        for candidate in candidates:
            if candidate.engine != "dense":
                with engine(EngineRequest(model, candidate.engine, candidate.config, longest, log)) as other:
                    score(other, candidate)
    return [results[candidate.name] for candidate in candidates]


def tokenizer(model: ModelDescription) -> Callable[[str], list[int]]:
    """The model's tokenizer, without special tokens."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(str(model.path)).encode
    return lambda text: list(encode(text, add_special_tokens=False))


def _bar(name: str, cases: Sequence[Case], progress: bool) -> AbstractContextManager[Callable[[int], None]]:
    return token_bar(name, sum(len(case.ids) for case in cases), progress)


def _summary(candidate: Candidate, measured: Sequence[tuple[Case, Metrics]]) -> CandidateResult:
    def grouped(kind: str) -> dict[str, list[tuple[Case, Metrics]]]:
        groups: dict[str, list[tuple[Case, Metrics]]] = {}
        for case, metrics in measured:
            if case.kind == kind:
                groups.setdefault(case.label, []).append((case, metrics))
        return groups

    return CandidateResult(
        candidate,
        tuple(summarize_text(label, rows) for label, rows in grouped("text").items()),
        tuple(summarize_greedy(label, rows) for label, rows in grouped("greedy").items()),
        tuple(summarize_retrieval(int(label), rows) for label, rows in grouped("retrieval").items()),
    )

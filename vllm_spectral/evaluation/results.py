"""From per-position metrics to figures with their uncertainty."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from vllm_spectral.evaluation.cases import Case

RESAMPLES = 2000
BIN_EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Positions by which KL is resolved; the first bin lies inside the default exact window."""

Metrics = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """A mean over windows.

    Attributes:
        mean: the mean.
        error: standard error over windows; None for one window.
        low, high: 95 % bootstrap interval over windows; None for one window.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TextResult:
    """Fidelity on one text.

    Attributes:
        text: file name.
        windows, tokens: how much was compared.
        perplexity_exact, perplexity: of the exact and the compared cache.
        delta_percent: relative rise of perplexity; of its interval see ``delta``.
        kl: mean KL divergence per token from exact to compared, in nats.
        kl_error: standard error of the windows' mean KL; None for a single window.
        top1: share of positions at which the most likely token is the same.
        delta, kl_interval, top1_interval: the same figures with their uncertainty.
        kl_by_position: ``[{"from", "to", "kl", "tokens"}]``.
    """

    text: str
    windows: int
    tokens: int
    perplexity_exact: float
    perplexity: float
    delta_percent: float
    kl: float
    kl_error: float | None
    top1: float
    delta: Figure
    kl_interval: Figure
    top1_interval: Figure
    kl_by_position: list[dict[str, float]]


@dataclass(frozen=True)
class GreedyResult:
    """How long greedy text stays the same.

    Attributes:
        text: file name.
        prompts: continuations compared.
        tokens: their length.
        same_tokens: mean number of tokens before the first difference (``tokens`` if there is none).
        unchanged: share of continuations without a difference.
    """

    text: str
    prompts: int
    tokens: int
    same_tokens: Figure
    unchanged: float


@dataclass(frozen=True)
class RetrievalResult:
    """Needles found at one context length.

    Attributes:
        context: tokens.
        needles: asked for.
        found_exact: found by the exact cache.
        found: found by the compared cache.
        kept: of those that the exact cache found, the share that the compared one found; None if it found none.
        probability_exact, probability: mean probability of the right number, all of its tokens, with the exact and the
            compared cache. Unlike the counts they do not turn on which of two even guesses is a hair ahead.
        by_depth: ``[{"from", "to", "found_exact", "found", "needles"}]``, depth as a fraction of the context.
        each: ``[{"depth", "found_exact", "found", "probability_exact", "probability"}]``, needle by needle.
    """

    context: int
    needles: int
    found_exact: int
    found: int
    kept: float | None
    probability_exact: float
    probability: float
    by_depth: list[dict[str, float]]
    each: list[dict[str, float]]


def summarize_text(text: str, windows: Sequence[tuple[Case, Metrics]]) -> TextResult:
    """All windows of one text."""
    each = [metrics for _, metrics in windows]
    merged = {key: [value for metrics in each for value in metrics[key]] for key in each[0]}
    exact, compared = math.exp(fmean(merged["nll_reference"])), math.exp(fmean(merged["nll_candidate"]))
    rise = figure([fmean(m["nll_candidate"]) - fmean(m["nll_reference"]) for m in each])
    kl = figure([fmean(m["kl"]) for m in each])
    return TextResult(
        text=text,
        windows=len(each),
        tokens=len(merged["kl"]),
        perplexity_exact=exact,
        perplexity=compared,
        delta_percent=100 * (compared / exact - 1),
        kl=fmean(merged["kl"]),
        kl_error=kl.error,
        top1=fmean(merged["top1"]),
        delta=_percent(rise),
        kl_interval=kl,
        top1_interval=figure([fmean(m["top1"]) for m in each]),
        kl_by_position=_by_position(windows),
    )


def summarize_greedy(text: str, cases: Sequence[tuple[Case, Metrics]]) -> GreedyResult:
    """All continuations of one text."""
    same = []
    for case, metrics in cases:
        length = case.spans[0][1] - case.spans[0][0]
        same.append(next((i for i, hit in enumerate(metrics["hit"]) if not hit), length))
    lengths = [case.spans[0][1] - case.spans[0][0] for case, _ in cases]
    unchanged = [float(a == b) for a, b in zip(same, lengths, strict=True)]
    return GreedyResult(text, len(cases), max(lengths), figure([float(s) for s in same]), fmean(unchanged))


def summarize_retrieval(context: int, cases: Sequence[tuple[Case, Metrics]], bins: int = 5) -> RetrievalResult:
    """All haystacks of one length. A needle is found if every token of the answer is the most likely one."""
    each: list[dict[str, float]] = []
    for case, metrics in cases:
        at = 0
        for (start, stop), depth in zip(case.spans, case.depths, strict=True):
            part = slice(at, at := at + stop - start)
            each.append(
                {
                    "depth": depth,
                    "found_exact": all(metrics["hit_reference"][part]),
                    "found": all(metrics["hit"][part]),
                    "probability_exact": math.exp(-sum(metrics["nll_reference"][part])),
                    "probability": math.exp(-sum(metrics["nll_candidate"][part])),
                }
            )
    by_depth = []
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        chosen = [needle for needle in each if low <= needle["depth"] < high]
        counts = {key: sum(needle[key] for needle in chosen) for key in ("found_exact", "found")}
        by_depth.append({"from": low, "to": high, "needles": len(chosen), **counts})
    known = [needle["found"] for needle in each if needle["found_exact"]]
    return RetrievalResult(
        context=context,
        needles=len(each),
        found_exact=len(known),
        found=int(sum(needle["found"] for needle in each)),
        kept=fmean(known) if known else None,
        probability_exact=fmean(needle["probability_exact"] for needle in each),
        probability=fmean(needle["probability"] for needle in each),
        by_depth=by_depth,
        each=each,
    )


def figure(values: Sequence[float]) -> Figure:
    """Mean of independent values, its standard error and its bootstrap interval."""
    if len(values) < 2:
        return Figure(fmean(values), None, None, None)
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = sample[torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(fmean(values), stdev(values) / math.sqrt(len(values)), low, high)


def _percent(rise: Figure) -> Figure:
    """A rise of the mean negative log-likelihood as a rise of perplexity in percent."""
    if rise.error is None or rise.low is None or rise.high is None:
        return Figure(100 * math.expm1(rise.mean), None, None, None)
    mean, low, high = (100 * math.expm1(value) for value in (rise.mean, rise.low, rise.high))
    return Figure(mean, 100 * math.exp(rise.mean) * rise.error, low, high)


def _by_position(windows: Sequence[tuple[Case, Metrics]]) -> list[dict[str, float]]:
    position = [p for case, _ in windows for start, stop in case.spans for p in range(start, stop)]
    kl = [value for _, metrics in windows for value in metrics["kl"]]
    rows = []
    for low, high in itertools.pairwise(BIN_EDGES):
        chosen = [value for p, value in zip(position, kl, strict=True) if low <= p < high]
        if chosen:
            rows.append({"from": low, "to": high, "kl": fmean(chosen), "tokens": len(chosen)})
    return rows

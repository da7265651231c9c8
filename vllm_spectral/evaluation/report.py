"""Results as JSON, as a Markdown table and as plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_spectral.errors import ConfigError
from vllm_spectral.evaluation.candidates import STRICT
from vllm_spectral.evaluation.results import Figure
from vllm_spectral.evaluation.run import CandidateResult


def to_json(results: Sequence[CandidateResult]) -> list[dict[str, Any]]:
    """One entry per cache."""
    return [
        {
            "name": result.candidate.name,
            "bits_per_element": result.candidate.bits,
            "exact_first_tokens": result.candidate.first,
            "exact_recent_tokens": result.candidate.recent,
            "texts": [dataclasses.asdict(text) for text in result.texts],
            "greedy": [dataclasses.asdict(text) for text in result.greedy],
            "retrieval": [dataclasses.asdict(length) for length in result.retrieval],
        }
        for result in results
    ]


def markdown(results: Sequence[CandidateResult]) -> str:
    """All figures, as mean ± standard error over windows."""
    lines = [
        "| cache | bits | exact | text | tokens | perplexity | KL | top-1 same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        c = result.candidate
        lines += [
            f"| {c.name} | {c.bits:.3g} | {c.first} + {c.recent} | {t.text} | {t.tokens} | {_signed(t.delta)} % | "
            f"{_plain(t.kl_interval, 4)} | {_plain(t.top1_interval, 1, 100)} % |"
            for t in result.texts
        ]
    if any(result.greedy for result in results):
        lines += [
            "",
            "| cache | text | continuations | unchanged | tokens before the first difference |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {result.candidate.name} | {g.text} | {g.prompts} of {g.tokens} tokens | {100 * g.unchanged:.0f} % | "
            f"{_plain(g.same_tokens, 1)} |"
            for result in results
            for g in result.greedy
        ]
    if any(result.retrieval for result in results):
        lines += [
            "",
            "| cache | context | needles | found by the exact cache | found | of those kept | probability, exact | here |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for result in results:
            lines += [
                f"| {result.candidate.name} | {r.context} | {r.needles} | {r.found_exact} | {r.found} | "
                f"{'-' if r.kept is None else f'{100 * r.kept:.0f} %'} | {r.probability_exact:.2f} | {r.probability:.2f} |"
                for r in result.retrieval
            ]
    return "\n".join(lines) + "\n"


def plot(results: Sequence[CandidateResult], folder: Path) -> list[Path]:
    """Rate-distortion and position-resolved KL, one panel per text.

    Returns:
        The files written.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write plots to {folder}: {error.strerror}") from None
    texts = [text.text for text in results[0].texts]
    written = []
    for name, draw, x_label in (
        ("rate-distortion", _draw_rate, "stored bits per KV element"),
        ("kl-by-position", _draw_positions, "position in the context"),
    ):
        size = (5 * len(texts) + 2.5, 4.5)
        figure, axes = plt.subplots(1, len(texts), figsize=size, squeeze=False, sharey=True)
        for index, axis in enumerate(axes[0]):
            draw(axis, results, index)
            axis.set_title(texts[index])
            axis.set_xlabel(x_label)
            axis.set_yscale("log")
            axis.grid(visible=True, which="both", alpha=0.3)
        axes[0][0].set_ylabel("KL to the exact cache (nats per token)")
        axes[0][-1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0))
        figure.tight_layout()
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written


def _draw_rate(axis: Any, results: Sequence[CandidateResult], index: int) -> None:
    for label, members in _families(results):
        points = sorted((r.candidate.bits, r.texts[index].kl, r.texts[index].kl_error or 0.0) for r in members)
        bits, kl, error = zip(*points, strict=True)
        axis.errorbar(
            bits, kl, yerr=error, marker="o", capsize=3, label=label, linestyle="--" if STRICT in label else "-"
        )


def _draw_positions(axis: Any, results: Sequence[CandidateResult], index: int) -> None:
    # Colours repeat after ten caches, markers after four: together they tell forty apart.
    for number, result in enumerate(results):
        rows = result.texts[index].kl_by_position
        # In its bin's middle; the first bin starts at 0, which a logarithmic axis does not have.
        middle = [max(row["from"], row["to"] / 4) ** 0.5 * row["to"] ** 0.5 for row in rows]
        axis.plot(
            middle,
            [row["kl"] for row in rows],
            marker="o^sx"[number // 10 % 4],
            markersize=4,
            label=result.candidate.name,
        )
    axis.set_xscale("log", base=2)


def _families(results: Sequence[CandidateResult]) -> Iterator[tuple[str, list[CandidateResult]]]:
    """Caches that are one design at several budgets, under one name."""
    groups: dict[str, list[CandidateResult]] = {}
    for result in results:
        c = result.candidate
        name = c.family or c.name
        if c.config is not None or c.rival is not None:
            name += f", {c.first} + {c.recent} exact" if c.first or c.recent else STRICT
        groups.setdefault(name, []).append(result)
    yield from groups.items()


def _plain(figure: Figure, digits: int, factor: float = 1.0) -> str:
    error = "" if figure.error is None else f" ± {factor * figure.error:.{digits}f}"
    return f"{factor * figure.mean:.{digits}f}{error}"


def _signed(figure: Figure) -> str:
    error = "" if figure.error is None else f" ± {figure.error:.2f}"
    return f"{figure.mean:+.2f}{error}"

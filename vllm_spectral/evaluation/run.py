"""Evaluation through the real engine: the same windows exactly and from compressed pages, in one run.

Decode conditions hold by construction: every token, itself included, reads all of its context from compressed pages,
in a prompt just as when it is generated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from vllm_spectral.calibration.run import read_texts
from vllm_spectral.config import Mode, SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile
from vllm_spectral.progress import token_bar

MIN_CONTEXT = 16


@dataclass(frozen=True)
class TextResult:
    """Fidelity on one text.

    Attributes:
        text: file name.
        windows, tokens: how much was compared.
        perplexity_exact, perplexity: of the exact and the compressed cache.
        delta_percent: relative rise of perplexity.
        kl: mean KL divergence per token from exact to compressed, in nats.
        kl_error: standard error of the windows' mean KL; None for a single window.
        top1: share of positions at which the most likely token is the same.
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


def evaluate(
    model: ModelDescription,
    profile: Profile,
    profile_path: Path,
    texts: Sequence[Path],
    *,
    context: int = 1024,
    windows: int = 8,
    exempt_layers: frozenset[int] = frozenset(),
    progress: bool = True,
) -> list[TextResult]:
    """Compare the compressed cache with the exact one on each text.

    Args:
        model: the model.
        profile: its verified profile.
        profile_path: where the engine reads the profile from.
        texts: UTF-8 files.
        context: tokens per window.
        windows: most windows per text, spread evenly over it.
        exempt_layers: layers to leave uncompressed.
        progress: show a bar.

    Raises:
        ConfigError: for bad input, before any model is loaded, or for a text shorter than :data:`MIN_CONTEXT` tokens.
    """
    if not MIN_CONTEXT <= context <= model.max_positions - 1:
        raise ConfigError(f"--context must be between {MIN_CONTEXT} and {model.max_positions - 1}, got {context}")
    if windows < 1:
        raise ConfigError(f"--windows must be at least 1, got {windows}")
    contents = read_texts(texts)
    from vllm_spectral.backend.engine import OfflineEngine

    engine = OfflineEngine(
        model,
        SpectralConfig(profile=profile_path, digest=profile.digest, mode=Mode.EVALUATE, exempt_layers=exempt_layers),
        max_model_len=context + 1,
        max_num_seqs=1,
        kv_cache_tokens=2 * context + 64,
    )
    cut = [_cut(engine.tokenize(text), context, windows, file) for file, text in zip(texts, contents, strict=True)]
    results = []
    with token_bar("evaluating", sum(map(len, cut)), progress) as advance:
        for file, parts in zip(texts, cut, strict=True):
            measured = []
            for ids in parts:
                for name, exact in (("exact", True), ("compressed", False)):
                    engine.rpc("spectral_record_hidden", name, exact)
                    engine.run([ids])
                measured.append(engine.rpc("spectral_compare", "exact", "compressed", ids)[0])
                advance(1)
            results.append(_summary(file.name, measured))
    return results


def _cut(ids: list[int], context: int, windows: int, file: Path) -> list[list[int]]:
    """At most ``windows`` full windows, spread evenly; one short window if the text is short."""
    if len(ids) < MIN_CONTEXT:
        raise ConfigError(f"{file} has only {len(ids)} tokens, at least {MIN_CONTEXT} are needed")
    starts = list(range(0, len(ids) - context + 1, context)) or [0]
    count = min(len(starts), windows)
    return [ids[start : start + context] for start in (starts[i * len(starts) // count] for i in range(count))]


def _summary(text: str, measured: list[dict[str, list[float]]]) -> TextResult:
    merged = {key: [value for window in measured for value in window[key]] for key in measured[0]}
    exact, compressed = math.exp(fmean(merged["nll_reference"])), math.exp(fmean(merged["nll_candidate"]))
    per_window = [fmean(window["kl"]) for window in measured]
    return TextResult(
        text=text,
        windows=len(measured),
        tokens=len(merged["kl"]),
        perplexity_exact=exact,
        perplexity=compressed,
        delta_percent=100 * (compressed / exact - 1),
        kl=fmean(merged["kl"]),
        kl_error=stdev(per_window) / math.sqrt(len(per_window)) if len(per_window) > 1 else None,
        top1=fmean(merged["top1"]),
    )

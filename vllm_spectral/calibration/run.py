"""The calibration run: tokens through the real engine, moments out of it, a profile from the moments."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_spectral import __version__
from vllm_spectral.calibration.allocate import hadamard_layer, spectral_layer
from vllm_spectral.calibration.breadth import excess_error
from vllm_spectral.calibration.prompts import OPENINGS, QUESTIONS
from vllm_spectral.calibration.traffic import traffic_moments
from vllm_spectral.codec.codebook import MAX_BITS, Codebooks, normal_codebooks
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.config import Mode, SpectralConfig
from vllm_spectral.errors import ConfigError, SpectralError
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.container import brief
from vllm_spectral.profile.schema import BasisKind, LayerProfile, Profile, Provenance
from vllm_spectral.progress import token_bar
from vllm_spectral.stats.canary import MOST_TOKENS, TEXT, expect
from vllm_spectral.stats.moments import LayerMoments

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_spectral.backend.engine import OfflineEngine

MIN_BITS = 1.5
NARROW = 1.2
"""Excess error from which a text is called narrow. On the demo model: prose, code and licences 1.26 to 1.29 each, a mixture
of the three 1.15, the answers to the built-in prompts 1.07."""
ANSWER_TOKENS = 320
"""Tokens the model writes per built-in prompt, at most."""
WINDOW_TOKENS = 4096
"""Length of the measured windows (shorter if the model's context is)."""
TEXT_TOKENS = 32768
"""Tokens taken from the user's text."""
PIECE_TOKENS = 1024
"""Length of the pieces in which they are taken."""
NUM_PROBES = 128
PROBE_TOKENS = 4
BATCH = 48
POOL_TOKENS = 20480
"""Page pool of the run: a full batch of prompts and answers, so that nothing is preempted and measured twice."""


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user asked for.

    Attributes:
        model: description of the model.
        name: short name of the profile.
        bits: stored bits per element, scales included; None: those of the server whose moments are taken.
        basis: kind of basis.
        texts: the user's files; empty for the built-in prompts.
        traffic: address of a server whose live moments are taken instead; None to measure.
        api_key: its key.
        seed: seed of sampling and signs.
    """

    model: ModelDescription
    name: str
    bits: float | None = 4.0
    basis: BasisKind = "spectral"
    texts: tuple[Path, ...] = ()
    traffic: str | None = None
    api_key: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse bad input before any model is loaded.

        Raises:
            SpectralError: naming the cause.
        """
        if self.bits is None and not self.traffic:
            raise ConfigError("--bits: only a server has some of its own")
        if self.bits is not None and not MIN_BITS <= self.bits <= MAX_BITS:
            raise ConfigError(f"--bits must be between {MIN_BITS} and {MAX_BITS}, got {self.bits:g}")
        if self.basis == "hadamard" and self.texts:
            raise ConfigError("--basis hadamard measures nothing: leave out --text, or use --basis spectral")
        if self.traffic and (self.texts or self.basis == "hadamard"):
            raise ConfigError("--from-traffic takes what a server measured: leave out --text and --basis hadamard")
        self.model.require_supported()
        read_texts(self.texts)


def read_texts(files: Sequence[Path]) -> list[str]:
    """The user's texts.

    Raises:
        ConfigError: for a file that is missing, unreadable, not UTF-8 or empty.
    """
    texts = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"no such text file: {file}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{file} is not UTF-8 text") from None
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from None
        if not text.strip():
            raise ConfigError(f"{file} is empty: there is nothing to measure")
        texts.append(text)
    return texts


def calibrate(
    request: CalibrationRequest, *, progress: bool = True, warn: Callable[[str], None] = warnings.warn
) -> Profile:
    """Make a profile; it has no digest until it is saved.

    Args:
        request: what the user asked for.
        progress: show a bar.
        warn: told what the user should know about the text.

    Raises:
        SpectralError: for bad input, before any model is loaded.
    """
    request.check()
    measured = None
    if request.traffic:
        live = traffic_moments(request.traffic, request.api_key, request.model)
        measured = Measured(live.layers, None)
        if request.bits is None:
            request = dataclasses.replace(request, bits=live.bits)
            request.check()
    elif request.basis != "hadamard":
        measured = measure(request, progress=progress)
    return build(request, measured, warn=warn)


def build(
    request: CalibrationRequest, measured: Measured | None, *, warn: Callable[[str], None] = warnings.warn
) -> Profile:
    """The profile of a checked request; ``measured`` is what :func:`measure` found for it, None for a Hadamard basis."""
    model, bits = request.model, request.bits
    assert bits is not None
    fingerprint = model.fingerprint()
    slot_bytes = slot_bytes_for(bits, model.head_dim)
    if measured is None:
        source, num_tokens = "none", 0
        layers: list[LayerProfile] = [
            hadamard_layer(model.num_kv_heads, model.head_dim, slot_bytes, request.seed + index)
            for index in range(model.num_layers)
        ]
    else:
        source = "live traffic" if request.traffic else ", ".join(f.name for f in request.texts) or "built-in prompts"
        num_tokens = min(layer.num_measured for layer in measured.moments)
        layers = [spectral_layer(layer, slot_bytes) for layer in measured.moments]
        if measured.broad is not None:
            excess = excess_error(layers, measured.moments, measured.broad)
            if excess > NARROW:
                warn(
                    f"this text is narrow: errors on other kinds of text (the built-in prompts) would be {excess:.1f} times "
                    "those on yours; add text of every kind that will be served, or leave --text out"
                )
    codebooks, expectation = Codebooks(normal_codebooks()), None
    if measured is not None and measured.canary is not None:
        expectation = expect(layers, slot_bytes, codebooks, *measured.canary)
    return Profile(
        name=request.name,
        fingerprint=fingerprint,
        slot_bytes=slot_bytes,
        codebooks=codebooks,
        layers=tuple(layers),
        expectation=expectation,
        provenance=Provenance(
            basis=request.basis,
            requested_bits=bits,
            text_source=brief(source),
            num_tokens=num_tokens,
            seed=request.seed,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"vllm-spectral": __version__, "torch": importlib.metadata.version("torch")},
        ),
    )


@dataclass(frozen=True)
class Measured:
    """What a calibration run measured.

    Attributes:
        moments: of every layer, over the text that the profile is for.
        broad: over the built-in prompts, if that text is the user's.
        canary: the canary's tokens, and every layer's keys and values of them; None if no model ran.
    """

    moments: list[LayerMoments]
    broad: list[LayerMoments] | None
    canary: tuple[list[int], list[tuple[Tensor, Tensor]]] | None = None


def measure(request: CalibrationRequest, *, progress: bool = True) -> Measured:
    """Second moments of every layer: over the user's text, or over the model's answers to the built-in prompts.

    Texts are joined into long windows before they are measured. Keys are stored with their rotary positions, and
    their slowly turning components look constant in a short text: a profile of short texts fails at later positions.
    """
    from vllm_spectral.backend.engine import OfflineEngine

    window = min(request.model.max_positions - 1, WINDOW_TOKENS)
    engine = OfflineEngine(
        request.model,
        SpectralConfig(mode=Mode.CALIBRATE),
        max_model_len=window + 1,
        max_num_seqs=BATCH,
        kv_cache_tokens=POOL_TOKENS,
        seed=request.seed,
    )
    if request.texts:
        documents = [engine.tokenize(text) for text in read_texts(request.texts)]
        documents = [spread(ids, TEXT_TOKENS // len(documents)) for ids in documents]
    else:
        documents = _answers(engine, progress)
    windows = join(documents, window)
    starts = probes(documents)
    canary = engine.tokenize(TEXT, special=True)[: min(MOST_TOKENS, window)]
    engine.rpc("spectral_keep")
    engine.run([canary])
    (kept,) = engine.rpc("spectral_kept")
    with token_bar("measuring", sum(map(len, windows + starts)), progress) as advance:
        engine.rpc("spectral_capture", True)
        for ids in windows:
            engine.run([ids])
            advance(len(ids))
        engine.run(starts)
        (moments,) = engine.rpc("spectral_moments")
        if request.texts:
            for ids in join([engine.tokenize(text) for text in (*QUESTIONS, *OPENINGS)], window):
                engine.run([ids])
    (broad,) = engine.rpc("spectral_moments")
    if len(moments) != request.model.num_layers:
        raise SpectralError(f"the model has {request.model.num_layers} layers, but {len(moments)} were measured")
    return Measured(list(moments), list(broad) if request.texts else None, (canary, list(kept)))


def _answers(engine: OfflineEngine, progress: bool) -> list[list[int]]:
    """The built-in prompts with what the model wrote after each."""
    questions = [engine.chat_prompt(question) for question in QUESTIONS]
    openings = [engine.tokenize(text) for text in OPENINGS]
    # Alternating, so that every window of the joined text holds both kinds.
    prompts = [p for pair in zip_longest(questions, openings) for p in pair if p]
    with token_bar(f"answering {len(prompts)} prompts", len(prompts) * ANSWER_TOKENS, progress) as advance:
        answers = engine.run(prompts, max_tokens=ANSWER_TOKENS, sample=True, on_tokens=advance)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


def spread(ids: list[int], most: int) -> list[int]:
    """At most about ``most`` tokens of a document, in pieces of :data:`PIECE_TOKENS` taken evenly from all of it."""
    starts = range(0, len(ids), PIECE_TOKENS)
    count = max(min(len(starts), most // PIECE_TOKENS), 1)
    chosen = (starts[index * len(starts) // count] for index in range(count))
    return [token for start in chosen for token in ids[start : start + PIECE_TOKENS]]


def probes(documents: Sequence[list[int]]) -> list[list[int]]:
    """Short requests that show how the first token of a request looks: at the documents' starts and within them."""
    rounds = -(-NUM_PROBES // len(documents))
    return [
        ids[start : start + PROBE_TOKENS]
        for part in range(rounds)
        for ids in documents
        if (start := part * len(ids) // rounds) < len(ids)
    ]


def join(documents: Sequence[list[int]], window: int) -> list[list[int]]:
    """Documents joined and cut into windows of ``window`` tokens, repeated from the start to fill the last one."""
    ids = [token for document in documents for token in document]
    count = -(-len(ids) // window)
    return [[ids[i % len(ids)] for i in range(n * window, (n + 1) * window)] for n in range(count)]

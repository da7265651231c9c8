"""What is asked of every cache: token sequences, and the positions whose predictions are compared.

All three kinds are teacher-forced: the whole sequence is given, and what the model would say at each position is compared.
For the greedy and the retrieval cases this equals generation. Up to the first token on which a cache disagrees, it
has generated exactly the given ones; the first disagreement is where its own text would have parted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_spectral.errors import ConfigError

MIN_CONTEXT = 16
NEEDLE_DIGITS = 5
_COLOURS = ("red", "blue", "green", "silver", "golden", "purple", "white", "orange", "black", "yellow")
_THINGS = ("lantern", "bicycle", "piano", "umbrella", "telescope", "teapot", "violin", "anchor", "compass", "kettle")

Kind = Literal["text", "greedy", "retrieval"]
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Case:
    """One sequence.

    Attributes:
        kind: which question it belongs to.
        label: name of the text, or the context length of a retrieval case.
        ids: the tokens.
        spans: ``(start, stop)`` of the tokens whose prediction is compared, from 1 on.
        depths: retrieval: where each span's needle lies, as a fraction of the context.
    """

    kind: Kind
    label: str
    ids: list[int]
    spans: tuple[tuple[int, int], ...]
    depths: tuple[float, ...] = ()


def labels(files: Sequence[Path]) -> list[str]:
    """Names of texts: the file's name, or its whole path where two share a name."""
    names = [file.name for file in files]
    return [file.name if names.count(file.name) == 1 else str(file) for file in files]


def text_cases(label: str, ids: list[int], context: int, windows: int) -> list[Case]:
    """At most ``windows`` full windows, spread evenly over a text; one short window if the text is short.

    Raises:
        ConfigError: for a text of fewer than :data:`MIN_CONTEXT` tokens.
    """
    if len(ids) < MIN_CONTEXT:
        raise ConfigError(f"{label} has only {len(ids)} tokens, at least {MIN_CONTEXT} are needed")
    starts = list(range(0, len(ids) - context + 1, context)) or [0]
    count = min(len(starts), windows)
    cut = [ids[start : start + context] for start in (starts[i * len(starts) // count] for i in range(count))]
    return [Case("text", label, part, ((1, len(part)),)) for part in cut]


def greedy_prompts(label: str, ids: list[int], prompt_tokens: int, count: int) -> list[tuple[str, list[int]]]:
    """``(label, prompt)`` of continuations to be written: pieces spread evenly over a text."""
    starts = range(0, max(len(ids) - prompt_tokens, 1), prompt_tokens)
    count = min(count, len(starts))
    return [
        (label, ids[start : start + prompt_tokens])
        for start in (starts[i * len(starts) // count] for i in range(count))
    ]


def greedy_case(label: str, prompt: list[int], continuation: list[int]) -> Case:
    """A prompt with the stock cache's greedy continuation."""
    return Case("greedy", label, prompt + continuation, ((len(prompt), len(prompt) + len(continuation)),))


def retrieval_cases(
    filler: list[int], tokenize: Tokenize, contexts: Sequence[int], needles: int, count: int, seed: int = 0
) -> list[Case]:
    """Haystacks with several five-digit numbers hidden in them, each asked for at the end.

    Args:
        filler: tokens of text to hide the needles in.
        tokenize: the model's tokenizer, without special tokens.
        contexts: lengths, in tokens.
        needles: needles per haystack, at evenly spaced depths.
        count: haystacks per length.
        seed: of names, numbers and filler.
    """
    generator = random.Random(seed)
    cases = []
    for context in contexts:
        for index in range(count):
            names = [f"{c} {t}" for c in _COLOURS for t in _THINGS]
            chosen = generator.sample(names, needles)
            numbers = [str(generator.randrange(10 ** (NEEDLE_DIGITS - 1), 10**NEEDLE_DIGITS)) for _ in chosen]
            hidden = [
                tokenize(f"\nThe number of the {n} is {x}. Remember it.\n")
                for n, x in zip(chosen, numbers, strict=True)
            ]
            asked = [
                (tokenize(f"\nThe number of the {n} is"), tokenize(f" {x}"))
                for n, x in zip(chosen, numbers, strict=True)
            ]
            room = context - sum(map(len, hidden)) - sum(len(q) + len(a) for q, a in asked)
            if room < needles:
                raise ConfigError(f"a context of {context} tokens has no room for {needles} needles")
            start = generator.randrange(max(len(filler) - room, 1))
            text = [filler[(start + i) % len(filler)] for i in range(room)]
            # The n-th needle at (n + 1/2) / needles of the filler, moved a little from haystack to haystack.
            shift = index / count / needles
            depths = [(n / needles + shift) for n in range(needles)]
            ids: list[int] = []
            at = 0
            for depth, needle in zip(depths, hidden, strict=True):
                ids += text[at : (at := int(depth * room))] + needle
            ids += text[at:]
            order = generator.sample(range(needles), needles)
            spans = []
            for n in order:
                question, answer = asked[n]
                ids += question
                spans.append((len(ids), len(ids) + len(answer)))
                ids += answer
            cases.append(Case("retrieval", str(context), ids, tuple(spans), tuple(depths[n] for n in order)))
    return cases

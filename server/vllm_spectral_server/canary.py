"""The canary: a fixed prompt whose answer is known, so that readiness means more than a living process.

At the start, before any request is let in, the prompt is answered once as an exact cache would: the step has all its
keys and values, and attention reads those instead of pages. From then on the same prompt is answered from compressed pages
and the two predictions of every token are compared. What is damaged in a profile, or breaks later in pages or kernels,
changes the answer; what users write does not.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Predictions = Sequence[Mapping[int, float]]
"""Per position, log-probabilities of the most likely next tokens, by token id."""

TEXT = """\
The lighthouse keeper wrote in his journal every evening, even when nothing had happened. On the ninth of March he noted \
the wind (north-east, rising), the state of the lamp, and the names of two ships: Aurora and Saint Brendan. "The sea is \
like glass," he wrote, "and the gulls will not fly." Three days later the storm came.

def mean(values: list[float]) -> float:
    \"\"\"Arithmetic mean; raises ValueError for an empty list.\"\"\"
    if not values:
        raise ValueError("mean() of an empty list")
    return sum(values) / len(values)

Question: A train leaves at 14:05 and arrives at 16:50. How long is the journey?
Answer: From 14:05 to 16:05 are two hours, and from 16:05 to 16:50 are 45 minutes, so the journey takes 2 hours and 45 \
minutes. The lighthouse keeper wrote in his journal every evening, even when nothing had happened. On the ninth of March he \
noted the wind (north-east, rising), the state of the lamp, and the names of two ships: Aurora and Saint Brendan.
"""
MOST_TOKENS = 256
TOP_TOKENS = 20
FIRST_JUDGED = 32
"""Positions before this one read hardly anything from pages."""


@dataclass(frozen=True)
class Verdict:
    """How far compressed predictions are from exact ones.

    Attributes:
        kl: KL divergence from exact to compressed, nats per token, mean. Only the exact prediction's most likely tokens are
            known on both sides; all others count as one, which makes it a lower bound (data-processing inequality).
        top1: share of positions with the same most likely token.
    """

    kl: float
    top1: float


@dataclass(frozen=True)
class LayerCheck:
    """One layer, on the canary's own tokens; see :class:`vllm_spectral.stats.probe.Probe`."""

    error_ratio: float
    drift: float


def compare(exact: Predictions, stored: Predictions) -> Verdict:
    """Compare two predictions of the same prompt, position by position."""
    divergences, agreements = [], []
    for p, q in zip(exact, stored, strict=True):
        shared = p.keys() & q.keys()
        pairs = [(p[token], q[token]) for token in shared]
        pairs.append(tuple(math.log(max(1 - sum(map(math.exp, side)), 1e-9)) for side in zip(*pairs, strict=True)))  # type: ignore[arg-type]
        divergences.append(sum(math.exp(a) * (a - b) for a, b in pairs))
        agreements.append(max(p, key=p.__getitem__) == max(q, key=q.__getitem__))
    return Verdict(sum(divergences) / len(divergences), sum(agreements) / len(agreements))


@dataclass
class Canary:
    """The prompt, its exact answer, and the last comparison.

    Attributes:
        engine: vLLM's engine.
        ask: calls a method of the workers on every rank of every engine.
        every_seconds: pause between two runs; 0: never.
        kl_limit: largest ``kl`` that passes.
        error_ratio_limit, drift_limit: largest figures of a layer, on the canary's own tokens, that pass. They see what
            the predictions hide: a layer of a large model may be noise and the answer still look right.
        layers: what the last run found in each layer; empty if its prompt was cut into several steps.
    """

    engine: Any
    ask: Any
    every_seconds: float
    kl_limit: float
    error_ratio_limit: float
    drift_limit: float
    state: Literal["off", "pending", "passed", "failed"] = "pending"
    message: str = "not run yet"
    time: float | None = None
    runs: int = 0
    failures: int = 0
    verdict: Verdict | None = None
    layers: dict[int, LayerCheck] = field(default_factory=dict)
    _tokens: list[int] = field(default_factory=list)
    _exact: list[Predictions] = field(default_factory=list)
    _number: Any = field(default_factory=itertools.count)

    async def record(self) -> None:
        """Answer the prompt exactly, once per engine; before the server lets requests in."""
        config = self.engine.vllm_config
        tokenizer = self.engine.get_tokenizer()
        most = min(MOST_TOKENS, config.model_config.max_model_len - 1, config.scheduler_config.max_num_batched_tokens)
        self._tokens = tokenizer.encode(TEXT)[:most]
        if len(self._tokens) <= FIRST_JUDGED:
            self.state, self.message = "off", f"prompts of {most} tokens are too short to judge by"
            return
        await self.ask("spectral_answer_exactly", True)
        try:
            self._exact = [await self._answer(index) for index in range(self._num_engines)]
        finally:
            answered = await self.ask("spectral_answer_exactly", False)
        if not all(all(ranks) for ranks in answered):
            self.state, self.message = "failed", "the exact answer could not be recorded: its prompt was cut into steps"

    @property
    def _num_engines(self) -> int:
        return int(self.engine.vllm_config.parallel_config.data_parallel_size)

    def passes(self, check: LayerCheck) -> bool:
        """Whether a layer is as the profile says. Not a number compares as false, and must not pass."""
        return check.error_ratio <= self.error_ratio_limit and check.drift <= self.drift_limit

    @property
    def worst_layer(self) -> int | None:
        """The layer with the largest error ratio."""
        return max(self.layers, key=lambda layer: self.layers[layer].error_ratio, default=None)

    async def run(self, look: Callable[[], Awaitable[dict[int, LayerCheck]]]) -> None:
        """Answer the prompt from compressed pages and judge.

        Args:
            look: called after the answer: what was found in each layer.
        """
        if not self._exact:
            return
        await self.ask("spectral_expect_canary", len(self._tokens))
        verdicts = [compare(self._exact[index], await self._answer(index)) for index in range(self._num_engines)]
        self.layers = await look()
        self.verdict = verdict = max(verdicts, key=lambda each: each.kl)
        self.time, self.runs = time.time(), self.runs + 1
        reasons = []
        if not verdict.kl <= self.kl_limit:
            reasons.append(
                f"predictions are {verdict.kl:.3f} nats from the exact cache's, the limit is {self.kl_limit:g}"
            )
        bad = sorted(layer for layer, check in self.layers.items() if not self.passes(check))
        if bad:
            ratio, drift = (max(getattr(self.layers[i], name) for i in bad) for name in ("error_ratio", "drift"))
            reasons.append(
                f"layer{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}: keys or values are stored with up to {ratio:.1f} "
                f"times the error that the profile predicts (limit {self.error_ratio_limit:g}), and have up to {drift:.0%} "
                f"of their energy where the profile has none (limit {self.drift_limit:.0%})"
            )
        self.state = "failed" if reasons else "passed"
        self.failures += bool(reasons)
        self.message = "; ".join(reasons) or "answers as the exact cache does"

    async def _answer(self, engine_index: int) -> Predictions:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        top = self.engine.vllm_config.model_config.max_logprobs
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False,
            prompt_logprobs=TOP_TOKENS if top < 0 else min(TOP_TOKENS, top),
        )  # fmt: skip
        outputs = self.engine.generate(
            TokensPrompt(prompt_token_ids=self._tokens), params, f"canary-{next(self._number)}",
            data_parallel_rank=engine_index if self._num_engines > 1 else None,
        )  # fmt: skip
        (final,) = [output async for output in outputs if output.finished]
        return [
            {token: entry.logprob for token, entry in position.items()}
            for position in final.prompt_logprobs[FIRST_JUDGED:]
            if position is not None
        ]

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
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllm_spectral.backend.scheduler import CANARY_PREFIX
from vllm_spectral.profile.schema import Expectation, Profile
from vllm_spectral.stats.canary import MOST_TOKENS, TEXT, tokens_digest

Predictions = Sequence[Mapping[int, float]]
"""Per position, log-probabilities of the most likely next tokens, by token id."""

TOP_TOKENS = 20
SHARE = 0.003
"""Of the time, which the canary takes at most where its pause is left to it."""
PAUSE_SECONDS = 60.0
RATIO_SLACK, DRIFT_SLACK = 1.08, 0.015
"""How far a layer's figures may be from what its profile says of the canary: times the error ratio, and beside the drift. A
server's own keys and values differ a little, since it reads compressed ones on the way, and arithmetic differs by machine:
sound ones stayed within 1.02 and 0.002, a damaged layer began at 1.1 and 0.04 (``docs/metrics.md``)."""
LOOKS = 3
"""At layers that do not pass while predictions do, before they are said to fail."""
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
    """One layer, on the canary's own tokens, over the ranks; see :class:`vllm_spectral.stats.probe.Probe`."""

    error_ratio: float
    drift: float
    kernel_error: float


@dataclass(frozen=True)
class Limits:
    """Past these a figure raises an alarm.

    The canary's own tokens are held against what the profile says of them, if it does; see :meth:`Canary.limits_of`.

    Attributes:
        error_ratio: squared error of a layer's keys or values over what the profile predicts. Sound profiles stayed below
            1.25 on text unlike their calibration's.
        drift: share of the energy that left the profile's leading channels. Sound profiles stayed below .045; transposed or
            foreign bases began at .083, most at .2 (``docs/metrics.md``).
        kl: of the canary's predictions, nats per token.
        kernel_error: the kernels' attention against the reference's over the same pages. bf16 products leave a few
            thousandths, products of bytes one to three hundredths.
    """

    error_ratio: float = 1.5
    drift: float = 0.08
    kl: float = 0.25
    kernel_error: float = 0.1

    def passes(self, check: LayerCheck) -> bool:
        """Whether a layer is as the profile says. Not a number compares as false, and must not pass."""
        return (
            check.error_ratio <= self.error_ratio
            and check.drift <= self.drift
            and check.kernel_error <= self.kernel_error
        )


def worst(values: Iterable[float | None]) -> float | None:
    """The largest value, not a number if one of them is not; None if there are none."""
    known = [value for value in values if value is not None]
    return next((value for value in known if math.isnan(value)), max(known, default=None))


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
        num_engines: data-parallel ranks behind it.
        ask: calls a method of the workers on every rank of every engine.
        every_seconds: pause between two runs; 0: never; None: a minute, or longer where the canary would take more than
            :data:`SHARE` of the time.
        answered: when it last was, on the clock that never jumps.
        limits: what passes. The layers' figures see what the predictions hide: a layer of a large model may be noise and the
            answer still look right.
        profile: the active profile.
        layers: what was last found in each layer. A run whose prompt was cut into several steps finds nothing, and what was
            found before stands.
    """

    engine: Any
    num_engines: int
    ask: Any
    every_seconds: float | None
    limits: Limits
    profile: Profile | None = None
    state: Literal["off", "pending", "passed", "failed"] = "pending"
    message: str = "not run yet"
    time: float | None = None
    answered: float = 0.0
    runs: int = 0
    failures: int = 0
    verdict: Verdict | None = None
    layers: dict[int, LayerCheck] = field(default_factory=dict)
    _cost: float = 0.0
    _tokens: list[int] = field(default_factory=list)
    _exact: list[Predictions] = field(default_factory=list)
    _number: Any = field(default_factory=itertools.count)
    _ranks: int = 1
    _expected: Expectation | None = None

    def limits_of(self, layer: int) -> Limits:
        """What passes of a layer, on the canary's own tokens.

        Where the profile was made it was found out what it makes of them; a server that finds something else has another
        profile, another model, or broken kernels. Without, limits that sound profiles of broad text keep.
        """
        if self._expected is None:
            return self.limits
        ratio, drift = self._expected.of_layer(layer, self._ranks)
        return replace(self.limits, error_ratio=ratio * RATIO_SLACK, drift=drift + DRIFT_SLACK)

    @property
    def failing(self) -> dict[int, LayerCheck]:
        """The layers that do not pass."""
        return {layer: check for layer, check in self.layers.items() if not self.limits_of(layer).passes(check)}

    @property
    def worst_layer(self) -> int | None:
        """The layer whose error ratio is the largest part of its limit; None if none was looked at."""

        def used(layer: int) -> float:
            part = self.layers[layer].error_ratio / max(self.limits_of(layer).error_ratio, 1e-9)
            return math.inf if math.isnan(part) else part

        return max(self.layers, key=used, default=None)

    @property
    def pause(self) -> float:
        """Seconds between two runs."""
        return max(PAUSE_SECONDS, self._cost / SHARE) if self.every_seconds is None else self.every_seconds

    async def record(self) -> None:
        """Answer the prompt exactly, once per engine; before the server lets requests in."""
        config = self.engine.vllm_config
        if config.model_config.logprobs_mode.endswith("logits"):
            self.state, self.message = (
                "off",
                f"--logprobs-mode {config.model_config.logprobs_mode} gives no predictions",
            )
            return
        scheduler = config.scheduler_config
        budgets = (scheduler.max_num_batched_tokens, getattr(scheduler, "max_num_scheduled_tokens", None))
        most = min(MOST_TOKENS, config.model_config.max_model_len - 1, *(budget for budget in budgets if budget))
        self._tokens = self.engine.get_tokenizer().encode(TEXT)[:most]
        if len(self._tokens) <= FIRST_JUDGED:
            self.state, self.message = "off", f"prompts of {most} tokens are too short to judge by"
            return
        expected = self.profile.expectation if self.profile else None
        self._expected = expected if expected and expected.tokens == tokens_digest(self._tokens) else None
        await self.ask("spectral_answer_exactly", True)
        try:
            self._exact = [await self._answer(index) for index in range(self.num_engines)]
        finally:
            answered = await self.ask("spectral_answer_exactly", False)
        self._ranks = len(answered[0])
        if not all(all(ranks) for ranks in answered):
            # What was recorded is not exact, and must never be compared with.
            self._exact = []
            self.state, self.message = "failed", "the exact answer could not be recorded: its prompt was cut into steps"

    async def run(self, look: Callable[[], Awaitable[dict[int, LayerCheck]]]) -> None:
        """Answer the prompt from compressed pages and judge.

        Args:
            look: what was found in each layer since it was last asked; called before the answer and after it.
        """
        if not self._exact:
            return
        for _ in range(LOOKS):
            verdicts = await self._sing(look)
            # The answer is right, and a layer past its limits: workers know the canary by its length alone, and may have
            # looked at somebody else's prompt, for which the limits are not made. That one is not there every time.
            if not self.failing or not all(verdict.kl <= self.limits.kl for verdict in verdicts):
                break
        kl = worst(verdict.kl for verdict in verdicts)
        assert kl is not None
        self.verdict = Verdict(kl, min(verdict.top1 for verdict in verdicts))
        self.time, self.runs = time.time(), self.runs + 1
        self.answered = time.monotonic()
        reasons = list(self._reasons(verdicts, self.verdict))
        self.state = "failed" if reasons else "passed"
        self.failures += bool(reasons)
        self.message = "; ".join(reasons) or "answers as the exact cache does"

    async def _sing(self, look: Callable[[], Awaitable[dict[int, LayerCheck]]]) -> list[Verdict]:
        """Answer once on every rank, and look at the layers meanwhile."""
        await look()
        await self.ask("spectral_expect_canary", len(self._tokens))
        start = time.monotonic()
        try:
            verdicts = [compare(self._exact[index], await self._answer(index)) for index in range(self.num_engines)]
        finally:
            # Or another prompt of this length would be taken for it.
            await self.ask("spectral_expect_canary", 0)
        # Of the quickest run: the first has a cold process, later ones wait for others.
        self._cost = min(self._cost or math.inf, time.monotonic() - start)
        self.layers = await look() or self.layers
        return verdicts

    def _reasons(self, verdicts: Sequence[Verdict], verdict: Verdict) -> Iterator[str]:
        limits = self.limits
        if not verdict.kl <= limits.kl:
            off = [str(rank) for rank, one in enumerate(verdicts) if not one.kl <= limits.kl]
            whose = f" of data-parallel rank{'s' * (len(off) > 1)} {', '.join(off)}" if self.num_engines > 1 else ""
            yield f"predictions{whose} are {verdict.kl:.3f} nats from the exact cache's, the limit is {limits.kl:g}"
        bad = self.failing
        if bad:
            first = min(bad)
            check, most = bad[first], self.limits_of(first)
            yield (
                f"layer{'s' * (len(bad) > 1)} {', '.join(map(str, sorted(bad)))}: in layer {first} keys or values are stored "
                f"with {check.error_ratio:.2f} times the error that the profile's spectra predict (limit "
                f"{most.error_ratio:.2f}), have {check.drift:.1%} of their energy where the profile has less (limit "
                f"{most.drift:.1%}), and the kernels' attention is {check.kernel_error:.1%} off (limit "
                f"{most.kernel_error:.0%})"
            )

    async def _answer(self, engine_index: int) -> Predictions:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        top = self.engine.vllm_config.model_config.max_logprobs
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False,
            prompt_logprobs=TOP_TOKENS if top < 0 else min(TOP_TOKENS, top),
        )  # fmt: skip
        outputs = self.engine.generate(
            TokensPrompt(prompt_token_ids=self._tokens), params, f"{CANARY_PREFIX}{next(self._number)}",
            data_parallel_rank=engine_index if self.num_engines > 1 else None,
        )  # fmt: skip
        (final,) = [output async for output in outputs if output.finished]
        if final.prompt_logprobs is None:
            raise RuntimeError("the canary's request was aborted")
        return [
            {token: entry.logprob for token, entry in position.items()}
            for position in final.prompt_logprobs[FIRST_JUDGED:]
            if position is not None
        ]

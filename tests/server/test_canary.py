"""The canary's comparison."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm_spectral_server import canary as canary_module
from vllm_spectral_server.canary import RATIO_SLACK, SHARE, TOP_TOKENS, Canary, LayerCheck, Limits, compare, worst

from vllm_spectral.profile.schema import Expectation
from vllm_spectral.stats.canary import MOST_TOKENS, tokens_digest


def top(logits: torch.Tensor, count: int = TOP_TOKENS) -> dict[int, float]:
    values, index = logits.log_softmax(-1).topk(count)
    return dict(zip(index.tolist(), values.tolist(), strict=True))


def test_equal_predictions_agree() -> None:
    rows = [top(row) for row in torch.randn(5, 100)]
    verdict = compare(rows, rows)
    assert verdict.kl == pytest.approx(0, abs=1e-6)
    assert verdict.top1 == 1.0


@given(seed=st.integers(0, 1000), noise=st.floats(0.0, 5.0))
def test_the_divergence_is_a_lower_bound(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 200, generator=generator, dtype=torch.float64) * 3
    b = a + noise * torch.randn(4, 200, generator=generator, dtype=torch.float64)
    true = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
    found = compare([top(row) for row in a], [top(row) for row in b]).kl
    assert -1e-6 <= found <= float(true) + 1e-6


def test_other_tokens_altogether_are_far_apart() -> None:
    a = [{1: math.log(0.9), 2: math.log(0.09)}]
    b = [{3: math.log(0.9), 1: math.log(1e-6)}]
    verdict = compare(a, b)
    assert verdict.kl > 5
    assert verdict.top1 == 0.0


def test_not_a_number_is_no_agreement() -> None:
    verdict = compare([{1: -0.1, 2: -3.0}], [{1: math.nan, 2: math.nan}])
    assert not verdict.kl <= 0.25


def test_the_worst_is_not_hidden_by_what_is_no_number() -> None:
    assert worst([1.0, None, 3.0]) == 3.0
    assert worst([]) is None and worst([None]) is None
    assert math.isnan(worst([1.0, math.nan, 3.0]) or 0)


class Engine:
    """Answers every prompt with the same predictions, and remembers what the workers were asked."""

    def __init__(self, exactly: list[list[int]] | None = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answered: Callable[[], None] = lambda: None
        self._exactly = exactly or [[30]]
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=2048, max_logprobs=20, logprobs_mode="raw_logprobs"),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        )

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda text: list(range(200)))

    async def ask(self, method: str, *args: Any) -> Any:
        self.asked.append((method, *args))
        return self._exactly if method == "spectral_answer_exactly" else [[None]]

    async def generate(self, prompt: Any, *_args: Any, **_options: Any) -> Any:
        self.answered()
        position = {1: SimpleNamespace(logprob=-0.1), 2: SimpleNamespace(logprob=-3.0)}
        logprobs = [None, *[position] * (len(prompt["prompt_token_ids"]) - 1)]
        yield SimpleNamespace(finished=True, prompt_logprobs=logprobs)


SOUND, DAMAGED = LayerCheck(1.0, 0.01, 0.002), LayerCheck(3.0, 0.3, 0.002)


def sing(engine: Engine, *finds: dict[int, LayerCheck], profile: Any = None) -> Canary:
    """A canary recorded once and run once for each finding."""
    canary = Canary(engine, 1, engine.ask, 60.0, Limits(), profile)

    async def work() -> None:
        await canary.record()
        for found in finds:
            # Whatever is found is found again, however often it is looked for.
            answers = itertools.cycle([{}, found])

            async def look(answers: Any = answers) -> dict[int, LayerCheck]:
                return next(answers)  # type: ignore[no-any-return]

            await canary.run(look)

    asyncio.run(work())
    return canary


def test_sound_layers_pass_and_damaged_ones_do_not() -> None:
    assert sing(Engine(), {0: SOUND, 1: SOUND}).state == "passed"
    failed = sing(Engine(), {0: SOUND, 1: DAMAGED})
    assert failed.state == "failed" and failed.message.startswith("layer 1:")
    assert sing(Engine(), {0: LayerCheck(math.nan, 0.0, 0.0)}).state == "failed"
    assert sing(Engine(), {0: LayerCheck(1.0, 0.0, 0.5)}).state == "failed", "kernels that do not do what they should"


def expecting(ratio: float, drift: float, ids: Sequence[int]) -> Any:
    """A profile that says this of its two layers, on those tokens."""
    figures = torch.tensor([ratio, ratio - 0.1, drift, drift / 2]).expand(2, 3, 4)
    return SimpleNamespace(expectation=Expectation(tokens_digest(ids), figures))


def test_a_layer_is_held_against_what_its_profile_says_of_the_canary() -> None:
    """A profile of one kind of text stores the canary badly, and nothing is wrong; of a good one even a little is."""
    ids = range(MOST_TOKENS)
    narrow, broad = expecting(2.1, 0.15, ids), expecting(1.05, 0.02, ids)
    found = LayerCheck(2.12, 0.155, 0.002)
    assert sing(Engine(), {0: found}).state == "failed"
    assert sing(Engine(), {0: found}, profile=narrow).state == "passed"
    assert sing(Engine(), {0: LayerCheck(2.4, 0.155, 0.002)}, profile=narrow).state == "failed"
    # The values' basis transposed in the layer of the demo model where it matters least.
    least = LayerCheck(1.24, 0.066, 0.002)
    assert sing(Engine(), {1: least}).state == "passed"
    failed = sing(Engine(), {0: SOUND, 1: least}, profile=broad)
    assert failed.state == "failed" and failed.message.startswith("layer 1:")
    assert failed.worst_layer == 1
    assert failed.limits_of(1).error_ratio == pytest.approx(1.05 * RATIO_SLACK)
    other = expecting(2.1, 0.15, range(7))
    assert sing(Engine(), {0: found}, profile=other).state == "failed", "figures of other tokens say nothing"


def test_a_run_that_could_not_look_does_not_heal() -> None:
    """Under load the prompt is cut into steps, and the layers are not seen; the damage is still there."""
    assert sing(Engine(), {1: DAMAGED}, {}).state == "failed"
    assert sing(Engine(), {1: DAMAGED}, {1: SOUND}).state == "passed"


def test_somebody_elses_prompt_of_its_length_is_no_failure() -> None:
    """Workers tell the canary by its length: what they saw of another prompt is not there when they look again."""
    finds = iter([{}, {0: DAMAGED}, {}, {0: SOUND}])
    engine = Engine()
    canary = Canary(engine, 1, engine.ask, 60.0, Limits())

    async def look() -> dict[int, LayerCheck]:
        return next(finds)

    async def work() -> None:
        await canary.record()
        await canary.run(look)

    asyncio.run(work())
    assert (canary.state, canary.runs, canary.failures) == ("passed", 1, 0)
    assert not list(finds)


def test_a_reference_that_is_not_exact_is_never_compared_with() -> None:
    canary = sing(Engine(exactly=[[0]]), {0: SOUND})
    assert (canary.state, canary.runs) == ("failed", 0)
    assert "could not be recorded" in canary.message


def test_the_rank_that_is_off_is_named() -> None:
    """One of two data-parallel ranks answers otherwise than it did; the other must not hide it."""

    class TwoRanks(Engine):
        changed = False

        async def generate(self, prompt: Any, *_args: Any, **options: Any) -> Any:
            first = -5.0 if self.changed and options["data_parallel_rank"] == 1 else -0.1
            position = {1: SimpleNamespace(logprob=first), 2: SimpleNamespace(logprob=-3.0)}
            yield SimpleNamespace(
                finished=True, prompt_logprobs=[None, *[position] * (len(prompt["prompt_token_ids"]) - 1)]
            )

    engine = TwoRanks(exactly=[[30], [30]])
    canary = Canary(engine, 2, engine.ask, 60.0, Limits())

    async def look() -> dict[int, LayerCheck]:
        return {0: SOUND}

    async def work() -> None:
        await canary.record()
        await canary.run(look)
        assert canary.state == "passed"
        engine.changed = True
        await canary.run(look)

    asyncio.run(work())
    assert canary.state == "failed"
    assert canary.message.startswith("predictions of data-parallel rank 1 are")


def test_the_pause_is_by_the_quickest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run in a cold process is slow, and so is one that waits behind others."""
    clock = 0.0
    monkeypatch.setattr(canary_module, "time", SimpleNamespace(monotonic=lambda: clock, time=lambda: clock))
    engine, pauses = Engine(), []

    async def nothing() -> dict[int, LayerCheck]:
        return {}

    async def work() -> None:
        canary = Canary(engine, 1, engine.ask, None, Limits())
        pauses.append(canary.pause)
        await canary.record()
        for seconds in (0.9, 0.3, 2.0, 0.01):

            def take(seconds: float = seconds) -> None:
                nonlocal clock
                clock += seconds

            engine.answered = take
            await canary.run(nothing)
            pauses.append(canary.pause)

    asyncio.run(work())
    assert pauses == pytest.approx([60, 0.9 / SHARE, 0.3 / SHARE, 0.3 / SHARE, 60])


def test_the_workers_stop_waiting_for_the_canary() -> None:
    engine = Engine()
    sing(engine, {0: SOUND})
    assert [args for method, *args in engine.asked if method == "spectral_expect_canary"] == [[MOST_TOKENS], [0]]
    engine = Engine()

    def fall_ill() -> None:
        raise RuntimeError

    canary = Canary(engine, 1, engine.ask, 60.0, Limits())

    async def work() -> None:
        await canary.record()
        engine.answered = fall_ill
        await canary.run(lambda: engine.ask("look"))

    with pytest.raises(RuntimeError):
        asyncio.run(work())
    assert engine.asked[-1] == ("spectral_expect_canary", 0)

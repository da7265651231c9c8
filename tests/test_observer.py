"""Which steps are sampled, and that watching cannot break what is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import DIM
from vllm_spectral.backend.observer import PRIOR_TOKENS, LayerObserver, Observer, Watch
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.rotation import channel_energy
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.moments import LayerMoments


def lens(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def observer(layer: LayerProfile) -> Observer:
    codec = layer.codec(64, Codebooks(normal_codebooks()))
    watching = Observer(10)
    for number in range(3):
        LayerObserver(watching, number, codec, None, None, DIM**-0.5)
    return watching


def test_about_one_step_in_ten_is_sampled_and_layers_take_turns(observer: Observer) -> None:
    found = [watch for _ in range(3000) if (watch := observer.step(lens(20), lens(20), None))]
    assert 240 < len(found) < 360
    assert len({tuple(w.layer for w in found[i : i + 3]) for i in range(0, 30, 3)}) == 1
    assert observer.sampled_steps == len(found)


def test_the_moments_are_counted_where_steps_are_sampled(layer: LayerProfile) -> None:
    codec = layer.codec(64, Codebooks(normal_codebooks()))
    heads = codec.layout.num_heads
    sums = 3 * 8 * (heads * DIM * DIM + heads * DIM)
    assert LayerObserver(Observer(10), 0, codec, None, None, DIM**-0.5).resident_bytes == sums
    assert LayerObserver(Observer(0), 0, codec, None, None, DIM**-0.5).resident_bytes == 0


def test_ranks_choose_alike(layer: LayerProfile) -> None:
    codec = layer.codec(64, Codebooks(normal_codebooks()))
    chosen = []
    for _ in range(2):
        watching = Observer(7)
        for number in range(3):
            LayerObserver(watching, number, codec, None, None, DIM**-0.5)
        chosen.append([watching.step(lens(20, 9, 12), lens(20, 9, 40), None) for _ in range(200)])
    assert chosen[0] == chosen[1]


def test_a_step_with_too_few_exact_tokens_leaves_it_to_the_next(observer: Observer) -> None:
    assert not any(observer.step(lens(1, 1), lens(500, 600), None) for _ in range(100))
    assert observer.step(lens(1, 30), lens(500, 30), None) == Watch(1, 1, False)


def test_zero_means_none(observer: Observer) -> None:
    observer.every = 0
    assert not any(observer.step(lens(20), lens(20), None) for _ in range(1000))


def test_the_canary_is_a_whole_prompt_of_its_length_while_it_is_expected(observer: Observer) -> None:
    observer.every = 0
    observer.expect(200)
    assert observer.step(lens(200), lens(300), None) is None, "the second part of a longer one"
    assert observer.step(lens(5, 200), lens(5, 200), None) == Watch(1, None, True)
    assert observer.step(lens(200), lens(200), None) is None, "once"
    observer.expect(200)
    observer.expect(0)
    assert observer.step(lens(200), lens(200), None) is None, "somebody else's prompt"


def test_a_failing_probe_is_switched_off_and_told(observer: Observer) -> None:
    seen = observer.layers[0]
    nonsense: Any = torch.zeros(1)
    seen.see(Watch(0, None, False), nonsense, nonsense, nonsense, nonsense, nonsense, None)
    assert observer.every == 0
    assert observer.report()["failure"].startswith("sampling failed in layer 0")


def test_what_traffic_did_not_use_keeps_what_the_profile_said_of_it(layer: LayerProfile) -> None:
    codec = layer.codec(64, Codebooks(normal_codebooks()))
    seen = LayerObserver(Observer(10), 0, codec, None, None, DIM**-0.5)
    heads = codec.layout.num_heads
    # All traffic along one direction: alone, it would leave every other channel without bits.
    narrow = torch.ones(3000, heads, DIM)
    seen.moments.add(narrow, narrow, narrow, torch.arange(3000) + 4)
    told = LayerMoments.from_tensors(seen.with_prior().to_tensors())
    assert told.num_measured == seen.moments.num_tokens == 3000
    assert torch.equal(seen.moments.keys, 3000 * torch.ones_like(seen.moments.keys)), "the live sums are as they were"
    for coding, moment in ((codec.keys, told.keys), (codec.values, told.values)):
        energy = channel_energy(moment - seen.moments.keys, coding.basis)
        torch.testing.assert_close(energy, PRIOR_TOKENS * coding.width.double().square(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(told.value_sum / told.num_tokens, torch.ones_like(told.value_sum))

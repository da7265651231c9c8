"""Watching live steps: which are sampled, and what is kept of them. Sums and figures only, never tokens."""

from __future__ import annotations

import copy
import math
import random
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_spectral.backend.exact_tier import LayerCopies
from vllm_spectral.backend.layers import positions_of
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.codec.rotation import second_moment, unrotate
from vllm_spectral.exact.directory import StepPlan
from vllm_spectral.kernels.interface import Bounds, LayerKernels, Requests
from vllm_spectral.stats.drift import Yardstick
from vllm_spectral.stats.moments import LayerMoments
from vllm_spectral.stats.probe import MOST_TOKENS, Probe, probe

if TYPE_CHECKING:
    from vllm_spectral.backend.metadata import SpectralMetadata

logger = init_logger("vllm.spectral")

LEAST_TOKENS = 8
"""A probe of fewer tokens says nothing: without an exact tier a decode step has no more than its own."""
HISTORY = 4000
"""Probes kept until they are asked for."""
RECENT_PROBES = 16
"""Weight of the past in the means: about so many probes of a layer."""
PRIOR_TOKENS = 16384
"""Tokens that the served profile counts for in what a new one is made of, beside those seen: at least as many, so that
what else was served before is served well still."""
PRIOR_SINKS = 32
"""First tokens that the profile's typical one counts for, beside those seen."""
RECENT_TOKENS = 16384
"""Tokens in the live moments; beyond, what is older counts half."""


@dataclass(frozen=True)
class Watch:
    """What is sampled in one step.

    Attributes:
        request: place in the batch of the request that is probed.
        layer: number of the layer that is probed; None: all.
        canary: whether it is the canary's prompt, which is not traffic.
    """

    request: int
    layer: int | None
    canary: bool


class Observer:
    """Chooses the steps to sample; one per worker, shared by its layers.

    All tensor-parallel ranks run the same steps and choose the same ones.

    Args:
        every: one step in so many, about; 0: none but the canary's.

    Attributes:
        layers: the compressed layers.
        sampled_steps: so far, without the canary's.
        seconds: that sampling took.
        exact: whether whole prompts are answered as by an exact cache.
        exact_requests: how many (request, layer) pairs were.
        failure: why sampling was switched off, or None.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.layers: list[LayerObserver] = []
        self.sampled_steps = 0
        self.seconds = 0.0
        self.exact = False
        self.exact_requests = 0
        self.failure: str | None = None
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._random = random.Random(0)
        self._turn = 0
        self._canary_tokens = 0
        self._left = self._interval()

    def _interval(self) -> int:
        # Not every n-th: steps may have a rhythm of their own.
        return self._random.randint(self.every - self.every // 2, self.every + self.every // 2) if self.every else 0

    def fail(self, reason: str) -> None:
        """Stop sampling; the reason is in every report from now on."""
        self.every, self.failure = 0, reason

    def expect(self, num_tokens: int) -> None:
        """Probe all layers in the next step that prefills a whole prompt of this length, the canary's; 0: no more."""
        self._canary_tokens = num_tokens

    def step(self, query_lens: Tensor, context_lens: Tensor, plan: StepPlan | None) -> Watch | None:
        """What is to be sampled in a step.

        Args:
            query_lens, context_lens: ``[num_requests]`` int, tokens of the step, and with all before them.
            plan: the exact tier's, or None without a tier.
        """
        if self._canary_tokens:
            whole = ((query_lens == self._canary_tokens) & (context_lens == self._canary_tokens)).nonzero()
            if len(whole):
                self._canary_tokens = 0
                return Watch(int(whole[0]), None, True)
        if not self.every or not self.layers:
            return None
        self._left -= 1
        if self._left > 0:
            return None
        # Exactly at hand are a request's tokens of this step and its copies.
        at_hand = query_lens if plan is None else query_lens + (plan.rows >= 0).sum(1)
        eligible = ((query_lens > 0) & (at_hand >= LEAST_TOKENS)).nonzero()[:, 0].tolist()
        if not eligible:
            return None  # the next step will do
        self._left = self._interval()
        self.sampled_steps += 1
        self._turn = (self._turn + 1) % len(self.layers)
        return Watch(self._random.choice(eligible), self.layers[self._turn].layer, False)

    def record(self, layer: int, canary: bool, result: Probe) -> None:
        """Keep a probe."""
        self._history.append({"time": time.time(), "layer": layer, "canary": canary, **result.to_wire()})

    def report(self) -> dict[str, Any]:
        """Plain values: the state of every layer, and the probes since the last report."""
        new = list(self._history)
        self._history.clear()
        return {
            "every": self.every,
            "failure": self.failure,
            "sampled_steps": self.sampled_steps,
            "seconds": self.seconds,
            "layers": [layer.report() for layer in self.layers],
            "history": new,
        }


class LayerObserver:
    """One layer's part.

    Args:
        observer: the worker's.
        layer: the layer's number.
        codec, copies, kernels: the layer's.
        scale: factor of its scores.

    Attributes:
        moments: of live traffic.
        resident_bytes: what they take; none where no step is sampled.
    """

    def __init__(
        self,
        observer: Observer,
        layer: int,
        codec: LayerCodec,
        copies: LayerCopies | None,
        kernels: LayerKernels | None,
        scale: float,
    ) -> None:
        self.observer = observer
        self.layer = layer
        self.moments = LayerMoments(codec.layout.num_heads, codec.layout.head_dim)
        self.resident_bytes = self.moments.occupy() if observer.every else 0
        self._codec = codec
        self._yardstick = Yardstick(codec)
        self._copies = copies
        self._kernels = kernels
        self._scale = scale
        self._samples = 0
        self._time: float | None = None
        self._means: dict[str, float] = {}
        self._drift: tuple[float, float] | None = None
        observer.layers.append(self)

    def see(
        self,
        watch: Watch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: SpectralMetadata,
        plan: StepPlan | None,
    ) -> None:
        """Sample a step that was stored and attended to already; arguments as the implementation's ``forward``."""
        start = time.perf_counter()
        try:
            if not watch.canary:
                self._gather(query, key, value, metadata)
            if watch.layer in (None, self.layer):
                self._keep(watch, self._probe(watch.request, query, key, value, kv_cache, metadata, plan))
        except Exception as error:
            # Whoever watches must not break what is watched.
            logger.exception("sampling failed in layer %d and is switched off", self.layer)
            self.observer.fail(f"sampling failed in layer {self.layer}: {error}")
        self.observer.seconds += time.perf_counter() - start

    def _keep(self, watch: Watch, result: Probe | None) -> None:
        if result is None:
            return
        self.observer.record(self.layer, watch.canary, result)
        if not watch.canary:
            self._count(result)

    def _gather(self, query: Tensor, key: Tensor, value: Tensor, metadata: SpectralMetadata) -> None:
        if self.moments.num_tokens > RECENT_TOKENS:
            self.moments.halve()
        count = metadata.num_actual_tokens
        self.moments.add(query[:count], key[:count], value[:count], positions_of(metadata))
        self._drift = None

    def _probe(
        self,
        request: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: SpectralMetadata,
        plan: StepPlan | None,
    ) -> Probe | None:
        first, stop = metadata.query_start_loc[request : request + 2].tolist()
        context_len, block_size = int(metadata.seq_lens[request]), kv_cache.shape[2]
        keys, values = key[first:stop], value[first:stop]
        positions = torch.arange(context_len - (stop - first), context_len)
        if stop - first < MOST_TOKENS and self._copies is not None and plan is not None:
            at_hand = self._copies.read(plan, request, context_len, keys, values)
            # The run of neighbours that ends with the newest token: pages can attend to exactly these.
            gaps = (at_hand.positions.diff() != 1).nonzero()
            run = slice(int(gaps[-1]) + 1 if len(gaps) else 0, None)
            positions, keys, values = at_hand.positions[run], at_hand.keys[run], at_hand.values[run]
        positions, keys, values = (t[-MOST_TOKENS:] for t in (positions, keys, values))
        if len(positions) < LEAST_TOKENS:
            return None
        start = int(positions[0])
        blocks = metadata.block_table[request, start // block_size : -(-context_len // block_size)]
        slots = self._codec.layout.read(kv_cache, blocks)[start % block_size :][: len(positions)]
        newest = query[stop - 1 : stop]
        served = None
        if self._kernels is not None:
            served = torch.empty_like(newest)
            alone = Requests(
                metadata.block_table[request : request + 1].contiguous(),
                torch.tensor([0, 1], dtype=torch.int32),
                metadata.seq_lens[request : request + 1].contiguous(),
                bounds=Bounds(1, context_len),
            )
            self._kernels.attend(
                newest, keys[-1:], values[-1:], kv_cache, alone, served, self._scale, window=len(positions)
            )  # fmt: skip
            served = served[0]
        return probe(newest[0], keys, values, slots, positions, self._codec, self._scale, served)

    def _count(self, result: Probe) -> None:
        self._samples += 1
        self._time = time.time()
        weight = 1 / min(self._samples, RECENT_PROBES)
        if not all(map(math.isfinite, result.to_wire().values())):
            # The mean would never be a number again; the probe itself is in the history, and the next ones will say.
            self._means = result.to_wire()
            return
        if not all(map(math.isfinite, self._means.values())):
            self._means = {}
        for name, value in result.to_wire().items():
            self._means[name] = self._means.get(name, 0.0) * (1 - weight) + value * weight

    def with_prior(self) -> LayerMoments:
        """The live moments, and beside them what the served profile says of :data:`PRIOR_TOKENS` more and of first tokens.

        Few steps are sampled, of few requests: channels that these hardly used would get no bits, and the next request may
        use them. And few sampled steps begin a request; what attention does to a first token is the model's doing, not the
        text's.
        """
        moments, found = copy.copy(self.moments), self.moments.num_tokens
        keys, values = self._codec.keys, self._codec.values
        moments.num_tokens += PRIOR_TOKENS
        moments.num_prior = PRIOR_TOKENS
        moments.keys = moments.keys + PRIOR_TOKENS * second_moment(keys.basis, keys.width.square())
        moments.values = moments.values + PRIOR_TOKENS * second_moment(values.basis, values.width.square())
        # A profile has no means: the live ones stand for all.
        moments.value_sum = moments.value_sum * (1 + PRIOR_TOKENS / max(found, 1))
        moments.num_sinks += PRIOR_SINKS
        moments.key_sink = moments.key_sink + PRIOR_SINKS * unrotate(keys.center, keys.basis).double()
        moments.value_sink = moments.value_sink + PRIOR_SINKS * unrotate(values.center, values.basis).double()
        return moments

    def report(self) -> dict[str, Any]:
        """Plain values; drift as of now."""
        if self._drift is None and self.moments.num_tokens:
            found = self._yardstick.drift(self.moments)
            self._drift = (found.keys, found.values)
            if not all(map(math.isfinite, self._drift)):
                # Told once; the sums would never be numbers again.
                self.moments = LayerMoments(*self.moments.value_sum.shape)
        key_drift, value_drift = self._drift or (None, None)
        return {
            "layer": self.layer,
            "samples": self._samples,
            "time": self._time,
            "means": dict(self._means),
            "key_drift": key_drift,
            "value_drift": value_drift,
            "moment_tokens": self.moments.num_tokens,
        }


def moments_of(layers: Iterable[LayerObserver]) -> dict[str, Tensor]:
    """Live moments of all layers by ``layer.name``, for a file."""
    return {f"{each.layer}.{name}": t for each in layers for name, t in each.with_prior().to_tensors().items()}

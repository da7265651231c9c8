"""How many GPUs hold a load's KV cache, read it fast enough and compute it: arithmetic over the package's own sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_spectral.calibration.presets import PRESETS
from vllm_spectral.codec.attention import workspace_bytes
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.exact.window import ExactWindow, copy_bytes, default_pool_bytes, group_tokens
from vllm_spectral.models.decoder import Decoder, Geometry
from vllm_spectral.models.examples import EXAMPLES
from vllm_spectral.stats.memory import BF16_BYTES

BLOCK_TOKENS = 32
PROFILE_BYTES = (11.4, 688.0)
"""Resident bytes of a profile per layer and KV head: so many per entry of a head_dim x head_dim matrix (bases) and so many
per channel (tables, and what the kernels keep). The CPU's; a test compares them with the codec's own count. Without the
moments of live traffic, which only a CPU's server keeps."""
PARAMETERS = {"SmolLM2-135M-Instruct": 0.1345e9, "Llama-3.1-8B": 8.03e9, "Qwen3-8B": 8.19e9, "Llama-3.1-70B": 70.6e9}
"""From the models' cards."""


@dataclass(frozen=True)
class Accelerator:
    """Data-sheet figures: bytes of memory, bytes per second, dense bf16 operations per second."""

    name: str
    memory: float
    bandwidth: float
    flops: float


ACCELERATORS = {
    each.name: each
    for each in (
        Accelerator("A100-80GB", 80e9, 2.039e12, 312e12),
        Accelerator("H100-80GB", 80e9, 3.35e12, 989e12),
        Accelerator("H200-141GB", 141e9, 4.8e12, 989e12),
        Accelerator("L40S-48GB", 48e9, 0.864e12, 362e12),
    )
}


@dataclass(frozen=True)
class Model:
    """A model: sizes of its cache, and how many parameters are read and multiplied for each token."""

    name: str
    geometry: Geometry
    parameters: float

    @classmethod
    def named(cls, name: str) -> Model:
        """One of :data:`PARAMETERS`."""
        return cls(name, Decoder(EXAMPLES[name]).geometry(), PARAMETERS[name])

    @property
    def bf16_token_bytes(self) -> int:
        """Bytes of a token in a bf16 cache."""
        return self.geometry.num_layers * copy_bytes(self.geometry.num_kv_heads, self.geometry.head_dim)


def profile_bytes(model: Model) -> float:
    """Resident bytes of a model's profile, over all ranks that share its heads."""
    shape, (entry, channel) = model.geometry, PROFILE_BYTES
    return shape.num_layers * shape.num_kv_heads * shape.head_dim * (shape.head_dim * entry + channel)


@dataclass(frozen=True)
class Cache:
    """A way to store keys and values.

    Attributes:
        name: for tables.
        bits: per element, scales included; 16 and 8 are vLLM's own.
        exact: whether first and recent tokens are kept exactly beside the pages, as vllm-spectral does.
    """

    name: str
    bits: float
    exact: bool = False

    def token_bytes(self, model: Model) -> float:
        """Page bytes of a token, all layers."""
        if not self.exact:
            return model.bf16_token_bytes * self.bits / (8 * BF16_BYTES)
        shape = model.geometry
        return float(shape.num_layers * shape.num_kv_heads * slot_bytes_for(self.bits, shape.head_dim))

    def tokens_in(self, memory: float, model: Model, ranks: int = 1, max_requests: int = 256) -> float:
        """Tokens that so much memory holds, what is resident beside the pages taken out of it.

        Args:
            memory: bytes for the cache, of all ranks.
            model: whose cache it is.
            ranks: tensor-parallel ranks; each has a workspace, and together they have one profile.
            max_requests: requests that run at once, vLLM's ``--max-num-seqs``.
        """
        if self.exact:
            shape, size = model.geometry, group_tokens(BLOCK_TOKENS)
            window = ExactWindow().entries_per_request(size) * size * model.bf16_token_bytes
            memory -= default_pool_bytes(int(memory), window, max_requests)
            memory -= ranks * workspace_bytes(shape.num_query_heads, shape.num_kv_heads, shape.head_dim)
            memory -= profile_bytes(model)
        return max(memory, 0.0) / self.token_bytes(model)

    def bytes_read(self, tokens: float, model: Model) -> float:
        """Bytes that attention reads in one step of a request with so many tokens."""
        exact = min(ExactWindow().first + ExactWindow().recent, tokens) if self.exact else 0
        return (tokens - exact) * self.token_bytes(model) + exact * model.bf16_token_bytes


CACHES = (
    Cache("bf16", 16.0),
    Cache("fp8", 8.0),
    *(Cache(f"`{name}`", PRESETS[name].bits, exact=True) for name in ("quality", "balanced", "compact")),
)


@dataclass(frozen=True)
class Load:
    """What users do in the busiest hour.

    Attributes:
        name: for plots.
        summary: for tables.
        active: share of all users who are there.
        requests: of each of them in that hour.
        prompt: tokens of a request.
        answer: tokens that are answered.
        hits: share of the prompt that is found in the prefix cache, if the conversation is still there.
        kept: seconds for which it then stays there after an answer, until the next request.
        speed: tokens per second that every user is to see.
        first_token: seconds until the first.
    """

    name: str
    summary: str
    prompt: int
    answer: int
    hits: float = 0.0
    kept: float = 0.0
    active: float = 0.05
    requests: float = 12.0
    speed: float = 25.0
    first_token: float = 1.0

    @property
    def context(self) -> float:
        """Tokens that a request holds, on average over its answer."""
        return self.prompt + self.answer / 2

    def rate(self, users: float) -> float:
        """Requests per second."""
        return users * self.active * self.requests / 3600

    def decoding(self, users: float) -> float:
        """Requests that are being answered at a moment (Little's law)."""
        return self.rate(users) * self.answer / self.speed

    def held(self, users: float, kept: float) -> float:
        """Tokens in the cache at a moment, if so large a share of the conversations is kept."""
        return self.rate(users) * (self.answer / self.speed + self.first_token + kept * self.kept) * self.context


LOADS = {
    "chat": Load("chat", "2,000 tokens asked, 300 answered, nothing asked again", 2000, 300),
    "conversations": Load(
        "conversations",
        "2,000 tokens asked, 300 answered, the next request 60 s later, 80 % of it prefix hits if kept",
        2000, 300, hits=0.8, kept=60.0,
    ),
    "documents": Load("documents", "16,000 tokens asked, 500 answered, nothing asked again", 16000, 500),
    "agents": Load(
        "agents",
        "40,000 tokens asked, 400 answered, the next request 30 s later, 95 % of it prefix hits if kept",
        40000, 400, hits=0.95, kept=30.0, requests=60.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a replica is made of, and what of it can be used.

    Attributes:
        accelerator: the device.
        memory_share: of its memory, vLLM's ``--gpu-memory-utilization``.
        reserve: bytes per device for activations and the like.
        weight_bits: bits of a weight.
        bandwidth_share: of the data sheet's bandwidth that a decode step reaches.
        flops_share: of the data sheet's operations that prefill reaches.
        kernel_share: bandwidth that reading compressed pages reaches, over that of bf16 pages. An assumption: no GPU kernel
            of this project has been timed.
    """

    accelerator: Accelerator
    memory_share: float = 0.9
    reserve: float = 4e9
    weight_bits: float = 16.0
    bandwidth_share: float = 0.7
    flops_share: float = 0.4
    kernel_share: float = 0.6

    def weight_bytes(self, model: Model) -> float:
        """Bytes of the weights."""
        return model.parameters * self.weight_bits / 8

    def ranks(self, model: Model, load: Load) -> int:
        """Fewest devices, a power of two, that hold the weights and as much again as a tenth of them, and read them in time.

        Raises:
            ValueError: if eight cannot.
        """
        for ranks in (1, 2, 4, 8):
            memory = self.cache_memory(model, ranks)
            in_time = self.weight_bytes(model) * load.speed < 0.8 * self._bandwidth(ranks)
            if memory > 0.1 * self.weight_bytes(model) and in_time:
                return ranks
        raise ValueError(
            f"{model.name} does not run on eight {self.accelerator.name} at {load.speed:g} tokens per second"
        )

    def cache_memory(self, model: Model, ranks: int) -> float:
        """Bytes for the cache on one replica."""
        return ranks * (self.accelerator.memory * self.memory_share - self.reserve) - self.weight_bytes(model)

    def _bandwidth(self, ranks: int) -> float:
        return ranks * self.accelerator.bandwidth * self.bandwidth_share

    def bandwidth_for_cache(self, model: Model, load: Load, ranks: int) -> float:
        """Bytes per second that are left for the cache where every step, ``load.speed`` a second, reads all weights."""
        return self._bandwidth(ranks) - self.weight_bytes(model) * load.speed

    def flops(self, ranks: int) -> float:
        """Operations per second."""
        return ranks * self.accelerator.flops * self.flops_share


@dataclass(frozen=True)
class Need:
    """Replicas by each bound, not rounded; the devices of a replica; the share of conversations that are kept."""

    memory: float
    bandwidth: float
    compute: float
    ranks: int
    kept: float

    @property
    def most(self) -> float:
        """What the largest bound asks for."""
        return max(self.memory, self.bandwidth, self.compute)

    @property
    def gpus(self) -> int:
        """Devices, of whole replicas."""
        return max(math.ceil(self.most - 1e-9), 1) * self.ranks

    @property
    def binds(self) -> str:
        """What asks for them. Where some conversations are kept and some are not, memory and compute do, in balance."""
        if self.most <= 1:
            return "one replica"
        if 0 < self.kept < 1 and self.bandwidth < self.most:
            return "memory, compute"
        return max(("memory", "bandwidth", "compute"), key=lambda name: getattr(self, name))


def need(users: float, load: Load, model: Model, cache: Cache, machine: Machine) -> Need:
    """What a load needs with a cache.

    As many conversations are kept for their prefix hits as it takes to need the fewest replicas: what is not kept has to be
    computed again.
    """
    ranks, shape = machine.ranks(model, load), model.geometry
    room = cache.tokens_in(machine.cache_memory(model, ranks), model, ranks)
    share = machine.kernel_share if cache.exact else 1.0
    reading = load.decoding(users) * load.speed * cache.bytes_read(load.context, model) / share
    bandwidth = reading / machine.bandwidth_for_cache(model, load, ranks)
    # Two operations per parameter and token, and per pair of tokens four per channel of every query head.
    attention = 4 * shape.num_layers * shape.num_query_heads * shape.head_dim
    answer = load.answer * (2 * model.parameters + attention * load.context)

    def prompt(hits: float) -> float:
        fresh = load.prompt * (1 - hits)
        return fresh * (2 * model.parameters + attention * (load.prompt - fresh / 2))

    def keeping(kept: float) -> Need:
        work = kept * prompt(load.hits) + (1 - kept) * prompt(0.0) + answer
        compute = load.rate(users) * work / machine.flops(ranks)
        return Need(load.held(users, kept) / room, bandwidth, compute, ranks, kept)

    none, all_ = keeping(0.0), keeping(1.0)
    # Memory grows with what is kept and compute falls, both linearly: they cross at most once.
    slope = all_.memory - none.memory + none.compute - all_.compute
    crossing = (none.compute - none.memory) / slope if slope else 0.0
    return min((none, all_, keeping(min(max(crossing, 0.0), 1.0))), key=lambda each: each.most)


def at_once(memory: float, context: float, model: Model, cache: Cache, max_requests: int = 256) -> float:
    """Requests of so many tokens that a cache of so many bytes holds."""
    return cache.tokens_in(memory, model, max_requests=max_requests) / context

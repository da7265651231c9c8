"""Bodies of our routes. Sizes are bytes, times are seconds since the epoch, shares are between 0 and 1."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ProfileIdentity(BaseModel):
    """Which profile is active."""

    digest: str = Field(description="SHA-256 over the profile's content")
    name: str


class LayerCost(BaseModel):
    """One attention layer on one rank."""

    name: str
    slot_bytes: int = Field(description="bytes per token and KV head, keys and values together")
    key_bits: float = Field(description="mean stored bits per key element, scale included")
    value_bits: float = Field(description="mean stored bits per value element, scale included")
    compressed: bool
    page_bytes: int = Field(description="the layer's page tensor")
    exact_tier_bytes: int = Field(description="the layer's exact copies")
    static_bytes: int = Field(description="bases, spectra and tables held resident, and the moments of live traffic")


class RankMemory(BaseModel):
    """What one worker process keeps resident for the cache."""

    data_parallel_rank: int
    tensor_parallel_rank: int
    pool_bytes: int = Field(description="the sum of its layers' page tensors")
    allocated_bytes: int = Field(description="what vLLM says it allocated for pages on this rank; equals pool_bytes")
    resident_page_bytes: int = Field(
        description="the part of pool_bytes that the kernel holds in memory: pages that were ever written"
    )
    exact_tier_bytes: int
    workspace_bytes: int
    profile_bytes: int
    process_bytes: int = Field(description="resident memory of the whole process, weights included, from the kernel")
    layers: list[LayerCost]


class CacheMemory(BaseModel):
    """What the KV cache costs. Sizes are bytes over all layers and ranks, measured from the allocated tensors."""

    model: str
    profile: ProfileIdentity | None = Field(description="null if the stock cache is served")
    kernels: str = Field(
        description="what attends to the pages: an instruction set, or reference; empty for the stock cache"
    )
    num_blocks: int
    block_size_tokens: int
    pool_bytes: int = Field(description="all pages: used_bytes + cached_bytes + free_bytes")
    used_bytes: int = Field(description="pages held by requests")
    cached_bytes: int = Field(description="pages held by no request whose content still serves prefix hits")
    free_bytes: int = Field(description="pages that hold nothing, vLLM's one null page among them")
    used_tokens: int = Field(description="token slots in the used pages")
    cached_tokens: int = Field(description="token slots in the cached pages")
    capacity_tokens: int = Field(description="tokens the pages hold; what vLLM logs and schedules with")
    uncompressed_capacity_tokens: int = Field(
        description="tokens that bf16 pages would hold in pool_bytes + exact_tier_bytes"
    )
    fp8_capacity_tokens: int = Field(description="tokens that vLLM's fp8 pages would hold in the same bytes")
    bytes_per_token: int
    uncompressed_bytes_per_token: int = Field(description="the same in bf16")
    compression_ratio: float = Field(description="uncompressed_bytes_per_token / bytes_per_token")
    exact_tier_bytes: int = Field(
        description="pool of exact copies of first and recent tokens, taken out of the memory given for the cache"
    )
    exact_tier_used_bytes: int = Field(description="the part of it that is assigned to tokens")
    workspace_bytes: int = Field(description="scratch of the attention kernels, shared by all layers")
    profile_bytes: int = Field(description="bases, spectra and tables held resident, and the moments of live traffic")
    resident_bytes: int = Field(description="pool_bytes + exact_tier_bytes + workspace_bytes + profile_bytes")
    effective_compression_ratio: float = Field(description="bf16 bytes of a full cache over resident_bytes")
    effective_bits_per_element: float = Field(description="16 / effective_compression_ratio")
    layers: list[LayerCost] = Field(description="as the first rank sees them; all ranks have the same sizes")
    ranks: list[RankMemory]


class LayerFidelity(BaseModel):
    """One layer's sampled attention, over what the exact keys and values would have given; recent means."""

    layer: int
    samples: int = Field(description="sampled steps since the start")
    time: float | None = Field(description="of the last sample")
    output_error: float | None = Field(description="relative error of attention's output, root of squares")
    attention_kl: float | None = Field(description="KL of the attention weights, nats")
    error_ratio: float | None = Field(
        description="squared error of keys and values over what the profile predicts for text like its calibration's"
    )
    kernel_error: float | None = Field(
        description="the kernels' attention against the reference's over the same pages, relative"
    )
    fallback_share: float | None = Field(description="vectors that were coded flat")
    clipped_share: float | None = Field(description="codes whose channel lies past the end of its codebook")
    key_drift: float | None = Field(
        description="energy that the profile expects in its leading key channels minus the energy found there"
    )
    value_drift: float | None = Field(description="the same for values")
    drift: float | None = Field(description="the larger of the two")
    moment_tokens: int = Field(description="tokens in the live moments, from which the drift is taken")


class FidelityPoint(BaseModel):
    """One sample, for plots over time."""

    time: float
    layer: int
    output_error: float
    attention_kl: float
    error_ratio: float


class Alarm(BaseModel):
    """A figure past its limit."""

    kind: Literal["canary", "error", "drift"]
    layer: int | None = Field(description="null where it is no single layer's")
    value: float
    limit: float
    message: str


class CanaryState(BaseModel):
    """A fixed prompt, answered with the exact cache at the start and with the compressed one since."""

    state: Literal["off", "pending", "passed", "failed"]
    time: float | None = Field(description="of the last run")
    runs: int
    failures: int
    kl: float | None = Field(description="KL of the next-token distributions, nats per token, mean over the prompt")
    kl_limit: float
    top1_agreement: float | None = Field(description="share of positions with the same most likely token")
    worst_layer: int | None = Field(
        description="the layer whose error ratio on the canary's tokens is nearest to its limit"
    )
    worst_error_ratio: float | None = Field(description="of that layer")
    worst_drift: float | None = Field(description="of that layer: share of its energy outside its profile's channels")
    error_ratio_limit: float = Field(
        description="of that layer: its profile says what to expect of the canary's tokens"
    )
    drift_limit: float = Field(description="of that layer")
    message: str


class CacheFidelity(BaseModel):
    """What compression does to the answers, sampled from live steps."""

    every_steps: int = Field(description="one step in so many is sampled, about; 0: none")
    sampled_steps: int
    sampling_seconds: float = Field(description="time the sampling itself took, all ranks")
    drift_limit: float
    error_ratio_limit: float
    alarms: list[Alarm]
    canary: CanaryState
    layers: list[LayerFidelity]
    history: list[FidelityPoint] = Field(description="the most recent samples, oldest first")


class LayerSpectrum(BaseModel):
    """One layer of the profile; means over its KV heads."""

    layer: int
    key_bits: float = Field(description="codes alone, per element")
    value_bits: float
    key_effective_rank: float
    value_effective_rank: float
    key_spectrum: list[float] = Field(description="share of the energy in each rotated channel")
    value_spectrum: list[float]
    key_channel_bits: list[float]
    value_channel_bits: list[float]


class CacheProfile(BaseModel):
    """The active profile."""

    digest: str
    name: str
    model: dict[str, Any]
    provenance: dict[str, Any]
    bits_per_element: float
    slot_bytes: int
    bytes_per_token: int
    uncompressed_bytes_per_token: int
    compression_ratio: float
    layers: list[LayerSpectrum]


class Traffic(BaseModel):
    """What the engine is doing."""

    time: float
    running: int
    waiting: int
    prompt_tokens: int = Field(description="processed since the start")
    generated_tokens: int = Field(description="since the start")
    generated_tokens_per_second: float = Field(description="over the last ten seconds or so")
    prompt_tokens_per_second: float
    preemptions: int


class Readiness(BaseModel):
    """Whether answers are to be trusted."""

    ready: bool
    reason: str
    canary: CanaryState

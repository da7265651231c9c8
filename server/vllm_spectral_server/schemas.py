"""Bodies of our routes."""

from __future__ import annotations

from pydantic import BaseModel, Field


class ProfileIdentity(BaseModel):
    """Which profile is active."""

    digest: str = Field(description="SHA-256 over the profile's content")
    name: str


class LayerCost(BaseModel):
    """One attention layer."""

    name: str
    slot_bytes: int = Field(description="bytes per token and KV head, keys and values together")
    key_bits: float = Field(description="mean stored bits per key element, scale included")
    value_bits: float = Field(description="mean stored bits per value element, scale included")
    compressed: bool


class CacheMemory(BaseModel):
    """What the KV cache costs. Sizes are bytes over all layers and ranks."""

    model: str
    profile: ProfileIdentity | None = Field(description="null if the stock cache is served")
    kernels: str = Field(
        description="what attends to the pages: an instruction set, or reference; empty for the stock cache"
    )
    num_blocks: int
    block_size_tokens: int
    pool_bytes: int = Field(description="all pages")
    used_bytes: int = Field(description="pages held by requests or still referenced")
    used_tokens: int = Field(description="token slots in those pages")
    capacity_tokens: int = Field(description="tokens the pages hold; what vLLM logs and schedules with")
    uncompressed_capacity_tokens: int = Field(
        description="tokens that bf16 pages would hold in pool_bytes + exact_tier_bytes"
    )
    bytes_per_token: int
    uncompressed_bytes_per_token: int = Field(description="the same in bf16")
    compression_ratio: float = Field(description="uncompressed_bytes_per_token / bytes_per_token")
    exact_tier_bytes: int = Field(
        description="pool of exact copies of first and recent tokens, taken out of the memory given for the cache"
    )
    workspace_bytes: int = Field(description="scratch of the attention kernels, shared by all layers")
    profile_bytes: int = Field(description="bases, spectra and tables held resident")
    effective_compression_ratio: float = Field(description="bf16 bytes of a full cache over everything resident for it")
    effective_bits_per_element: float = Field(description="16 / effective_compression_ratio")
    layers: list[LayerCost]

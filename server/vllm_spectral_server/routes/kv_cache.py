"""``GET /v1/kv_cache/memory``: what the cache costs, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from vllm_spectral.profile.schema import Profile
from vllm_spectral.stats.memory import MemoryReport, WorkerMemory
from vllm_spectral_server.schemas import CacheMemory, LayerCost, ProfileIdentity
from vllm_spectral_server.usage import PoolUsage

router = APIRouter(tags=["kv cache"])


@dataclass
class CacheSource:
    """Where the route's figures come from.

    Attributes:
        engine: vLLM's engine; the workers are asked once, since their sizes are fixed at start.
        usage: the scheduler's view of the pool.
        model: what the user called the model.
        profile: the active profile, or None.
    """

    engine: Any
    usage: PoolUsage
    model: str
    profile: Profile | None
    _workers: list[WorkerMemory] | None = None

    async def report(self) -> MemoryReport:
        """The figures of this moment."""
        if self._workers is None:
            answers = await self.engine.collective_rpc("spectral_memory")
            self._workers = [WorkerMemory.from_wire(answer) for answer in answers]
        cache = self.engine.vllm_config.cache_config
        return MemoryReport.gather(
            self._workers,
            num_blocks=cache.num_gpu_blocks,
            block_size=cache.block_size,
            used_blocks=self.usage.used_blocks(cache.num_gpu_blocks),
        )


@router.get("/v1/kv_cache/memory")
async def memory(request: Request) -> CacheMemory:
    """What the KV cache costs, and what bf16 would have held in the same bytes."""
    source: CacheSource = request.app.state.spectral
    report = await source.report()
    return CacheMemory(
        model=source.model,
        profile=ProfileIdentity(digest=source.profile.digest, name=source.profile.name) if source.profile else None,
        num_blocks=report.num_blocks,
        block_size_tokens=report.block_size_tokens,
        pool_bytes=report.pool_bytes,
        used_bytes=report.used_bytes,
        used_tokens=report.used_tokens,
        capacity_tokens=report.capacity_tokens,
        uncompressed_capacity_tokens=report.uncompressed_capacity_tokens,
        bytes_per_token=report.bytes_per_token,
        uncompressed_bytes_per_token=report.uncompressed_bytes_per_token,
        compression_ratio=report.compression_ratio,
        exact_tier_bytes=report.exact_tier_bytes,
        kernels=report.workers[0].kernels,
        workspace_bytes=report.workspace_bytes,
        profile_bytes=report.profile_bytes,
        effective_compression_ratio=report.effective_compression_ratio,
        effective_bits_per_element=report.effective_bits_per_element,
        layers=[
            LayerCost(
                name=layer.name,
                slot_bytes=layer.slot_bytes,
                key_bits=layer.key_bits,
                value_bits=layer.value_bits,
                compressed=layer.compressed,
            )
            for layer in report.layers
        ],
    )

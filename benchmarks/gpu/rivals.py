"""What else decodes on a GPU, on the same step: each as a call that a CUDA graph can capture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case
from vllm_spectral.kernels.interface import Requests
from vllm_spectral.kernels.triton.tables import power_of_two

BF16 = ("flash", "flashinfer")
"""Those that read bf16: the fastest of them is what a compressed cache has to beat."""
_TURBOQUANT = "turboquant_4bit_nc"


def decode_sides(
    case: Case, query: Tensor, context: list[Tensor], requests: Requests
) -> dict[str, Callable[[], object]]:
    """Every rival that this machine has; who is missing is printed with the reason.

    Args:
        case: the step.
        query: ``[tokens, query_heads, head_dim]`` bf16.
        context: keys and values of one request, ``[context, heads, head_dim]`` bf16; all requests have the same.
        requests: block tables and lengths.
    """
    sides: dict[str, Callable[[], object]] = {"flash": _flash(case, query, context)}
    for name, make in (("flashinfer", _flashinfer), ("turboquant", _turboquant), ("int4", _int4)):
        try:
            side = make(case, query, requests)
            side()
            torch.cuda.synchronize()
        except Exception as error:
            # Whatever a rival's version says to this call, our own figures are wanted all the same.
            print(
                f"  without {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                flush=True,
            )
        else:
            sides[name] = side
    return sides


def _flash(case: Case, query: Tensor, context: list[Tensor]) -> Callable[[], object]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    keys, values = (side.transpose(0, 1)[None].repeat(case.requests, 1, 1, 1) for side in context)
    grouped = query.view(case.requests, case.queries, case.query_heads, case.head_dim).transpose(1, 2)

    def run() -> object:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, enable_gqa=True)

    return run


def _flashinfer(case: Case, query: Tensor, requests: Requests) -> Callable[[], object]:
    import flashinfer

    table, device = requests.block_table, query.device
    shape = (table.numel(), case.block, case.heads, case.head_dim)
    keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    ends = torch.arange(0, table.numel() + 1, table.shape[1], dtype=torch.int32, device=device)
    full = torch.full((case.requests,), (case.context - 1) % case.block + 1, dtype=torch.int32, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=ends.clone(),
        paged_kv_indices_buffer=table.flatten().clone(), paged_kv_last_page_len_buffer=full.clone(),
    )  # fmt: skip
    wrapper.plan(
        ends, table.flatten(), full, case.query_heads, case.heads, case.head_dim, case.block, q_data_type=torch.bfloat16
    )
    return lambda: wrapper.run(query, (keys, values))


def _turboquant(case: Case, query: Tensor, requests: Requests) -> Callable[[], object]:
    """Its cache holds zeros: how long it takes does not depend on what the bytes say."""
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    config, device = TurboQuantConfig.from_cache_dtype(_TURBOQUANT, case.head_dim), query.device
    shape = (requests.block_table.numel(), case.block, case.heads, config.slot_size_aligned)
    cache = torch.zeros(shape, dtype=torch.uint8, device=device)
    turn = torch.eye(case.head_dim, device=device)
    centroids = torch.linspace(-2, 2, config.n_centroids, device=device)
    return lambda: triton_turboquant_decode_attention(
        query, cache, requests.block_table, requests.context_lens, turn, centroids, case.head_dim**-0.5, config.key_mse_bits,
        config.key_packed_size, config.effective_value_quant_bits, config.key_fp8,
        norm_correction=config.norm_correction, PiT=turn,
    )  # fmt: skip


def _int4(case: Case, query: Tensor, requests: Requests) -> Callable[[], object]:
    """Zeros again. A slot of a head is its key's nibbles, their scale (float32), its value's nibbles and their scale."""
    import vllm._custom_ops  # noqa: F401 - registers its Hadamard transform
    from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    device, half = query.device, case.head_dim // 2
    shape = (requests.block_table.numel(), case.heads, case.block, 2, half + 4)
    cache = torch.zeros(shape, dtype=torch.uint8, device=device).transpose(1, 2)
    scales = cache.view(torch.float32)[..., half // 4]
    shape = (query.shape[0], case.query_heads, NUM_PAR_SOFTMAX_SEGMENTS, power_of_two(case.head_dim))
    shares = torch.empty(shape, device=device)
    maxima, sums = (torch.empty(shares.shape[:3], device=device) for _ in range(2))
    output = torch.empty_like(query)

    def run() -> Tensor:
        unified_attention_int4(
            query, cache[..., 0, :half], cache[..., 1, :half], output, cu_seqlens_q=requests.query_start,
            max_seqlen_q=case.queries, seqused_k=requests.context_lens, max_seqlen_k=case.context,
            softmax_scale=case.head_dim**-0.5, window_size=(-1, -1), block_table=requests.block_table, softcap=0.0,
            sinks=None, alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None, mm_prefix_range=None,
            k_scale_cache=scales[..., 0], v_scale_cache=scales[..., 1],
            seq_threshold_3D=MIN_LAUNCH_GRID_SIZE_2D // case.heads, num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
            softmax_segm_output=shares, softmax_segm_max=maxima, softmax_segm_expsum=sums,
        )  # fmt: skip
        return output

    return run

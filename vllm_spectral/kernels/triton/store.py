"""Store: rotate, scale, quantize, choose the fallback, pack and write the bytes that the reference writes.

What makes the bytes equal: the rotation is summed in float64, where the order of sums is lost in the rounding to float32; and
the search for scales repeats the reference's single float32 operations in its order. Errors are therefore computed for all
channels at once, but summed channel by channel, through scratch memory; products and sums must not be contracted
(``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_spectral.kernels.triton.pages import rounded


@triton.jit
def _ordered_sum(terms, step, D: tl.constexpr, like):
    """Sum of ``terms + c * step`` over channels ``c``, in order; ``like``: zeros in the result's shape."""
    total = like
    for c in tl.range(0, D, loop_unroll_factor=8):
        total += tl.load(terms + c * step)
    return total


@triton.jit
def _nearest_codes(x, bits, most_bits, boundaries, ROW: tl.constexpr):
    """How many of the channel's boundaries lie below each ``x`` (``[TOKENS, DP]``), all for NaN, by bisection."""
    code = tl.zeros(x.shape, tl.int32)
    for depth in range(most_bits):
        left = bits - 1 - depth
        more = left >= 0
        middle = ((2 * code + 1) << tl.maximum(left, 0)) - 1
        edge = tl.load(boundaries + bits * ROW + middle, mask=more & (code >= 0), other=0.0)
        code = tl.where(more, 2 * code + 1 - (edge >= x).to(tl.int32), code)
    return code


@triton.jit
def _fit(whitened, row, d, t, bits_p, width_p, inverse_stored_p, most_bits_p, boundaries, levels, scales, inverse_scales,
         scale_bounds, scratch, D: tl.constexpr, TOKENS: tl.constexpr, ROW: tl.constexpr, SEARCH: tl.constexpr,
         SEARCH_FIRST: tl.constexpr, LAST_SCALE: tl.constexpr):  # fmt: skip
    """The best scale of every token: its index, the squared error that it leaves, and the mean square, ``[TOKENS]`` each."""
    real = d < D
    bits = tl.load(bits_p + row * D + d, mask=real, other=0)[None, :]
    width = tl.load(width_p + row * D + d, mask=real, other=0.0)[None, :]
    most_bits = tl.load(most_bits_p + row)
    at = d[None, :] * TOKENS + t[:, None]
    tl.debug_barrier()
    tl.store(scratch + at, whitened * whitened * (bits > 0).to(tl.float32), mask=real[None, :] & (t[:, None] >= 0))
    tl.debug_barrier()
    power = _ordered_sum(scratch + t, TOKENS, D, tl.zeros((TOKENS,), tl.float32))
    power = power * tl.load(inverse_stored_p + row)
    middle = tl.zeros((TOKENS,), tl.int32)
    for depth in tl.static_range(7):
        step = 64 >> depth
        bound = tl.load(scale_bounds + middle + (step - 1))
        middle += tl.where(bound > power, 0, step)
    tl.debug_barrier()
    for i in tl.static_range(SEARCH):
        index = tl.minimum(tl.maximum(middle + (SEARCH_FIRST + i), 0), LAST_SCALE)
        inverse = tl.load(inverse_scales + index)[:, None]
        scale = tl.load(scales + index)[:, None]
        code = _nearest_codes(whitened * inverse, bits, most_bits, boundaries, ROW)
        miss = (whitened - tl.load(levels + (1 << bits) + code) * scale) * width
        tl.store(scratch + i * (D * TOKENS) + at, miss * miss, mask=real[None, :] & (t[:, None] >= 0))
    tl.debug_barrier()
    tried = tl.arange(0, SEARCH)[None, :]
    errors = _ordered_sum(
        scratch + tried * (D * TOKENS) + t[:, None], TOKENS, D, tl.zeros((TOKENS, SEARCH), tl.float32)
    )
    errors = tl.where(errors < float("inf"), errors, float("inf"))
    best, least = tl.argmin(errors, 1, tie_break_left=True), tl.min(errors, 1)
    index = tl.minimum(tl.maximum(middle + (SEARCH_FIRST + best), 0), LAST_SCALE)
    # The first of all scales for a vector that is not finite, or whose square is not.
    return tl.where(least < float("inf"), index, 0), least, power


@triton.jit
def _codes(whitened, index, row, d, t, live, bits_p, shift_p, most_bits_p, channel_p, boundaries, inverse_scales, scratch,
           D: tl.constexpr, TOKENS: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr):  # fmt: skip
    """The words of every token whose codes are chosen with the scales ``index``: ``[TOKENS, WORDS]`` int32."""
    real = d < D
    bits = tl.load(bits_p + row * D + d, mask=real, other=0)[None, :]
    shift = tl.load(shift_p + row * D + d, mask=real, other=0)[None, :]
    inverse = tl.load(inverse_scales + index)[:, None]
    code = _nearest_codes(whitened * inverse, bits, tl.load(most_bits_p + row), boundaries, ROW)
    codes = scratch.to(tl.pointer_type(tl.int32))
    tl.debug_barrier()
    tl.store(codes + d[None, :] * TOKENS + t[:, None], code << shift, mask=real[None, :] & live[:, None])
    tl.debug_barrier()
    words = tl.arange(0, WORDS)[:, None]
    channel = tl.load(channel_p + (row * WORDS + words) * FIELDS + tl.arange(0, FIELDS)[None, :])[None, :, :]
    field = tl.load(codes + channel * TOKENS + t[:, None, None], mask=(channel >= 0) & live[:, None, None], other=0)
    # Fields of one word occupy different bits, so that adding them is the same as or-ing them.
    return tl.sum(field, 2)


@triton.jit(do_not_specialize=["num_tokens"])
def store_kernel(
    keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride, slot_mapping, num_tokens,
    pages, block_stride, head_stride, block_size,
    basis, center, needed, word_first, word_half,
    bits, shift, width, inverse_width, inverse_stored, most_bits, channel,
    flat_bits, flat_shift, flat_width, flat_inverse_width, flat_inverse_stored, flat_most_bits, flat_channel,
    boundaries, levels, scales, inverse_scales, scale_bounds, scratch, gain,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, ROW: tl.constexpr,
    SEARCH: tl.constexpr, SEARCH_FIRST: tl.constexpr, LAST_SCALE: tl.constexpr,
    WORDS: tl.constexpr, FIELDS: tl.constexpr, FLAT_FIELDS: tl.constexpr,
    SLOT: tl.constexpr, GROUP: tl.constexpr, LANE: tl.constexpr, FLAT_FLAG: tl.constexpr, COORDINATES: tl.constexpr,
):  # fmt: skip
    """Programs take (tokens, head, keys or values) in turn; scratch: ``SEARCH * D * TOKENS`` float32 each.

    ``COORDINATES`` divides ``D``: so many of the model's are rotated at once, by float64 tensor cores.
    """
    d, t = tl.arange(0, DP), tl.arange(0, TOKENS)
    real = d < D
    scratch += tl.program_id(0).to(tl.int64) * (SEARCH * D * TOKENS)
    units = tl.cdiv(num_tokens, TOKENS) * (2 * HEADS)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row = unit % (2 * HEADS)
        side, head = row // HEADS, row % HEADS
        token = unit // (2 * HEADS) * TOKENS + t
        slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
        live = slot >= 0
        if side == 0:
            source = keys + token.to(tl.int64) * key_token_stride + head * key_head_stride
        else:
            source = values + token.to(tl.int64) * value_token_stride + head * value_head_stride
        # Through memory: as float32, since Triton 3.6 does not compile products of float64 that come from bf16; and back,
        # so that what follows is not laid out like a product of matrices.
        vectors = scratch + t[:, None] * D
        every = real[None, :] & (t[:, None] >= 0)
        given = tl.load(source[:, None] + d[None, :], mask=real[None, :] & live[:, None], other=0.0)
        tl.debug_barrier()
        tl.store(vectors + d[None, :], given.to(tl.float32), mask=every)
        tl.debug_barrier()
        total = tl.zeros((TOKENS, DP), tl.float64)
        for first in tl.range(0, D, COORDINATES):
            c = first + tl.arange(0, COORDINATES)
            x = tl.load(vectors + c[None, :])
            lines = tl.load(basis + (row * D + c[:, None]) * D + d[None, :], mask=real[None, :], other=0.0)
            total = tl.dot(x.to(tl.float64), lines.to(tl.float64), total, out_dtype=tl.float64)
        tl.debug_barrier()
        tl.store(vectors + d[None, :], total.to(tl.float32), mask=every)
        tl.debug_barrier()
        rotated = tl.load(vectors + d[None, :], mask=every, other=0.0)

        inverse = tl.load(inverse_width + row * D + d, mask=real, other=0.0)[None, :]
        whitened = rotated * inverse
        index, error, _ = _fit(
            whitened, row, d, t, bits, width, inverse_stored, most_bits, boundaries, levels, scales, inverse_scales,
            scale_bounds, scratch, D, TOKENS, ROW, SEARCH, SEARCH_FIRST, LAST_SCALE,
        )  # fmt: skip
        words = _codes(
            whitened, index, row, d, t, live, bits, shift, most_bits, channel, boundaries, inverse_scales, scratch,
            D, TOKENS, ROW, WORDS, FIELDS,
        )  # fmt: skip

        middle = tl.load(center + row * D + d, mask=real, other=0.0)[None, :]
        inverse = tl.load(flat_inverse_width + row * D + d, mask=real, other=0.0)[None, :]
        whitened = (rotated - middle) * inverse
        enough = error * gain
        # The mean square is cheap beside the search, and the search is left out where no token of these asks for it.
        squares = (
            whitened * whitened * (tl.load(flat_bits + row * D + d, mask=real, other=0) > 0).to(tl.float32)[None, :]
        )
        tl.debug_barrier()
        tl.store(scratch + d[None, :] * TOKENS + t[:, None], squares, mask=every)
        tl.debug_barrier()
        power = _ordered_sum(scratch + t, TOKENS, D, tl.zeros((TOKENS,), tl.float32))
        power = power * tl.load(flat_inverse_stored + row)
        tried = (power * tl.load(needed + row) < enough) & live
        if tl.max(tried.to(tl.int32), 0) > 0:
            flat_index, flat_error, _ = _fit(
                whitened, row, d, t, flat_bits, flat_width, flat_inverse_stored, flat_most_bits, boundaries, levels,
                scales, inverse_scales, scale_bounds, scratch, D, TOKENS, ROW, SEARCH, SEARCH_FIRST, LAST_SCALE,
            )  # fmt: skip
            flat_words = _codes(
                whitened, flat_index, row, d, t, live, flat_bits, flat_shift, flat_most_bits, flat_channel, boundaries,
                inverse_scales, scratch, D, TOKENS, ROW, WORDS, FLAT_FIELDS,
            )  # fmt: skip
            is_flat = tried & (flat_error < enough)
            index = tl.where(is_flat, flat_index | FLAT_FLAG, index)
            words = tl.where(is_flat[:, None], flat_words, words)

        offset = slot % block_size
        lane = (offset % GROUP).to(tl.int32)
        group = pages + slot // block_size * block_stride + head * head_stride + offset // GROUP * (GROUP * SLOT)
        tl.store(group + side * GROUP + lane, index.to(tl.uint8), mask=live)
        w = row * WORDS + tl.arange(0, WORDS)
        first, half_step = tl.load(word_first + w)[None, :], tl.load(word_half + w)[None, :]
        half, within = (lane // (GROUP // 2))[:, None], (lane % (GROUP // 2))[:, None]
        place = group[:, None] + (first + half * half_step + within * LANE)
        tl.store(place.to(tl.pointer_type(tl.uint16)), words.to(tl.uint16), mask=live[:, None] & (first >= 0))


@triton.jit
def copy_kernel(
    keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride, write_tokens, write_rows,
    copy_keys, copy_values, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COPY_GROUP: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """One program copies one token's key and value of one head into the pool of exact copies; row -1: none."""
    head, d = tl.program_id(1), tl.arange(0, DP)
    row = tl.load(write_rows + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        token = tl.load(write_tokens + tl.program_id(0)).to(tl.int64)
        to = ((row // COPY_GROUP * HEADS + head) * COPY_GROUP + row % COPY_GROUP) * D + d
        key = tl.load(keys + token * key_token_stride + head * key_head_stride + d, mask=d < D)
        value = tl.load(values + token * value_token_stride + head * value_head_stride + d, mask=d < D)
        tl.store(copy_keys + to, rounded(key, EMULATE), mask=d < D)
        tl.store(copy_values + to, rounded(value, EMULATE), mask=d < D)

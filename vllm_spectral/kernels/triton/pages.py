"""Reading pages: codes to levels in registers, and one tile of tokens attended to.

A tile is ``SUBS`` groups of 32 tokens. Its tokens are taken in the order 0, 16, 1, 17, ... of each group: a 32-bit word of
the values holds tokens ``t`` and ``t + 16``, so that both codes of a word become neighbours, as both channels of a word of
the keys do.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, EMULATE: tl.constexpr):
    """To bf16, to the nearest. Triton's interpreter cuts off instead, so that there the bits are worked out."""
    if EMULATE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def dot(a, b, EMULATE: tl.constexpr):
    """bf16 product with float32 sums. Triton's interpreter multiplies bf16 as integers: there, rounded, in float32."""
    a, b = rounded(a, EMULATE), rounded(b, EMULATE)
    if EMULATE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)


@triton.jit
def token_order(T: tl.constexpr):
    """``[T]`` int32: which token of the tile stands at which place."""
    i = tl.arange(0, T)
    return i // 32 * 32 + i % 32 // 2 + i % 2 * 16


@triton.jit
def token_scale(byte):
    """The scale of scale bytes: eight steps to an octave around 1 at index 64, whatever the flag says."""
    return tl.exp2((byte & 127).to(tl.float32) * 0.125 - 8.0)


@triton.jit
def _level(words, turn, mask, base, high):
    """Levels of the codes that ``turn`` brings to the lowest bits of 32-bit words."""
    turned = (words >> turn) | (words << ((32 - turn) & 31))
    low = (turned & mask) | base
    return tl.load((low.to(tl.uint64) | high).to(tl.pointer_type(tl.float32)))


@triton.jit
def expand(words, turn, mask, levels):
    """Both codes of 32-bit words as levels, in a new last dimension of 2; ``turn`` and ``mask`` broadcast to ``words``."""
    address = levels.to(tl.uint64)
    # Entry 2 ** bits + code: mask + 4 is 4 * 2 ** bits. The table is aligned, so that nothing is carried.
    base = address.to(tl.uint32) | (mask + 4)
    high = (address >> 32) << 32
    return tl.join(_level(words, turn, mask, base, high), _level(words, (turn + 16) & 31, mask, base, high))


@triton.jit
def read_table(offset_p, turn_p, mask_p, head, N: tl.constexpr):
    """A head's row of a :class:`ReadTable`, ``[1, N, 1]`` each."""
    n = head * N + tl.arange(0, N)
    return (
        tl.load(offset_p + n)[None, :, None],
        tl.load(turn_p + n).to(tl.uint32)[None, :, None],
        tl.load(mask_p + n).to(tl.uint32)[None, :, None],
    )


@triton.jit
def key_levels(group, key_half, offset, turn, mask, levels, DP: tl.constexpr, SUBS: tl.constexpr):
    """``[DP, T]`` float32 of a tile; ``group``: ``[SUBS, 1, 1]`` pointers."""
    lane = tl.arange(0, 32)[None, None, :]
    place = group + (lane % 2 * key_half + lane // 2 * 4) + offset
    words = tl.load(place.to(tl.pointer_type(tl.uint32)))
    return expand(words, turn, mask, levels).permute(1, 3, 0, 2).reshape(DP, SUBS * 32)


@triton.jit
def value_levels(group, offset, turn, mask, levels, DP: tl.constexpr, SUBS: tl.constexpr):
    """``[T, DP]`` float32 of a tile."""
    lane = tl.arange(0, 16)[None, None, :]
    words = tl.load((group + lane * 4 + offset).to(tl.pointer_type(tl.uint32)))
    return expand(words, turn, mask, levels).permute(0, 2, 3, 1).reshape(SUBS * 32, DP)


@triton.jit
def soft_capped(x, CAP: tl.constexpr):
    """``CAP * tanh(x / CAP)``."""
    e = tl.exp2(tl.abs(x) * (-2.0 * 1.4426950408889634 / CAP))
    y = CAP * (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def logits(scores, SOFT_CAP: tl.constexpr):
    """Scores in units of the softmax's base 2; the query carries the factor already unless a cap comes between."""
    if SOFT_CAP > 0:
        return soft_capped(scores, SOFT_CAP) * 1.4426950408889634
    return scores


@triton.jit
def softmax_step(scores, peak, total):
    """One step of the online softmax: weights, the factor of what was summed before, new peak and total."""
    now = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing: a finite peak makes exp2(-inf - peak) 0, not NaN.
    safe = tl.maximum(now, -1e30)
    keep = tl.exp2(peak - safe)
    weights = tl.exp2(scores - safe[:, None])
    return weights, keep, now, total * keep + tl.sum(weights, 1)

"""Attention over pages and exact copies.

``pages_kernel`` does the work: a program takes a tile of query rows, one KV head and a share of the tokens. If ``WHOLE``,
it has all tokens and finishes its rows at once (prefill); else ``prepare_kernel`` rotates the queries before it, and
``finish_kernel`` merges the shares, rotates the result back and adds the exact copies (decode). A row is one query and one
head of the group. No length is read on the host: a captured graph replays with other lengths. And no length is compiled in:
Triton would otherwise compile anew for lengths of 1 and for multiples of 16, in the middle of serving.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_spectral.kernels.triton.pages import (
    dot,
    key_levels,
    logits,
    read_table,
    rounded,
    softmax_step,
    token_order,
    token_scale,
    value_levels,
)

LOG2_E: tl.constexpr = 1.4426950408889634


@triton.jit
def _locate(tile, query_start, num_requests, MOST_TILES: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    """The request of a tile of rows and the tile's number within it.

    Few tiles per request: each gets as many as the longest. Else tiles lie one after another, a request's from
    ``first row // M + request`` on, which leaves room for what rounding adds.
    """
    if MOST_TILES > 0:
        return tile // MOST_TILES, tile % MOST_TILES
    low, high = 0, num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) * G // M + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(query_start + low) * G // M + low)


@triton.jit
def _rows(tile, query_start, context_lens, num_requests, MOST_TILES: tl.constexpr, G: tl.constexpr, M: tl.constexpr):
    """``request, before, context, token, member, position, valid, first, last`` of a tile's rows.

    ``before``: tokens before the step; ``token``, ``member``, ``position``, ``valid``: ``[M]``; ``first``, ``last``: the
    positions of the tile's ends.
    """
    request, number = _locate(tile, query_start, num_requests, MOST_TILES, G, M)
    start = tl.load(query_start + request)
    queries = tl.load(query_start + request + 1) - start
    context = tl.load(context_lens + request)
    row = number * M + tl.arange(0, M)
    valid = row < queries * G
    before = context - queries
    first = before + number * M // G
    last = before + tl.minimum((number * M + M - 1) // G, queries - 1)
    return request, before, context, start + row // G, row % G, before + row // G, valid, first, last


@triton.jit
def _load_rows(tensor, token, member, valid, head, token_stride, head_stride, G: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr):  # fmt: skip
    d = tl.arange(0, DP)[None, :]
    place = tensor + token.to(tl.int64)[:, None] * token_stride + (head * G + member)[:, None] * head_stride + d
    return tl.load(place, mask=valid[:, None] & (d < D), other=0.0)


@triton.jit
def _square_rows(matrix, first, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr):
    """``[ROWS, DP]`` of a ``[D, D]`` matrix, or of its transpose, from row ``first`` on, padded with zeros."""
    i, j = first + tl.arange(0, ROWS)[:, None], tl.arange(0, DP)[None, :]
    place = matrix + j * D + i if TURNED else matrix + i * D + j
    return tl.load(place, mask=(i < D) & (j < D), other=0.0)


@triton.jit
def _halves(rows, M: tl.constexpr, N: tl.constexpr):
    """The first ``N / 2`` columns of ``[M, N]``, and the others."""
    return tl.split(tl.permute(tl.reshape(rows, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _times_square(rows, matrix, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TURNED: tl.constexpr):
    """``[M, DP]`` float32 times a ``[D, D]`` matrix, or its transpose.

    Both parts of each of the matrix's numbers lie in shared memory, which has no room for all of a head wider than 128.
    """
    if DP <= 128:
        return tl.dot(rows, _square_rows(matrix, 0, D, DP, DP, TURNED), input_precision="tf32x3")
    Q: tl.constexpr = DP // 4
    low, high = _halves(rows, M, DP)
    a, b = _halves(low, M, DP // 2)
    c, d = _halves(high, M, DP // 2)
    found = tl.dot(a, _square_rows(matrix, 0, D, DP, Q, TURNED), input_precision="tf32x3")
    found = tl.dot(b, _square_rows(matrix, Q, D, DP, Q, TURNED), found, input_precision="tf32x3")
    found = tl.dot(c, _square_rows(matrix, 2 * Q, D, DP, Q, TURNED), found, input_precision="tf32x3")
    return tl.dot(d, _square_rows(matrix, 3 * Q, D, DP, Q, TURNED), found, input_precision="tf32x3")


@triton.jit
def _rotated_queries(query, head, key_basis, key_center, key_width, key_flat_width, factor, M: tl.constexpr,
                     D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """Queries ``[M, DP]`` for spectral keys, for the fallback's, and with the fallback's center (``[M]``)."""
    d = tl.arange(0, DP)
    rotated = _times_square(query.to(tl.float32), key_basis + head * D * D, M, D, DP, False) * factor
    width = tl.load(key_width + head * D + d, mask=d < D, other=0.0)[None, :]
    flat_width = tl.load(key_flat_width + head * D + d, mask=d < D, other=0.0)[None, :]
    center = tl.load(key_center + head * D + d, mask=d < D, other=0.0)[None, :]
    return rotated * width, rotated * flat_width, tl.sum(rotated * center, 1)


@triton.jit
def _pool_row(rows, request, position, before, FIRST: tl.constexpr, RECENT: tl.constexpr):
    """The pool's rows of positions, -1 without a copy; of those before the step."""
    start = tl.maximum(before - RECENT, 0)
    column = tl.where(position < FIRST, position, FIRST + position - start)
    there = (position >= 0) & (position < before) & ((position < FIRST) | (position >= start))
    return tl.load(rows + request * (FIRST + RECENT) + column, mask=there, other=-1)


@triton.jit
def _over_pages(
    query, flat_query, center, head, request, before, context, position, first, last, low_tile, high_tile,
    pages, block_stride, head_stride, block_table, table_stride, exact_rows,
    key_offset, key_turn, key_mask, key_flat_offset, key_flat_turn, key_flat_mask, key_half_p,
    value_offset, value_turn, value_mask, value_flat_offset, value_flat_turn, value_flat_mask,
    value_center, value_width, value_flat_width, levels,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, SUBS: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr,
    EXACT: tl.constexpr, FIRST: tl.constexpr, RECENT: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Attend to tiles ``[low_tile, high_tile)``: the sum of weighted values (``[M, DP]``, rotated), peak and total."""
    T: tl.constexpr = SUBS * 32
    order = token_order(T)
    sub = tl.arange(0, SUBS)
    d = tl.arange(0, DP)
    key_half = tl.load(key_half_p + head)
    k_offset, k_turn, k_mask = read_table(key_offset, key_turn, key_mask, head, DP // 2)
    v_offset, v_turn, v_mask = read_table(value_offset, value_turn, value_mask, head, DP)
    width = tl.load(value_width + head * D + d, mask=d < D, other=1.0)
    sums = tl.zeros((M, DP), tl.float32)
    flat_total = tl.zeros((M,), tl.float32)
    total = tl.zeros((M,), tl.float32)
    peak = tl.full((M,), float("-inf"), tl.float32)
    heads_pages = pages + head * head_stride
    table = block_table + request * table_stride
    for tile in range(low_tile, high_tile):
        start = tile * T
        if BLOCK % T == 0:
            block = tl.load(table + start // BLOCK).to(tl.int64)
            page = heads_pages + block * block_stride + start % BLOCK * SLOT
            group = page + (sub * (32 * SLOT))[:, None, None]
            scales = page + order // 32 * (32 * SLOT) + order % 32
        else:
            at = start + sub * 32
            block = tl.load(table + at // BLOCK, mask=at < context, other=0).to(tl.int64)
            group = (heads_pages + block * block_stride + at % BLOCK * SLOT)[:, None, None]
            at = start + order
            block = tl.load(table + at // BLOCK, mask=at < context, other=0).to(tl.int64)
            scales = heads_pages + block * block_stride + at % BLOCK // 32 * 32 * SLOT + order % 32
        key_byte, value_byte = tl.load(scales).to(tl.int32), tl.load(scales + 32).to(tl.int32)
        token = start + order
        scores = dot(query, key_levels(group, key_half, k_offset, k_turn, k_mask, levels, DP, SUBS), EMULATE)
        scores = scores * token_scale(key_byte)[None, :]
        # One reduction for both sides: it stops all warps, and the fallback is rare.
        any_flat = tl.max(tl.where(token < context, key_byte | value_byte, 0), 0) >= 128
        if any_flat:
            key_flat = key_byte >= 128
            f_offset, f_turn, f_mask = read_table(key_flat_offset, key_flat_turn, key_flat_mask, head, DP // 2)
            flat = dot(flat_query, key_levels(group, key_half, f_offset, f_turn, f_mask, levels, DP, SUBS), EMULATE)
            flat = flat * token_scale(key_byte)[None, :] + center[:, None]
            scores = tl.where(key_flat[None, :], flat, scores)
        scores = logits(scores, SOFT_CAP)
        edge = start + T > first + 1
        if EXACT:
            edge = edge | (start < FIRST) | (start + T > first - RECENT + 1)
        if WINDOW > 0:
            edge = edge | (start <= last - WINDOW)
        if edge:
            seen = token[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (position[:, None] - token[None, :] < WINDOW)
            if EXACT:
                held = (token >= before) | (_pool_row(exact_rows, request, token, before, FIRST, RECENT) >= 0)
                near = (token[None, :] < FIRST) | (position[:, None] - token[None, :] < RECENT)
                seen = seen & (near & held[None, :] == 0)
            scores = tl.where(seen, scores, float("-inf"))
        weights, keep, peak, total = softmax_step(scores, peak, total)
        sums = sums * keep[:, None]
        flat_total = flat_total * keep
        value_flat = (value_byte >= 128)[None, :]
        scaled = weights * token_scale(value_byte)[None, :]
        plain = tl.where(value_flat, 0.0, scaled)
        sums += dot(plain, value_levels(group, v_offset, v_turn, v_mask, levels, DP, SUBS), EMULATE)
        if any_flat:
            f_offset, f_turn, f_mask = read_table(value_flat_offset, value_flat_turn, value_flat_mask, head, DP)
            ratio = tl.load(value_flat_width + head * D + d, mask=d < D, other=0.0) / width
            found = value_levels(group, f_offset, f_turn, f_mask, levels, DP, SUBS) * ratio[None, :]
            sums += dot(tl.where(value_flat, scaled, 0.0), found, EMULATE)
            flat_total += tl.sum(tl.where(value_flat, weights, 0.0), 1)
    middle = tl.load(value_center + head * D + d, mask=d < D, other=0.0)
    return sums * width[None, :] + flat_total[:, None] * middle[None, :], peak, total


@triton.jit
def _finish(
    sums, peak, total, query, factor, head, request, before, token, member, position, valid, first, last,
    keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride,
    exact_rows, copy_keys, copy_values, value_basis, output, out_token_stride, out_head_stride, query_start,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, COPIES: tl.constexpr,
    EXACT: tl.constexpr, FIRST: tl.constexpr, RECENT: tl.constexpr, COPY_GROUP: tl.constexpr, SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rotate the sum over pages back, go on with the exact copies in the model's own coordinates, and write the rows."""
    d = tl.arange(0, DP)
    sums = _times_square(sums, value_basis + head * D * D, M, D, DP, True)
    if EXACT:
        own_start = tl.load(query_start + request)
        # The request's first tokens, then the window of the tile's rows.
        low = tl.maximum(first - RECENT + 1, FIRST)
        count = FIRST + tl.maximum(last + 1 - low, 0)
        for part in range(0, count, COPIES):
            index = part + tl.arange(0, COPIES)
            place = tl.where(index < FIRST, index, low + index - FIRST)
            place = tl.where((index < count) & (place <= last), place, -1)
            row = _pool_row(exact_rows, request, place, before, FIRST, RECENT).to(tl.int64)
            own, pooled = place >= before, row >= 0
            at = ((row // COPY_GROUP * HEADS + head) * COPY_GROUP + row % COPY_GROUP)[:, None] * D + d[None, :]
            step = (own_start + place - before).to(tl.int64)[:, None]
            real = d[None, :] < D
            from_pool, from_step = pooled[:, None] & real, own[:, None] & real
            key = tl.load(copy_keys + at, mask=from_pool, other=0.0).to(tl.float32)
            mine = keys + step * key_token_stride + head * key_head_stride + d[None, :]
            key = tl.where(own[:, None], tl.load(mine, mask=from_step, other=0.0).to(tl.float32), key)
            scores = logits(dot(query, tl.trans(key), EMULATE) * factor, SOFT_CAP)
            seen = (own | pooled)[None, :] & (place[None, :] <= position[:, None])
            near = (place[None, :] < FIRST) | (position[:, None] - place[None, :] < RECENT)
            if WINDOW > 0:
                seen = seen & (position[:, None] - place[None, :] < WINDOW)
            scores = tl.where(seen & near, scores, float("-inf"))
            weights, keep, peak, total = softmax_step(scores, peak, total)
            value = tl.load(copy_values + at, mask=from_pool, other=0.0).to(tl.float32)
            mine = values + step * value_token_stride + head * value_head_stride + d[None, :]
            value = tl.where(own[:, None], tl.load(mine, mask=from_step, other=0.0).to(tl.float32), value)
            sums = sums * keep[:, None] + dot(weights, value, EMULATE)
    # Every query sees itself; only rows that are padding have no weights.
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    to = (
        output
        + token.to(tl.int64)[:, None] * out_token_stride
        + (head * G + member)[:, None] * out_head_stride
        + d[None, :]
    )
    if output.dtype.element_ty == tl.bfloat16:
        result = rounded(result, EMULATE)
    tl.store(to, result.to(output.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def prepare_kernel(
    query, token_stride, head_stride, num_rows, key_basis, key_center, key_width, key_flat_width, factor,
    rotated, flat_rotated, centers,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rotate queries into ``rotated`` and ``flat_rotated``, ``[tokens, query heads, D]`` bf16, and ``centers``."""
    head, d = tl.program_id(1), tl.arange(0, DP)[None, :]
    row = tl.program_id(0) * M + tl.arange(0, M)
    valid = row < num_rows
    found = _load_rows(query, row // G, row % G, valid, head, token_stride, head_stride, G, D, DP)
    spectral, flat, center = _rotated_queries(
        found, head, key_basis, key_center, key_width, key_flat_width, factor, M, D, DP
    )
    at = (row // G).to(tl.int64) * (HEADS * G) + head * G + row % G
    tl.store(rotated + at[:, None] * D + d, rounded(spectral, EMULATE), mask=valid[:, None] & (d < D))
    tl.store(flat_rotated + at[:, None] * D + d, rounded(flat, EMULATE), mask=valid[:, None] & (d < D))
    tl.store(centers + at, center, mask=valid)


@triton.jit
def _share(first, last, T: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, WINDOW: tl.constexpr):
    """First tile of the pages that rows need, the end, and how many a program takes."""
    low = 0
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0) // T
    high = last // T + 1
    return low, high, tl.maximum(tl.cdiv(high - low, SPLITS), LEAST)


@triton.jit(do_not_specialize=["num_requests"])
def pages_kernel(
    query, token_stride, head_stride_q, rotated, flat_rotated, centers, factor, page_factor,
    query_start, context_lens, num_requests, block_table, table_stride, pages, block_stride, head_stride, exact_rows,
    key_basis, key_center, key_width, key_flat_width,
    key_offset, key_turn, key_mask, key_flat_offset, key_flat_turn, key_flat_mask, key_half,
    value_basis, value_center, value_width, value_flat_width,
    value_offset, value_turn, value_mask, value_flat_offset, value_flat_turn, value_flat_mask, levels,
    keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride, copy_keys, copy_values,
    output, out_token_stride, out_head_stride, partial_sums, partial_state,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, SUBS: tl.constexpr,
    BLOCK: tl.constexpr, SLOT: tl.constexpr, MOST_TILES: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr,
    WHOLE: tl.constexpr, EXACT: tl.constexpr, FIRST: tl.constexpr, RECENT: tl.constexpr, COPY_GROUP: tl.constexpr,
    COPIES: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of rows, KV heads, shares of the tokens (one if ``WHOLE``)."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, before, context, token, member, position, valid, first, last = _rows(
        tile, query_start, context_lens, num_requests, MOST_TILES, G, M
    )
    if first <= last:
        low, high, each = _share(first, last, SUBS * 32, SPLITS, LEAST, WINDOW)
        low_tile = low + split * each
        high_tile = tl.minimum(low_tile + each, high)
        if low_tile < high_tile:
            d = tl.arange(0, DP)[None, :]
            if WHOLE:
                original = _load_rows(query, token, member, valid, head, token_stride, head_stride_q, G, D, DP)
                spectral, flat, center = _rotated_queries(
                    original, head, key_basis, key_center, key_width, key_flat_width, page_factor, M, D, DP
                )
                spectral, flat = rounded(spectral, EMULATE), rounded(flat, EMULATE)
            else:
                at = token.to(tl.int64) * (HEADS * G) + head * G + member
                there = valid[:, None] & (d < D)
                spectral = tl.load(rotated + at[:, None] * D + d, mask=there, other=0.0)
                flat = tl.load(flat_rotated + at[:, None] * D + d, mask=there, other=0.0)
                center = tl.load(centers + at, mask=valid, other=0.0)
            sums, peak, total = _over_pages(
                spectral, flat, center, head, request, before, context, position, first, last, low_tile, high_tile,
                pages, block_stride, head_stride, block_table, table_stride, exact_rows,
                key_offset, key_turn, key_mask, key_flat_offset, key_flat_turn, key_flat_mask, key_half,
                value_offset, value_turn, value_mask, value_flat_offset, value_flat_turn, value_flat_mask,
                value_center, value_width, value_flat_width, levels,
                D, DP, M, SUBS, BLOCK, SLOT, EXACT, FIRST, RECENT, SOFT_CAP, WINDOW, EMULATE,
            )  # fmt: skip
            if WHOLE:
                _finish(
                    sums, peak, total, original, factor, head, request, before, token, member, position, valid,
                    first, last, keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride,
                    exact_rows, copy_keys, copy_values, value_basis, output, out_token_stride, out_head_stride,
                    query_start, HEADS, G, D, DP, M, COPIES, EXACT, FIRST, RECENT, COPY_GROUP, SOFT_CAP, WINDOW, EMULATE,
                )  # fmt: skip
            else:
                m = tl.arange(0, M)
                at = ((tile * HEADS + head) * SPLITS + split).to(tl.int64) * M + m
                tl.store(partial_sums + at[:, None] * D + d, sums, mask=valid[:, None] & (d < D))
                tl.store(partial_state + at * 2, peak)
                tl.store(partial_state + at * 2 + 1, total)


@triton.jit(do_not_specialize=["num_requests"])
def finish_kernel(
    query, token_stride, head_stride_q, factor, query_start, context_lens, num_requests, exact_rows, value_basis,
    keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride, copy_keys, copy_values,
    output, out_token_stride, out_head_stride, partial_sums, partial_state,
    HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, SUBS: tl.constexpr,
    MOST_TILES: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, EXACT: tl.constexpr, FIRST: tl.constexpr,
    RECENT: tl.constexpr, COPY_GROUP: tl.constexpr, COPIES: tl.constexpr, SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Merge a tile's shares in order; grid: tiles of rows, KV heads."""
    tile, head = tl.program_id(0), tl.program_id(1)
    request, before, _, token, member, position, valid, first, last = _rows(
        tile, query_start, context_lens, num_requests, MOST_TILES, G, M
    )
    if first <= last:
        d, m = tl.arange(0, DP)[None, :], tl.arange(0, M)
        low, high, each = _share(first, last, SUBS * 32, SPLITS, LEAST, WINDOW)
        sums = tl.zeros((M, DP), tl.float32)
        total = tl.zeros((M,), tl.float32)
        peak = tl.full((M,), float("-inf"), tl.float32)
        for split in range(tl.cdiv(high - low, each)):
            at = ((tile * HEADS + head) * SPLITS + split).to(tl.int64) * M + m
            part = tl.load(partial_sums + at[:, None] * D + d, mask=valid[:, None] & (d < D), other=0.0)
            other_peak, other_total = tl.load(partial_state + at * 2), tl.load(partial_state + at * 2 + 1)
            now = tl.maximum(peak, other_peak)
            safe = tl.maximum(now, -1e30)
            keep, add = tl.exp2(peak - safe), tl.exp2(other_peak - safe)
            sums = sums * keep[:, None] + part * add[:, None]
            total = total * keep + other_total * add
            peak = now
        original = _load_rows(query, token, member, valid, head, token_stride, head_stride_q, G, D, DP)
        _finish(
            sums, peak, total, original, factor, head, request, before, token, member, position, valid,
            first, last, keys, key_token_stride, key_head_stride, values, value_token_stride, value_head_stride,
            exact_rows, copy_keys, copy_values, value_basis, output, out_token_stride, out_head_stride,
            query_start, HEADS, G, D, DP, M, COPIES, EXACT, FIRST, RECENT, COPY_GROUP, SOFT_CAP, WINDOW, EMULATE,
        )  # fmt: skip

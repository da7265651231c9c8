// The exact tier: copies are written, scored and summed as they are, in bf16.
#pragma once
#include "work.h"

namespace {

// Copies the i-th of the step's tokens that the plan keeps.
inline void write_copy(const Layer& layer, const StepCall& call, int64_t i, float* line) {
  for (int64_t head = 0; head < layer.heads; head++) {
    const int64_t at = copy_at(call, layer, call.write_rows[i], head);
    for (const bool keys : {true, false}) {
      uint16_t* to = (keys ? call.copy_keys : call.copy_values) + at;
      read_row(keys ? call.keys : call.values, call.write_tokens[i], head, layer.dim, line);
      for (int64_t c = 0; c < layer.dim; c++) to[c] = bf16_of(line[c]);
    }
  }
}

// The pool's rows of a group's positions before the step: -1 without a copy.
inline void pool_rows(const Work& w, int64_t first, int32_t* rows) {
  const int32_t* table = w.call.exact_rows + w.item.request * (w.call.first + w.call.recent);
  const int64_t start = std::max<int64_t>(w.before - w.call.recent, 0);
  const int64_t low = std::max(first, start), high = std::min(first + vs::kGroup, w.before);
  std::fill(rows, rows + vs::kGroup, -1);
  if (low < high) std::copy(table + w.call.first + low - start, table + w.call.first + high - start, rows + low - first);
  for (int64_t p = first; p < std::min<int64_t>(first + vs::kGroup, std::min<int64_t>(w.call.first, w.before)); p++)
    rows[p - first] = table[p];
}

// Which of a group's positions have an exact copy that some row of the item may read; and where those in the pool lie.
inline uint32_t copied(const Work& w, int64_t first, int32_t* lines) {
  if (!w.any_near(first, vs::kGroup)) return 0;
  const uint32_t candidates =
      between(0, w.call.first, first) | between(w.first_query - w.call.recent + 1, w.last_query + 1, first);
  if (!candidates) return 0;
  alignas(64) int32_t rows[vs::kGroup];
  pool_rows(w, first, rows);
  uint32_t held = 0;
  for (int h = 0; h < 2; h++) {
    const v16i row = load_integers(rows + h * vs::kHalf), entry = row >> w.call.copy_shift;
    const v16i line = ((entry * static_cast<int32_t>(w.layer.heads) + static_cast<int32_t>(w.item.head)) << w.call.copy_shift) +
                      (row & ((1 << w.call.copy_shift) - 1));
    store_integers(lines + h * vs::kHalf, line);
    held |= (~signs(row) & 0xffff) << h * vs::kHalf;
  }
  return candidates & (held | between(w.before, w.context, first));
}

// The copies of a group's positions in mask as rows of bf16, in the pool, in the step's own tensor, or in a buffer if that
// has another type; rows of zeros for all others.
inline void copies_of(Work& w, const Tile& tile, int g, bool keys, const uint16_t** rows) {
  const int64_t first = tile.first(g);
  const uint32_t mask = tile.any_exact[g];
  const uint16_t* pool = keys ? w.call.copy_keys : w.call.copy_values;
  const uint32_t own_tokens = mask & between(w.before, w.context, first), pooled = mask & ~own_tokens;
  for (int t = 0; t < vs::kGroup; t++) rows[t] = pooled >> t & 1 ? pool + tile.copy_lines[g][t] * w.dim : w.scratch.zeros;
  const Rows& own = keys ? w.call.keys : w.call.values;
  for (uint32_t left = own_tokens; left; left &= left - 1) {
    const int t = __builtin_ctz(left);
    const int64_t token = w.call.query_start[w.item.request] + first + t - w.before;
    if (own.dtype == kBFloat16) {
      rows[t] = static_cast<const uint16_t*>(own.data) + token * own.token_stride + w.item.head * own.head_stride;
      continue;
    }
    uint16_t* buffer = w.scratch.copies + t * w.dim;
    read_row(own, token, w.item.head, w.dim, w.scratch.vectors);
    for (int64_t c = 0; c < w.dim; c++) buffer[c] = bf16_of(w.scratch.vectors[c]);
    rows[t] = buffer;
  }
}

// Puts a row's scores of half a group's copies over those of pages where it reads them.
VS_INLINE void put_scores(Work& w, int64_t row, v16f scores, uint32_t mask, int64_t first, int g, int h) {
  const uint32_t read = w.seen(row, first) >> h * vs::kHalf & mask & w.near(row, first) >> h * vs::kHalf;
  float* at = w.scratch.scores + row * kTile + g * vs::kGroup + h * vs::kHalf;
  store(at, select(lanes(read), scores * w.score_scale, load(at)));
}

// Up to R rows over half a group: a vector of sums holds all of them for as many tokens as it has room for.
template <int R>
void exact_rows(Work& w, const uint16_t* const* keys, uint32_t mask, int64_t start, int64_t first, int g, int h) {
  constexpr int kTokens = 16 / R;
  const int64_t parts = padded(w.dim) / 32, last = w.rows - 1;
  alignas(64) float scores[R][16];
  for (int t = 0; t < 16; t += kTokens) {
    if (!(mask >> t & ((1u << kTokens) - 1))) continue;
    v16f products_of[16];  // [row][token]
    clear<16>(products_of);
    for (int64_t part = 0; part < parts; part++) {
      Pair query[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) query[i] = w.queries.exact[std::min(start + i, last) * parts + part];
#pragma GCC unroll 16
      for (int k = 0; k < kTokens; k++) {
        const Pair key = Pairs::of_bf16(channels(keys[t + k], part, w.dim));
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) products_of[i * kTokens + k] = Pairs::dot(products_of[i * kTokens + k], key, query[i]);
      }
    }
    if (!start) w.next.copies(kTokens);
    alignas(64) float found[16];
    store(found, sums(products_of));
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) memcpy(&scores[i][t], found + i * kTokens, kTokens * sizeof(float));
  }
  for (int i = 0; i < R && start + i < w.rows; i++) put_scores(w, start + i, load(scores[i]), mask, first, g, h);
}

// All rows over half a group by matrices of keys, channels by tokens.
inline void matrix_exact_rows(Work& w, const uint16_t* const* keys, uint32_t mask, int64_t first, int g, int h) {
  const int64_t parts = padded(w.dim) / 32;
  for (int64_t part = 0; part < parts; part++) {
    v16u rows[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) rows[t] = channels(keys[t], part, w.dim);
    transpose(rows);
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) w.scratch.some_quads[part * 16 + k] = (Quad)rows[k];
    w.next.copies(static_cast<int>(16 / parts));
  }
  for (int64_t start = 0; start < w.rows; start += vs::kMatrixRows) {
    Matrices::pairs(w.queries.exact + start * parts, parts * sizeof(Pair), w.scratch.some_quads, parts, w.scratch.block);
    for (int64_t r = start; r < std::min(start + vs::kMatrixRows, w.rows); r++)
      put_scores(w, r, load(w.scratch.block + 16 * (r - start)), mask, first, g, h);
  }
}

// Scores of copies, where a row reads them, over those of pages.
inline void exact_scores(Work& w, const Tile& tile, int g) {
  const uint16_t* rows[vs::kGroup];
  copies_of(w, tile, g, true, rows);
  for (int h = 0; h < 2; h++) {
    const uint32_t half = tile.any_exact[g] >> h * vs::kHalf & 0xffff;
    if (!half) continue;
    const uint16_t* const* at = rows + h * vs::kHalf;
    if (vs::kMatrices) {
      matrix_exact_rows(w, at, half, tile.first(g), g, h);
      continue;
    }
    for (int64_t r = 0; r < w.rows;) {
      switch (w.rows - r) {
        case 1: exact_rows<1>(w, at, half, r, tile.first(g), g, h); r += 1; break;
        case 2: exact_rows<2>(w, at, half, r, tile.first(g), g, h); r += 2; break;
        default: exact_rows<4>(w, at, half, r, tile.first(g), g, h); r += 4;
      }
    }
  }
}

// 32 channels of two tokens as pairs of tokens: of the even channels, and of the odd ones.
struct TokenPairs {
  v16u even, odd;
};
VS_INLINE TokenPairs token_pairs(const uint16_t* const* values, int t, int64_t part, int64_t dim) {
  const v16u a = channels(values[t], part, dim), b = channels(values[16 + t], part, dim);
  return {(a & 0xffffu) | b << 16, a >> 16 | (b & 0xffff0000u)};
}

// R rows' outputs of a group's copies: pairs of tokens, channels in lanes.
template <int R>
void add_copies(Work& w, const uint16_t* const* values, uint32_t tokens, int64_t first, int g, State& state) {
  const int64_t parts = padded(w.dim) / 32;
  const PairScalar* weights = w.scratch.exact_pairs + (first * kTileGroups + g) * 16;
  for (int64_t part = 0; part < parts; part++) {
    float* out = state.plain(first) + part * 32;
    v16f even[R], odd[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      even[i] = load(out + i * state.width);
      odd[i] = load(out + i * state.width + 16);
    }
    for (uint32_t left = tokens; left; left &= left - 1) {
      const int t = __builtin_ctz(left);
      const TokenPairs pairs = token_pairs(values, t, part, w.dim);
      const Pair low = Pairs::of_bf16(pairs.even), high = Pairs::of_bf16(pairs.odd);
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) {
        const Pair weight = Pairs::broadcast(weights[i * kTileGroups * 16 + t]);
        even[i] = Pairs::dot(even[i], low, weight);
        odd[i] = Pairs::dot(odd[i], high, weight);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      store(out + i * state.width, even[i]);
      store(out + i * state.width + 16, odd[i]);
    }
  }
}

// All rows' outputs of a group's copies by matrices of values, tokens by channels.
inline void matrix_add_copies(Work& w, const uint16_t* const* values, int g, State& state) {
  Quad *even = w.scratch.some_quads, *odd = even + vs::kMatrixRows;
  for (int64_t part = 0; part < padded(w.dim) / 32; part++) {
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) {
      const TokenPairs pairs = token_pairs(values, t, part, w.dim);
      even[t] = (Quad)pairs.even;
      odd[t] = (Quad)pairs.odd;
    }
    for (int64_t start = 0; start < w.rows; start += vs::kMatrixRows)
      for (int half = 0; half < 2; half++) {
        Matrices::pairs(w.scratch.exact_pairs + (start * kTileGroups + g) * 16, kTileGroups * sizeof(Pair), half ? odd : even, 1,
                        w.scratch.block);
        for (int64_t r = start; r < std::min(start + vs::kMatrixRows, w.rows); r++) {
          float* out = state.plain(r) + part * 32 + half * 16;
          store(out, load(out) + load(w.scratch.block + 16 * (r - start)));
        }
      }
  }
}

inline void exact_outputs(Work& w, const Tile& tile, State& state) {
  for (int g = 0; g < tile.groups; g++) {
    if (!tile.any_exact[g]) continue;
    const uint16_t* rows[vs::kGroup];
    copies_of(w, tile, g, false, rows);
    if (vs::kMatrices) {
      matrix_add_copies(w, rows, g, state);
      continue;
    }
    const uint32_t tokens = (tile.any_exact[g] | tile.any_exact[g] >> 16) & 0xffff;
    for (int64_t r = 0; r < w.rows;) {
      switch (w.rows - r) {
        case 1: add_copies<1>(w, rows, tokens, r, g, state); r += 1; break;
        case 2: add_copies<2>(w, rows, tokens, r, g, state); r += 2; break;
        case 3: add_copies<3>(w, rows, tokens, r, g, state); r += 3; break;
        default: add_copies<4>(w, rows, tokens, r, g, state); r += 4;
      }
    }
  }
}

}  // namespace

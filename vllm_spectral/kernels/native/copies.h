// The exact tier: copies are written, scored and summed as they are, in bf16.
#pragma once
#include "work.h"

namespace {

// Of so many rows that are left, those that meet copies together.
inline int64_t together(int64_t left) {
  if (vs::kMatrices) return std::min<int64_t>(vs::kMatrixRows, left);
  return left >= 8 ? 8 : std::min<int64_t>(left, 4);
}

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

// Half a group's copied keys into the scratch, as a matrix of pairs of channels by tokens; the next item's copies are fetched meanwhile.
inline void turn_keys(Work& w, const uint16_t* const* keys) {
  const int64_t parts = padded(w.dim) / 32;
  for (int64_t part = 0; part < parts; part++) {
    v16u rows[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; t++) rows[t] = channels(keys[t], part, w.dim);
    transpose(rows);
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++) w.scratch.copied[part * 16 + k] = Pairs::of_bf16(rows[k]);
    w.next.copies(static_cast<int>(8 / parts));
  }
}

// Puts a row's scores of half a group's copies over those of pages where it reads them.
VS_INLINE void put_scores(Work& w, int64_t row, v16f scores, int g, int h) {
  const uint32_t read = w.scratch.exact[row * kTileGroups + g] >> h * vs::kHalf;
  float* at = w.scratch.scores + row * kTile + g * vs::kGroup + h * vs::kHalf;
  store(at, select(lanes(read), scores * w.score_scale, load(at)));
}

// R rows over half a group: lanes are tokens. Even and odd pairs of channels are summed apart, because each sum waits for itself.
template <int R>
void exact_rows(Work& w, int64_t start, int g, int h) {
  const int64_t parts = padded(w.dim) / 32;
  const Pair* query = w.queries.exact + start * parts;
  v16f sums_of[R][2];
  clear<2 * R>(&sums_of[0][0]);
  for (int64_t k = 0; k < 16 * parts; k += 2) {
    const Pair even = w.scratch.copied[k], odd = w.scratch.copied[k + 1];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      sums_of[i][0] = Pairs::dot(sums_of[i][0], even, Pairs::broadcast(Pairs::member(query + i * parts, k)));
      sums_of[i][1] = Pairs::dot(sums_of[i][1], odd, Pairs::broadcast(Pairs::member(query + i * parts, k + 1)));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) put_scores(w, start + i, sums_of[i][0] + sums_of[i][1], g, h);
}

// Scores of copies, where a row reads them, over those of pages.
inline void exact_scores(Work& w, const Tile& tile, int g) {
  const uint16_t* keys[vs::kGroup];
  copies_of(w, tile, g, true, keys);
  for (int h = 0; h < 2; h++) {
    const uint32_t half = tile.any_exact[g] >> h * vs::kHalf & 0xffff;
    if (!half) continue;
    turn_keys(w, keys + h * vs::kHalf);
    for (int64_t start = 0, count; start < w.rows; start += count) {
      count = together(w.rows - start);
      if (!(w.near_some(start, count, tile.first(g)) >> h * vs::kHalf & half)) continue;
      if (vs::kMatrices) {
        const int64_t parts = padded(w.dim) / 32;
        Matrices::pairs(w.queries.exact + start * parts, parts * sizeof(Pair), w.scratch.copied, parts, w.scratch.block);
        for (int64_t i = 0; i < count; i++) put_scores(w, start + i, load(w.scratch.block + 16 * i), g, h);
        continue;
      }
      switch (count) {
        case 1: exact_rows<1>(w, start, g, h); break;
        case 2: exact_rows<2>(w, start, g, h); break;
        case 3: exact_rows<3>(w, start, g, h); break;
        case 4: exact_rows<4>(w, start, g, h); break;
        default: exact_rows<8>(w, start, g, h);
      }
    }
  }
}

// A group's copied values into the scratch, as pairs of tokens, t and 16 + t: of each 32 channels the even ones, 16 vectors, then
// the odd ones.
inline void pair_values(Work& w, const uint16_t* const* values, uint32_t tokens) {
  for (int64_t part = 0; part < padded(w.dim) / 32; part++) {
    Pair* to = w.scratch.copied + part * 32;
    for (uint32_t left = tokens; left; left &= left - 1) {
      const int t = __builtin_ctz(left);
      if (!part) w.next.copies(1);
      const v16u a = channels(values[t], part, w.dim), b = channels(values[16 + t], part, w.dim);
      to[t] = Pairs::of_bf16((a & 0xffffu) | b << 16);
      to[16 + t] = Pairs::of_bf16(a >> 16 | (b & 0xffff0000u));
    }
  }
}

// R rows' outputs of a group's copies: pairs of tokens, channels in lanes.
template <int R>
void add_copies(Work& w, uint32_t tokens, int64_t first, int g, State& state) {
  const int64_t parts = padded(w.dim) / 32;
  const PairScalar* weights = w.scratch.exact_pairs + (first * kTileGroups + g) * 16;
  for (int64_t part = 0; part < parts; part++) {
    float* out = state.plain(first) + part * 32;
    const Pair* values = w.scratch.copied + part * 32;
    v16f even[R], odd[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      even[i] = load(out + i * state.width);
      odd[i] = load(out + i * state.width + 16);
    }
    for (uint32_t left = tokens; left; left &= left - 1) {
      const int t = __builtin_ctz(left);
      const Pair low = values[t], high = values[16 + t];
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const Pair weight = Pairs::broadcast(weights[i * kTileGroups * 16 + t]);
        even[i] = Pairs::dot(even[i], low, weight);
        odd[i] = Pairs::dot(odd[i], high, weight);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      store(out + i * state.width, even[i]);
      store(out + i * state.width + 16, odd[i]);
    }
  }
}

// Up to 16 rows' outputs of a group's copies by matrices of values, tokens by channels.
inline void matrix_add_copies(Work& w, int64_t first, int64_t count, int g, State& state) {
  for (int64_t part = 0; part < padded(w.dim) / 32; part++)
    for (int odd = 0; odd < 2; odd++) {
      const PairScalar* weights = w.scratch.exact_pairs + (first * kTileGroups + g) * 16;
      Matrices::pairs(reinterpret_cast<const Pair*>(weights), kTileGroups * sizeof(Pair),
                      w.scratch.copied + part * 32 + odd * 16, 1, w.scratch.block);
      for (int64_t i = 0; i < count; i++) {
        float* out = state.plain(first + i) + part * 32 + odd * 16;
        store(out, load(out) + load(w.scratch.block + 16 * i));
      }
    }
}

inline void exact_outputs(Work& w, const Tile& tile, State& state) {
  for (int g = 0; g < tile.groups; g++) {
    if (!tile.any_exact[g]) continue;
    const uint16_t* values[vs::kGroup];
    copies_of(w, tile, g, false, values);
    // Of matrices all: their rows must be numbers.
    pair_values(w, values, vs::kMatrices ? 0xffff : (tile.any_exact[g] | tile.any_exact[g] >> 16) & 0xffff);
    for (int64_t start = 0, count; start < w.rows; start += count) {
      count = together(w.rows - start);
      const uint32_t some = w.near_some(start, count, tile.first(g)) & tile.any_exact[g], tokens = (some | some >> 16) & 0xffff;
      if (vs::kMatrices) {
        if (tokens) matrix_add_copies(w, start, count, g, state);
        continue;
      }
      switch (count) {
        case 1: add_copies<1>(w, tokens, start, g, state); break;
        case 2: add_copies<2>(w, tokens, start, g, state); break;
        case 3: add_copies<3>(w, tokens, start, g, state); break;
        case 4: add_copies<4>(w, tokens, start, g, state); break;
        default: add_copies<8>(w, tokens, start, g, state);
      }
    }
  }
}

}  // namespace

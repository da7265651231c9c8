// Softmax of a tile: scores become weights, of tokens read from pages times their scales, in the forms in which they meet values.
#pragma once
#include "scores.h"
#include "work.h"

namespace {

VS_INLINE v16f soft_capped(v16f x, float cap) {
  // cap * tanh(x / cap), by e ** (-2 |x| / cap); x and the result are in bits.
  const v16f magnitude = select(x < 0.0f, -x, x);
  const v16f e = exp2_above(magnitude * (-2.0f / cap), 0);
  const v16f y = (1.0f - e) / (1.0f + e) * (cap * kLog2e);
  return select(x < 0.0f, -y, y);
}

// Bits that scores may lie above a row's base, or all of a tile below it. Between 2 ** -60 and 2 ** 60 nothing is lost.
constexpr float kRoom = 60;

// What a row's weights over a tile come to: their sum, the largest of the scaled ones, and the largest score.
struct Weighed {
  v16f total = {}, largest = {}, most = splat(kNone);
};

// Weights of R rows from the first on over a tile, to their bases, the i-th and following ones of those whose bytes are made
// together. kWhole: the tile is whole; kLate: its scores are made here.
template <bool kWhole, bool kLate, int R>
VS_INLINE void weights_of(const Work& w, const Tile& tile, int64_t first, int64_t i, const float* base, Weighed* found) {
  Scratch& s = w.scratch;
  const float* scores = s.scores + first * kTile;
  float* scaled = s.scaled + i * kTile;
  const bool pairs = !w.value_singles.fields.empty();
  for (int g = 0; g < tile.groups; g++) {
    const int64_t at = g * vs::kGroup;
    v16f x[R][2];
    if constexpr (kLate) late_scores<R>(w, tile, first, g, x);
#pragma GCC unroll 4
    for (int k = 0; k < R; k++) {
      const int64_t r = first + k;
      v16f weight[2], read[2];
      for (int h = 0; !kLate && h < 2; h++) x[k][h] = load(scores + k * kTile + at + h * vs::kHalf);
      uint32_t exact = 0;
      if (!kWhole && (!tile.whole[g] || w.call.soft_cap > 0)) {
        const uint32_t visible = tile.whole[g] ? ~0u : s.seen[r * kTileGroups + g];
        if (!tile.whole[g]) exact = s.exact[r * kTileGroups + g];
        for (int h = 0; h < 2; h++) {
          if (w.call.soft_cap > 0) x[k][h] = soft_capped(x[k][h], w.call.soft_cap);
          x[k][h] = select(lanes(visible >> 16 * h), x[k][h], splat(kNone));
        }
      }
      found[k].most = larger(found[k].most, larger(x[k][0], x[k][1]));
      for (int h = 0; h < 2; h++) {
        weight[h] = exp2_above(x[k][h], base[k]);
        found[k].total = found[k].total + weight[h];
      }
      if (!kWhole && tile.any_exact[g]) {
        v16f copied[2];
        for (int h = 0; h < 2; h++) {
          const v16i from_copy = lanes(exact >> 16 * h);
          copied[h] = select(from_copy, weight[h], v16f{});
          weight[h] = select(from_copy, v16f{}, weight[h]);
        }
        Pairs::spread(Pairs::of(copied[0], copied[1]), s.exact_pairs + (r * kTileGroups + g) * 16);
      }
      if (!kWhole && !tile.any_paged[g]) continue;
      for (int h = 0; h < 2; h++) read[h] = weight[h] * tile.value_scale[g][h];
      if (tile.value_flat[g])
        for (int h = 0; h < 2; h++) {
          store(s.paged + r * kTile + at + h * vs::kHalf, weight[h]);
          read[h] = select(lanes(tile.value_flat[g] >> 16 * h), v16f{}, read[h]);
        }
      if constexpr (vs::kQuads)
        for (int h = 0; h < 2; h++) {
          store(scaled + k * kTile + at + h * vs::kHalf, read[h]);
          found[k].largest = larger(found[k].largest, read[h]);
        }
      if (pairs) s.paged_pairs[r * kTileGroups + g] = Pairs::of(read[0], read[1]);
    }
  }
}

// Adds R rows' weights to their state; the largest of the scaled ones of each. Scores are as good as never so large or so small
// that their row must move to another base.
template <bool kWhole, bool kLate, int R>
void weigh_rows(const Work& w, const Tile& tile, int64_t first, int64_t i, State& state, float* largest) {
  float base[R];
  Weighed found[R];
  for (int k = 0; k < R; k++) base[k] = state.base[first + k] == kNone ? 0.0f : state.base[first + k];
  weights_of<kWhole, kLate, R>(w, tile, first, i, base, found);
  for (int k = 0; k < R; k++) {
    const int64_t r = first + k;
    const float most = peak(found[k].most);
    largest[k] = 0;
    if (most == kNone) continue;
    const bool fresh = state.base[r] == kNone;
    state.base[r] = base[k];
    if (most > base[k] + kRoom || (fresh && most < base[k] - kRoom)) {
      if (fresh)
        state.base[r] = std::floor(most);  // nothing to move
      else
        state.move(r, std::floor(most));
      found[k] = Weighed();
      weights_of<kWhole, kLate, 1>(w, tile, r, i + k, state.base + r, found + k);
    }
    state.total[r] += sum(found[k].total);
    if (vs::kQuads) largest[k] = peak(found[k].largest);
  }
}

template <bool kWhole, bool kLate>
void weigh_some(const Work& w, const Tile& tile, int64_t first, int64_t count, State& state, float* largest) {
  constexpr int kRowsAtOnce = kLate ? 4 : 1;  // late scores of two rows share what they are made of
  int64_t i = 0;
  for (; i + kRowsAtOnce <= count; i += kRowsAtOnce)
    weigh_rows<kWhole, kLate, kRowsAtOnce>(w, tile, first + i, i, state, largest + i);
  for (; i < count; i++) weigh_rows<kWhole, kLate, 1>(w, tile, first + i, i, state, largest + i);
}

// Scaled weights of R rows from the first on as quads of bytes, of which a row's largest weight is 254. Together, because
// each row's errors are carried on from group to group, a chain of operations that wait for one another.
template <int R>
void to_bytes(Work& w, const Tile& tile, int64_t first, const float* largest) {
  float inverse[R];
  v16f carried[R][2];
  clear<2 * R>(&carried[0][0]);
  for (int i = 0; i < R; i++) {
    inverse[i] = largest[i] > 0 ? 254 / largest[i] : 0.0f;
    w.scratch.weight_step[first + i] = largest[i] / 254;
  }
  uint8_t* matrix = w.scratch.paged_bytes + first * kTile;
  const bool matrices = vs::is_matrix(w.rows);
  for (int g = 0; g < tile.groups + (matrices ? tile.groups % 2 : 0); g++, matrix += vs::kGroup) {
    if (g == tile.groups || !tile.any_paged[g]) {
      for (int i = 0; matrices && i < R; i++) memset(matrix + i * kTile, 0, vs::kGroup);
      continue;
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      Quad bytes[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const v16f x = load(w.scratch.scaled + i * kTile + g * vs::kGroup + h * vs::kHalf) * inverse[i] + carried[i][h];
        bytes[h] = Quads::rounded(x);
        carried[i][h] = x - Quads::numbers(bytes[h]);
      }
      if (matrices)
        Quads::store_spread(matrix + i * kTile, bytes[0], bytes[1]);
      else
        w.scratch.paged_quads[(first + i) * kTileGroups + g] = Quads::spread(bytes[0], bytes[1]);
    }
  }
}

inline void weigh(Work& w, const Tile& tile, State& state) {
  for (int64_t r = 0; r < w.rows; r += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, w.rows - r);
    float largest[kTogether];
    if (vs::kMatrices && tile.late)
      weigh_some<true, true>(w, tile, r, count, state, largest);
    else if (tile.all_whole && w.call.soft_cap <= 0)
      weigh_some<true, false>(w, tile, r, count, state, largest);
    else
      weigh_some<false, false>(w, tile, r, count, state, largest);
    if constexpr (!vs::kQuads) continue;
    switch (count) {
      case 1: to_bytes<1>(w, tile, r, largest); break;
      case 2: to_bytes<2>(w, tile, r, largest); break;
      case 3: to_bytes<3>(w, tile, r, largest); break;
      default: to_bytes<kTogether>(w, tile, r, largest);
    }
  }
}

}  // namespace

// Softmax of a tile: scores become weights, of tokens read from pages times their scales, in the forms in which they meet values.
#pragma once
#include "work.h"

namespace {

VS_INLINE v16f soft_capped(v16f x, float cap) {
  // cap * tanh(x / cap), by e ** (-2 |x| / cap).
  const v16f magnitude = select(x < 0.0f, -x, x);
  const v16f e = exp_negative(magnitude * (-2.0f / cap));
  const v16f y = (1.0f - e) / (1.0f + e) * cap;
  return select(x < 0.0f, -y, y);
}

// Weights of the r-th row, the i-th of those whose bytes are made together; returns the largest of the scaled ones.
// kWhole: the tile is whole.
template <bool kWhole>
float weigh_row(Work& w, const Tile& tile, int64_t r, int64_t i, State& state) {
  Scratch& s = w.scratch;
  float *scores = s.scores + r * kTile, *scaled = s.scaled + i * kTile;
  const bool pairs = !w.value_singles.fields.empty();
  v16f most = splat(kNone);
  uint32_t exact[kTileGroups];
  for (int g = 0; g < tile.groups; g++) {
    if (!kWhole) exact[g] = 0;
    float* at = scores + g * vs::kGroup;
    if (kWhole || (tile.whole[g] && w.call.soft_cap <= 0)) {
      most = larger(most, larger(load(at), load(at + vs::kHalf)));
      continue;
    }
    const uint32_t visible = tile.whole[g] ? ~0u : w.seen(r, tile.first(g));
    if (!tile.whole[g]) exact[g] = visible & tile.copies[g] & w.near(r, tile.first(g));
    for (int h = 0; h < 2; h++) {
      v16f x = load(at + h * vs::kHalf);
      if (w.call.soft_cap > 0) x = soft_capped(x, w.call.soft_cap);
      x = select(lanes(visible >> 16 * h), x, splat(kNone));
      store(at + h * vs::kHalf, x);
      most = larger(most, x);
    }
  }
  const float tile_peak = peak(most);
  if (tile_peak == kNone) {
    for (int g = 0; g < tile.groups; g++) {
      const v16f zero = {};
      s.paged_pairs[r * kTileGroups + g] = Pairs::of(zero, zero);
      Pairs::spread(Pairs::of(zero, zero), s.exact_pairs + (r * kTileGroups + g) * 16);
      for (int h = 0; h < 2; h++) {
        store(s.paged + r * kTile + g * vs::kGroup + h * vs::kHalf, zero);
        store(scaled + g * vs::kGroup + h * vs::kHalf, zero);
      }
    }
    return 0;
  }
  const float now = std::max(state.peak[r], tile_peak);
  const float keep = exp_negative(splat(state.peak[r] - now))[0];
  state.peak[r] = now;
  v16f total = {}, largest = {};
  for (int g = 0; g < tile.groups; g++) {
    const int64_t at = g * vs::kGroup;
    v16f weight[2], read[2];
    for (int h = 0; h < 2; h++) {
      weight[h] = exp_negative(load(scores + at + h * vs::kHalf) - now);
      total = total + weight[h];
    }
    if (!kWhole && tile.any_exact[g]) {
      v16f copied[2];
      for (int h = 0; h < 2; h++) {
        const v16i from_copy = lanes(exact[g] >> 16 * h);
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
        store(scaled + at + h * vs::kHalf, read[h]);
        largest = larger(largest, read[h]);
      }
    if (pairs) s.paged_pairs[r * kTileGroups + g] = Pairs::of(read[0], read[1]);
  }
  state.total[r] = state.total[r] * keep + sum(total);
  if (keep != 1.0f) {
    float* row = state.rotated(r);
    for (int64_t c = 0; c < state.width; c += 16) store(row + c, load(row + c) * keep);
  }
  return vs::kQuads ? peak(largest) : 0;
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
  for (int g = 0; g < tile.groups; g++) {
    if (!tile.any_paged[g]) continue;
#pragma GCC unroll 4
    for (int i = 0; i < R; i++) {
      Quad bytes[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        const v16f x = load(w.scratch.scaled + i * kTile + g * vs::kGroup + h * vs::kHalf) * inverse[i] + carried[i][h];
        bytes[h] = Quads::rounded(x);
        carried[i][h] = x - Quads::numbers(bytes[h]);
      }
      if (vs::is_matrix(w.rows))
        Quads::store_spread(matrix + i * kTile, bytes[0], bytes[1]);
      else
        w.scratch.paged_quads[(first + i) * kTileGroups + g] = Quads::spread(bytes[0], bytes[1]);
    }
    matrix += vs::kGroup;
  }
}

inline void weigh(Work& w, const Tile& tile, State& state) {
  for (int64_t r = 0; r < w.rows; r += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, w.rows - r);
    float largest[kTogether];
    for (int64_t i = 0; i < count; i++)
      largest[i] = tile.all_whole && w.call.soft_cap <= 0 ? weigh_row<true>(w, tile, r + i, i, state)
                                                          : weigh_row<false>(w, tile, r + i, i, state);
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

// Scores of keys in pages: a lane is a token, and a query's pair or quad of channels is broadcast.
#pragma once
#include "work.h"

namespace {

template <int R>
VS_INLINE void add_scores(const Pair& a, const Pair& b, const PairScalar* query, v16f (*sums)[2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Pair q = Pairs::broadcast(query[r]);
    sums[r][0] = Pairs::dot(sums[r][0], a, q);
    sums[r][1] = Pairs::dot(sums[r][1], b, q);
  }
}

// Sums over quads, of R rows from the first on: what they start with, what they come to, and one quad of both halves.
template <int R>
VS_INLINE void start_counts(const Work& w, int64_t first, Quad (*counts)[2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) counts[r][0] = counts[r][1] = splat(w.queries.quads.bias[first + r]);
}

template <int R>
VS_INLINE void add_counts(Quad a, Quad b, const uint32_t* query, Quad (*counts)[2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Quad q = splat(static_cast<int32_t>(query[r]));
    counts[r][0] = Quads::dot(counts[r][0], a, q);
    counts[r][1] = Quads::dot(counts[r][1], b, q);
  }
}

template <int R>
VS_INLINE void end_counts(const Work& w, int64_t first, const Quad (*counts)[2], v16f (*sums)[2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) sums[r][h] = Quads::opaque(Quads::numbers(counts[r][h]) * w.queries.quads.step[first + r]);
}

template <int R>
void fused_scores(Work& w, const uint8_t* words, const uint8_t* next, const v16f* scale, int g) {
  v16f sums[R][2];
  const vs::Field* fields = w.key_singles.fields.data();
  const int64_t count = w.key_singles.fields.size(), narrow = w.key_singles.narrow;
  const uint8_t* upper = words + w.layer.key_half[w.item.head];
  const PairScalar* queries = w.queries.paged;
  int64_t line = 0;  // of the group to come that is fetched next
  if constexpr (vs::kQuads) {
    Quad counts[R][2];
    start_counts<R>(w, 0, counts);
    const vs::Quad* quad = w.key_quads.quads.data();
    const vs::Quad *const alike = quad + w.key_quads.alike, *const end = quad + w.key_quads.size();
    const uint32_t* bytes = w.queries.quads.bytes;
    while (quad < alike) {
      const int32_t bits = quad->bits;
      const Quad table = Quads::table(w.layer.byte_levels, bits, 128);
      for (; quad < alike && quad->bits == bits; quad++, bytes += R, next += vs::kVectorBytes) {
        const Quad low = Quads::expand<true>(*quad, words + quad->offset, table);
        add_counts<R>(low, Quads::expand<true>(*quad, upper + quad->offset, table), bytes, counts);
        __builtin_prefetch(next, 0, 3);
      }
    }
    const Quad table = Quads::table(w.layer.byte_levels, 0, 128);
    for (; quad < end; quad++, bytes += R, next += vs::kVectorBytes) {
      const Quad low = Quads::expand<false>(*quad, words + quad->offset, table);
      add_counts<R>(low, Quads::expand<false>(*quad, upper + quad->offset, table), bytes, counts);
      __builtin_prefetch(next, 0, 3);
    }
    line = w.key_quads.size();
    end_counts<R>(w, 0, counts, sums);
  } else {
    clear<2 * R>(&sums[0][0]);
  }
  for (int64_t i = 0; i < narrow; i++) {
    const Pairs::Table table = Pairs::table(fields[i]);
    add_scores<R>(Pairs::expand(table, words + fields[i].offset), Pairs::expand(table, upper + fields[i].offset),
                  queries + fields[i].channel * R, sums);
    __builtin_prefetch(next, 0, 3);
    next += vs::kVectorBytes;
    line++;
  }
  for (int64_t i = narrow; i < count; i++) {
    const Pairs::Table table = Pairs::table(fields[i]);
    add_scores<R>(Pairs::expand_any(table, words + fields[i].offset), Pairs::expand_any(table, upper + fields[i].offset),
                  queries + fields[i].channel * R, sums);
  }
  for (; line < w.key_lines; line++, next += vs::kVectorBytes) __builtin_prefetch(next, 0, 3);
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) store(w.scratch.scores + r * kTile + g * vs::kGroup + h * vs::kHalf, sums[r][h] * scale[h]);
}

// Scores of R rows from the first on, over a group that is expanded.
template <int R>
void matrix_rows(Work& w, const Pair* pairs, int64_t first, const v16f* scale, int g) {
  v16f sums[R][2];
  if constexpr (vs::kQuads) {
    Quad counts[R][2];
    start_counts<R>(w, first, counts);
    const Quad* found = w.scratch.key_counts + (g * kSlice + first) * 2;
    for (int64_t r = 0; vs::kMatrices && r < R; r++)
      for (int h = 0; h < 2; h++) counts[r][h] = counts[r][h] + found[2 * r + h];
    for (int64_t i = 0; !vs::kMatrices && i < w.key_quads.size(); i++)
      add_counts<R>(w.scratch.key_quads[2 * i], w.scratch.key_quads[2 * i + 1],
                    w.queries.quads.bytes + i * w.rows + first, counts);
    end_counts<R>(w, first, counts, sums);
  } else {
    clear<2 * R>(&sums[0][0]);
  }
  for (const vs::Field& field : w.key_singles.fields) {
    const Pair a = *pairs++, b = *pairs++;
    add_scores<R>(a, b, w.queries.paged + field.channel * w.rows + first, sums);
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) store(w.scratch.scores + (first + r) * kTile + g * vs::kGroup + h * vs::kHalf, sums[r][h] * scale[h]);
}

// A group's keys as quads and pairs in the scratch: of matrices once for all slices of an item.
inline void expand_keys(Work& w, const Tile& tile, int g, Quad* quads, Pair* pairs) {
  const uint8_t* words = tile.pages[g] + w.layer.key_start[w.item.head];
  const int64_t half = w.layer.key_half[w.item.head], size = w.key_quads.size();
  for (int64_t i = 0; i < size; i++) {
    const vs::Quad& quad = w.key_quads[i];
    quads[2 * i] = Quads::expand_any(quad, words + quad.offset, w.layer.byte_levels, 128);
    quads[2 * i + 1] = Quads::expand_any(quad, words + half + quad.offset, w.layer.byte_levels, 128);
  }
  for (int64_t line = 0; line < w.key_lines; line++) __builtin_prefetch(tile.ahead[g] + line * vs::kVectorBytes, 0, 3);
  for (const vs::Field& field : w.key_singles.fields) {
    const Pairs::Table table = Pairs::table(field);
    *pairs++ = Pairs::expand_any(table, words + field.offset);
    *pairs++ = Pairs::expand_any(table, words + half + field.offset);
  }
}

// What matrices sum of a group's quads, for all rows; of all groups before anything is made of it, so that nothing waits.
inline void count_scores(Work& w, Tile& tile, int g) {
  const int64_t fours = vs::whole_tiles(w.key_quads.size());
  Quad* quads = w.scratch.key_quads + 2 * fours * g;
  if (!(tile.keys_ready >> g & 1)) {
    expand_keys(w, tile, g, quads, w.scratch.keys + w.dim * g);
    tile.keys_ready |= 1u << g;
  }
  Matrices::scores(w.queries.quads.bytes, quads, fours, w.rows, w.scratch.key_counts + g * kSlice * 2);
}

// Scores of a group for many rows.
inline void matrix_scores(Work& w, const Tile& tile, int g) {
  const Pair* pairs = w.scratch.keys + (vs::kMatrices ? w.dim * g : 0);
  if (!vs::kMatrices) expand_keys(w, tile, g, w.scratch.key_quads, w.scratch.keys);
  int64_t r = 0;
  for (; r + 8 <= w.rows; r += 8) matrix_rows<8>(w, pairs, r, tile.key_scale[g], g);
  for (; r + 4 <= w.rows; r += 4) matrix_rows<4>(w, pairs, r, tile.key_scale[g], g);
  for (; r < w.rows; r++) matrix_rows<1>(w, pairs, r, tile.key_scale[g], g);
}

// Scores of R rows from the first on over a group, of what matrices have summed: the same as above.
template <int R>
VS_INLINE void late_scores(const Work& w, const Tile& tile, int64_t first, int g, v16f (*scores)[2]) {
  Quad counts[R][2];
  v16f sums[R][2];
  start_counts<R>(w, first, counts);
  const Quad* found = w.scratch.key_counts + (g * kSlice + first) * 2;
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) counts[r][h] = counts[r][h] + found[2 * r + h];
  end_counts<R>(w, first, counts, sums);
  const Pair* pairs = w.scratch.keys + w.dim * g;
  for (const vs::Field& field : w.key_singles.fields) {
    const Pair a = *pairs++, b = *pairs++;
    add_scores<R>(a, b, w.queries.paged + field.channel * w.rows + first, sums);
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++) scores[r][h] = Quads::opaque(sums[r][h] * tile.key_scale[g][h]);
}

// The fallback's keys of a group, one by one: they are rare.
inline void flat_scores(Work& w, const Tile& tile, int g) {
  const uint8_t* group = tile.pages[g];
  for (uint32_t left = tile.key_flat[g] & tile.any_paged[g]; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const int64_t half = lane / vs::kHalf * w.layer.key_half[w.item.head];
    const uint8_t* words = group + w.layer.key_start[w.item.head] + half + lane % vs::kHalf * 4;
    flat_levels(w, w.layer.keys.flat[w.item.head], words, 0);
    const float scale = w.layer.scales[group[lane] & (vs::kFlat - 1)];
    for (int64_t r = 0; r < w.rows; r++) {
      v16f sums = {};
      for (int64_t c = 0; c < w.dim; c += 16) sums = load(w.queries.flat + r * w.dim + c) * load(w.scratch.vectors + c) + sums;
      w.scratch.scores[r * kTile + g * vs::kGroup + lane] = (sum(sums) * scale + w.queries.flat_center[r]) * w.score_scale;
    }
  }
}

// scores[r, group g] = scale * q . k for keys in a page, while the group that comes later is fetched: pages are scattered over the pool, so
// that no hardware sees the next one coming.
inline void page_scores(Work& w, const Tile& tile, int g) {
  const uint8_t *words = tile.pages[g] + w.layer.key_start[w.item.head], *next = tile.ahead[g];
  const v16f* scale = tile.key_scale[g];
  switch (w.rows) {
    case 1: fused_scores<1>(w, words, next, scale, g); break;
    case 2: fused_scores<2>(w, words, next, scale, g); break;
    case 3: fused_scores<3>(w, words, next, scale, g); break;
    case 4: fused_scores<4>(w, words, next, scale, g); break;
    case 5: fused_scores<5>(w, words, next, scale, g); break;
    case 6: fused_scores<6>(w, words, next, scale, g); break;
    case 7: fused_scores<7>(w, words, next, scale, g); break;
    case 8: fused_scores<8>(w, words, next, scale, g); break;
    default: matrix_scores(w, tile, g);
  }
  flat_scores(w, tile, g);
}

}  // namespace

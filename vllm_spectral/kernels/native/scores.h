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

template <int R>
void matrix_rows(Work& w, const int16_t* pair_of, int64_t first, int64_t count, const v16f* scale, int g) {
  v16f sums[R][2];
  if constexpr (vs::kQuads) {
    Quad counts[R][2];
    start_counts<R>(w, first, counts);
    for (int64_t r = 0; vs::kMatrices && r < R; r++)
      for (int h = 0; h < 2; h++) counts[r][h] = counts[r][h] + w.scratch.counts[2 * (first + r) + h];
    for (int64_t i = 0; !vs::kMatrices && i < w.key_quads.size(); i++)
      add_counts<R>(w.scratch.key_quads[2 * i], w.scratch.key_quads[2 * i + 1],
                    w.queries.quads.bytes + i * w.rows + first, counts);
    end_counts<R>(w, first, counts, sums);
  } else {
    clear<2 * R>(&sums[0][0]);
  }
  for (int64_t i = 0; i < count; i++) {
    const Pair a = w.scratch.keys[2 * i], b = w.scratch.keys[2 * i + 1];
    add_scores<R>(a, b, w.queries.paged + pair_of[i] * w.rows + first, sums);
  }
  for (int r = 0; r < R; r++)
    for (int h = 0; h < 2; h++)
      store(w.scratch.scores + (first + r) * kTile + g * vs::kGroup + h * vs::kHalf, sums[r][h] * scale[h]);
}

// Scores of a group for many rows, from its quads and pairs in the scratch.
inline void matrix_scores(Work& w, const Tile& tile, int g, const v16f* scale) {
  const uint8_t* words = tile.pages[g] + w.layer.key_start[w.item.head];
  const int64_t half = w.layer.key_half[w.item.head];
  for (int64_t i = 0; i < w.key_quads.size(); i++) {
    const vs::Quad& quad = w.key_quads[i];
    w.scratch.key_quads[2 * i] = Quads::expand_any(quad, words + quad.offset, w.layer.byte_levels, 128);
    w.scratch.key_quads[2 * i + 1] = Quads::expand_any(quad, words + half + quad.offset, w.layer.byte_levels, 128);
  }
  for (int64_t line = 0; line < w.key_lines; line++) __builtin_prefetch(tile.ahead[g] + line * vs::kVectorBytes, 0, 3);
  int64_t count = 0;
  int16_t pair_of[256];  // which of the query's pairs each one meets
  for (const vs::Field& field : w.key_singles.fields) {
    const Pairs::Table table = Pairs::table(field);
    w.scratch.keys[2 * count] = Pairs::expand_any(table, words + field.offset);
    w.scratch.keys[2 * count + 1] = Pairs::expand_any(table, words + half + field.offset);
    pair_of[count++] = static_cast<int16_t>(field.channel);
  }
  if (vs::kMatrices)
    Matrices::scores(w.queries.quads.bytes, w.scratch.key_quads, vs::whole_tiles(w.key_quads.size()), w.rows, w.scratch.counts);
  int64_t r = 0;
  for (; r + 8 <= w.rows; r += 8) matrix_rows<8>(w, pair_of, r, count, scale, g);
  for (; r + 4 <= w.rows; r += 4) matrix_rows<4>(w, pair_of, r, count, scale, g);
  for (; r < w.rows; r++) matrix_rows<1>(w, pair_of, r, count, scale, g);
}

// The fallback's keys of a group, one by one: they are rare.
inline void flat_scores(Work& w, const uint8_t* group, int g, uint32_t wanted) {
  for (uint32_t left = flat_mask(group) & wanted; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const int64_t half = lane / vs::kHalf * w.layer.key_half[w.item.head];
    const uint8_t* words = group + w.layer.key_start[w.item.head] + half + lane % vs::kHalf * 4;
    flat_levels(w, w.layer.keys.flat[w.item.head], words, 0);
    const float scale = w.layer.scales[group[lane] & (vs::kFlat - 1)];
    for (int64_t r = 0; r < w.rows; r++) {
      v16f sums = {};
      for (int64_t c = 0; c < w.dim; c += 16) sums = load(w.queries.flat + r * w.dim + c) * load(w.scratch.vectors + c) + sums;
      w.scratch.scores[r * kTile + g * vs::kGroup + lane] = (sum(sums) * scale + w.queries.flat_center[r]) * w.call.scale;
    }
  }
}

// scores[r, group g] = scale * q . k for keys in a page, while those of the group at next are fetched: pages are scattered
// over the pool, so that no hardware sees the next one coming.
inline void page_scores(Work& w, const Tile& tile, int g) {
  const uint8_t *group = tile.pages[g], *next = tile.ahead[g];
  const uint8_t* words = group + w.layer.key_start[w.item.head];
  const v16f scale[2] = {scales(w.layer, group) * w.call.scale, scales(w.layer, group + vs::kHalf) * w.call.scale};
  switch (w.rows) {
    case 1: fused_scores<1>(w, words, next, scale, g); break;
    case 2: fused_scores<2>(w, words, next, scale, g); break;
    case 3: fused_scores<3>(w, words, next, scale, g); break;
    case 4: fused_scores<4>(w, words, next, scale, g); break;
    case 5: fused_scores<5>(w, words, next, scale, g); break;
    case 6: fused_scores<6>(w, words, next, scale, g); break;
    case 7: fused_scores<7>(w, words, next, scale, g); break;
    case 8: fused_scores<8>(w, words, next, scale, g); break;
    default: matrix_scores(w, tile, g, scale);
  }
  flat_scores(w, group, g, tile.any_paged[g]);
}

}  // namespace

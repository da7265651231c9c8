// Weighted sums of values in pages. Over pairs or quads of tokens of one channel, over all of a tile's groups, so that sums
// stay in registers; only at its end are lanes added up.
#pragma once
#include "work.h"

namespace {

// What of a tile is read from pages.
struct Read {
  int count = 0, active[kTileGroups];
  const uint8_t *words[kTileGroups];  // of each active group's values
  const uint8_t *next[kTileGroups];   // of those fetched meanwhile, a line or two of each with every block of quads
  int64_t line = 0, last_line = 0;

  VS_INLINE void fetch(int k) const {
    __builtin_prefetch(next[k] + line, 0, 2);
    __builtin_prefetch(next[k] + last_line, 0, 2);
  }
};

enum Form { kAlike, kMixed, kExpanded };  // of quads: of equal widths, of any, or expanded into the scratch

template <int R, Form kForm>
void quad_rows(const Work& w, const vs::Quad* quads, int64_t first, const Read& read, State& state) {
  constexpr int kWidth = vs::kQuadsAtOnce;
  Quad table[kWidth], counts[16];  // counts: [row][quad]
#pragma GCC unroll 4
  for (int j = 0; j < kWidth; j++) table[j] = Quads::table(w.layer.byte_levels, kForm == kAlike ? quads[j].bits : 0, 0);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) counts[i] = Quad{};
  const Quad* weights = w.scratch.paged_quads + first * kTileGroups;
  for (int k = 0; k < read.count; k++) {
    if (kForm != kExpanded) read.fetch(k);
    Quad level[kWidth];
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; j++)
      level[j] = kForm == kExpanded ? w.scratch.value_quads[j * kTileGroups + k]
                                    : Quads::expand<kForm == kAlike>(quads[j], read.words[k] + quads[j].offset, table[j]);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Quad weight = weights[r * kTileGroups + read.active[k]];
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; j++) counts[r * kWidth + j] = Quads::dot(counts[r * kWidth + j], weight, level[j]);
    }
  }
  // In registers until here: an array that is indexed at run time would live in memory.
  alignas(64) float found[32];  // [row][quad][member]
  store(found, Quads::numbers(sums_but_last(counts)));
  if (R > 2) store(found + 16, Quads::numbers(sums_but_last(counts + 8)));
  const int64_t at = 2 * (quads - w.value_quads.quads.data());
  const v8f step = load_half(w.layer.quad_steps.get() + w.item.head * w.layer.quad_floats + at);
  for (int r = 0; r < R; r++) {
    float* out = state.quads(first + r) + at;
    store_half(out, load_half(found + 8 * r) * (step * w.scratch.weight_step[first + r]) + load_half(out));
  }
}

template <Form kForm>
void quad_block(const Work& w, const vs::Quad* quads, const Read& read, State& state) {
  switch (w.rows) {
    case 1: return quad_rows<1, kForm>(w, quads, 0, read, state);
    case 2: return quad_rows<2, kForm>(w, quads, 0, read, state);
    case 3: return quad_rows<3, kForm>(w, quads, 0, read, state);
    case 4: return quad_rows<4, kForm>(w, quads, 0, read, state);
  }
  for (int j = 0; j < vs::kQuadsAtOnce; j++)
    for (int k = 0; k < read.count; k++)
      w.scratch.value_quads[j * kTileGroups + k] =
          Quads::expand_any(quads[j], read.words[k] + quads[j].offset, w.layer.byte_levels, 0);
  for (int k = 0; k < read.count; k++) read.fetch(k);
  int64_t r = 0;
  for (; r + 4 <= w.rows; r += 4) quad_rows<4, kExpanded>(w, quads, r, read, state);
  switch (w.rows - r) {
    case 1: return quad_rows<1, kExpanded>(w, quads, r, read, state);
    case 2: return quad_rows<2, kExpanded>(w, quads, r, read, state);
    case 3: return quad_rows<3, kExpanded>(w, quads, r, read, state);
  }
}

// A group's values as quads in the scratch, for all of an item's slices.
inline void expand_values(const Work& w, const Tile& tile, int g) {
  constexpr int kWidth = vs::kMatrixRows / 2;
  const uint8_t* words = tile.pages[g] + w.layer.value_start[w.item.head];
  const int64_t size = w.value_quads.size();
  Quad* to = w.scratch.value_quads + g * kWidth;
  for (int64_t first = 0; first < size; first += kWidth, to += kTileFours) {
    const vs::Quad* quads = w.value_quads.quads.data() + first;
    Quad levels[kWidth];
    for (int j = 0; j < kWidth; j++)
      levels[j] = first + j < size ? Quads::expand_any(quads[j], words + quads[j].offset, w.layer.byte_levels, 0) : Quad{};
    Matrices::transpose(levels, to);
  }
  const uint8_t* next = tile.upcoming[g] + w.key_lines * vs::kVectorBytes;
  for (int64_t line = 0; line < w.value_lines; line++) __builtin_prefetch(next + line * vs::kVectorBytes, 0, 2);
}

// Many rows: two blocks of channels of quads together, all of the tile's groups side by side. Groups that nobody reads from pages
// have weights of 0, and may be anything.
inline void matrix_quads(const Work& w, Tile& tile, State& state) {
  constexpr int kBlocks = 2 * vs::kMatrixRows;  // channels
  static_assert(!vs::kMatrices || kSlice <= 2 * vs::kMatrixRows, "a slice's rows are two tiles at most");
  for (int g = 0; g < tile.groups; g++) {
    if (!tile.any_paged[g] || tile.values_ready >> g & 1) continue;
    expand_values(w, tile, g);
    tile.values_ready |= 1u << g;
  }
  const int64_t width = 2 * w.value_quads.size(), fours = vs::whole_tiles(tile.groups * (vs::kGroup / 4));
  const float* steps = w.layer.quad_steps.get() + w.item.head * w.layer.quad_floats;
  Quad* counts = w.scratch.counts;
  for (int64_t first = 0; first < width; first += kBlocks) {
    const Quad* values = w.scratch.value_quads + first / vs::kMatrixRows * kTileFours;
    Matrices::outputs(w.scratch.paged_bytes, kTile, values, kTileFours, fours, w.rows > vs::kMatrixRows, counts);
    for (int64_t c = first; c < std::min<int64_t>(first + kBlocks, width); c += vs::kMatrixRows) {
      const Quad* sums = counts + (c - first) / vs::kMatrixRows * 2 * vs::kMatrixRows;
      const v16f step = load(steps + c);
      for (int64_t r = 0; r < w.rows; r++) {
        float* out = state.quads(r) + c;
        store(out, Quads::numbers(sums[r]) * (step * w.scratch.weight_step[r]) + load(out));
      }
    }
  }
}

// Channels in quads, kQuadsAtOnce of them together.
inline void quad_outputs(const Work& w, Tile& tile, Read& read, State& state) {
  if (vs::is_matrix(w.rows)) return matrix_quads(w, tile, state);
  for (int64_t first = 0; first < w.value_quads.size(); first += vs::kQuadsAtOnce) {
    const vs::Quad* quads = w.value_quads.quads.data() + first;
    read.line = w.value_lines * first / w.value_quads.size() * vs::kVectorBytes;
    read.last_line = (w.value_lines * (first + vs::kQuadsAtOnce) - 1) / w.value_quads.size() * vs::kVectorBytes;
    if (first < w.value_quads.alike)
      quad_block<kAlike>(w, quads, read, state);
    else
      quad_block<kMixed>(w, quads, read, state);
  }
}

template <int R, int kChannels, bool kWide>
VS_INLINE void add_products(const Work& w, const Pairs::Table* table, const int64_t* offset, const Read& read, v16f* sums_of) {
  for (int k = 0; k < read.count; k++) {
    Pair level[kChannels];
#pragma GCC unroll 4
    for (int i = 0; i < kChannels; i++)
      level[i] = kWide ? Pairs::expand_any(table[i], read.words[k] + offset[i])
                       : Pairs::expand(table[i], read.words[k] + offset[i]);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Pair weight = w.scratch.paged_pairs[r * kTileGroups + read.active[k]];
#pragma GCC unroll 4
      for (int i = 0; i < kChannels; i++)
        sums_of[r * kChannels + i] = Pairs::dot(sums_of[r * kChannels + i], level[i], weight);
    }
  }
}

template <int R>
void fused_outputs(const Work& w, const Read& read, State& state) {
  constexpr int kChannels = R <= 4 ? 4 : 2, kSlots = 16 / kChannels;
  const std::vector<vs::Field>& fields = w.value_singles.fields;
  const int64_t total = fields.size();
  for (int64_t start = 0; start < total; start += kChannels) {
    Pairs::Table table[kChannels];
    int64_t offset[kChannels];
    for (int i = 0; i < kChannels; i++) {
      const vs::Field& field = fields[std::min(start + i, total - 1)];
      table[i] = Pairs::table(field);
      offset[i] = field.offset;
    }
    v16f sums_of[16];  // [row][channel]
    clear<16>(sums_of);
    if (start + kChannels <= w.value_singles.narrow)
      add_products<R, kChannels, false>(w, table, offset, read, sums_of);
    else
      add_products<R, kChannels, true>(w, table, offset, read, sums_of);
    alignas(64) float added[16];
    store(added, sums(sums_of));
    for (int r = 0; r < std::min<int64_t>(kSlots, w.rows); r++)
      for (int i = 0; i < std::min<int64_t>(kChannels, total - start); i++) {
        const int32_t c = fields[start + i].channel;
        float& out = state.rotated(r)[c];
        out = added[r * kChannels + i] * w.value_width[c] + out;
      }
  }
}

// For 16 channels, the sum over groups and tokens of values * weights.
VS_INLINE v16f row_sums(const Pair* values, const Pair* weights, const Read& read) {
  v16f sums_of[16];
  clear<16>(sums_of);
  for (int k = 0; k < read.count; k++) {
    const Pair weight = weights[read.active[k]];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums_of[i] = Pairs::dot(sums_of[i], values[i * kTileGroups + k], weight);
  }
  return sums(sums_of);
}

inline void matrix_outputs(const Work& w, const Read& read, State& state) {
  const std::vector<vs::Field>& fields = w.value_singles.fields;
  const int64_t total = fields.size();
  for (int64_t start = 0; start < total; start += kBlock) {
    const int64_t channels = std::min<int64_t>(kBlock, total - start);
    for (int i = 0; i < channels; i++) {
      const Pairs::Table table = Pairs::table(fields[start + i]);
      for (int k = 0; k < read.count; k++)
        w.scratch.values[i * kTileGroups + k] = Pairs::expand_any(table, read.words[k] + fields[start + i].offset);
    }
    for (int64_t r = 0; r < w.rows; r++) {
      alignas(64) float added[16];
      store(added, row_sums(w.scratch.values, w.scratch.paged_pairs + r * kTileGroups, read));
      for (int i = 0; i < channels; i++) {
        const int32_t c = fields[start + i].channel;
        float& out = state.rotated(r)[c];
        out = added[i] * w.value_width[c] + out;
      }
    }
  }
}

inline void pair_outputs(const Work& w, const Read& read, State& state) {
  switch (w.rows) {
    case 1: fused_outputs<1>(w, read, state); break;
    case 2: fused_outputs<2>(w, read, state); break;
    case 3: fused_outputs<3>(w, read, state); break;
    case 4: fused_outputs<4>(w, read, state); break;
    case 5:
    case 6:
    case 7:
    case 8: fused_outputs<8>(w, read, state); break;
    default: matrix_outputs(w, read, state);
  }
}

// The fallback's values of a tile, one by one.
inline void flat_outputs(Work& w, const Tile& tile, State& state) {
  const float* flat_width = w.layer.values.flat_width.get() + w.item.head * w.dim;
  const float* center = w.layer.values.center.get() + w.item.head * w.dim;
  for (int g = 0; g < tile.groups; g++) {
    const uint8_t* group = tile.pages[g];
    for (uint32_t left = tile.value_flat[g] & tile.any_paged[g]; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      flat_levels(w, w.layer.values.flat[w.item.head], group + w.layer.value_start[w.item.head] + lane % vs::kHalf * 4,
                  lane / vs::kHalf * 16);
      const float scale = w.layer.scales[group[vs::kValueScales + lane] & (vs::kFlat - 1)];
      for (int64_t c = 0; c < w.dim; c += 16)
        store(w.scratch.vectors + c, load(w.scratch.vectors + c) * load(flat_width + c) * scale + load(center + c));
      for (int64_t r = 0; r < w.rows; r++) {
        const float weight = w.scratch.paged[r * kTile + g * vs::kGroup + lane];
        float* out = state.rotated(r);
        for (int64_t c = 0; c < w.dim; c += 16) store(out + c, load(w.scratch.vectors + c) * weight + load(out + c));
      }
    }
  }
}

inline void page_outputs(Work& w, Tile& tile, State& state) {
  Read read;
  for (int g = 0; g < tile.groups; g++) {
    if (!tile.any_paged[g]) continue;
    read.next[read.count] = tile.upcoming[g] + w.key_lines * vs::kVectorBytes;
    read.words[read.count] = tile.pages[g] + w.layer.value_start[w.item.head];
    read.active[read.count++] = g;
  }
  if constexpr (vs::kQuads) quad_outputs(w, tile, read, state);
  if (!w.value_singles.fields.empty()) pair_outputs(w, read, state);
  flat_outputs(w, tile, state);
}

}  // namespace

// What all of attention works on: an item of work, the softmax state of its rows, a thread's scratch, a tile of positions.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "layer.h"
#include "matrices.h"
#include "pairs.h"
#include "products.h"
#include "quads.h"
#include "rows.h"
#include "simd.h"

namespace {

constexpr int kTileGroups = 16, kTile = kTileGroups * vs::kGroup;  // positions per softmax tile
constexpr int kSpan = 2 * kTile;                                  // positions per unit of parallel work
// Most (query, head) rows attended to together, and most of an item, whose slices share what pages are expanded to.
constexpr int kSlice = vs::kMatrices ? 32 : 64, kRows = vs::kMatrices ? 192 : 64;
constexpr int kTileFours = kTile / 4;                             // of tokens of a tile
constexpr int kAhead = 2;   // groups from the one at work to the one being fetched
constexpr int kTurned = vs::kMatrices ? vs::kMatrixRows : kTogether;  // rows that are rotated together
constexpr int kBlock = 16;  // channels whose outputs are summed together
constexpr float kNone = -INFINITY;

inline int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

// Of values' quads, as many pairs of channels as a tile of matrices has columns, at most; an even number of them.
inline int64_t value_blocks(const Layer& layer) { return (layer.quad_floats + 31) / 32 * 2; }

constexpr float kLog2e = 1.44269504088896341f;

// Softmax state of a set of rows: numerators in the rotated basis (pages) and in the model's (copies). Softmax is taken to the
// base of 2, scores being multiplied by log2(e) where they are by their scale. What is summed are 2 ** (score - base); a base
// is a whole number, so that it is of no account for any bit of the result.
struct State {
  int64_t width;        // floats of a row of numerators
  float *base, *total;  // [rows]; base of -infinity: nothing seen
  float* numerators;    // [rows, width], each of the following after the other
  int64_t plain_at, quads_at;
  static int64_t row_floats(const Layer& layer) { return layer.dim + padded(layer.dim) + layer.quad_floats; }
  static size_t floats(int64_t rows, const Layer& layer) { return rows * (2 + row_floats(layer)); }
  State(float* at, int64_t rows, const Layer& layer)
      : width(row_floats(layer)),
        base(at),
        total(at + rows),
        numerators(at + 2 * rows),
        plain_at(layer.dim),
        quads_at(layer.dim + padded(layer.dim)) {}
  float* rotated(int64_t r) const { return numerators + r * width; }           // [dim]
  // [padded dim], of 32 channels each: 16 even, then 16 odd.
  float* plain(int64_t r) const { return numerators + r * width + plain_at; }
  float* quads(int64_t r) const { return numerators + r * width + quads_at; }  // [quad_floats] rotated, in the order of quads
  void clear(int64_t rows) {
    std::fill(base, base + rows, kNone);
    std::fill(total, total + rows, 0.0f);
    std::fill(numerators, numerators + rows * width, 0.0f);
  }
  // Moves a row to a larger base.
  void move(int64_t r, float to) {
    const float keep = power_of_two(base[r] - to);
    total[r] *= keep;
    base[r] = to;
    float* row = rotated(r);
    for (int64_t c = 0; c < width; c += 16) store(row + c, load(row + c) * keep);
  }
  void merge(const State& from, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      if (from.base[r] == kNone) continue;
      const float most = std::max(base[r], from.base[r]);
      const float keep = power_of_two(base[r] - most), add = power_of_two(from.base[r] - most);
      total[r] = total[r] * keep + from.total[r] * add;
      base[r] = most;
      float* row = rotated(r);
      for (int64_t c = 0; c < width; c += 16) store(row + c, load(row + c) * keep + load(from.rotated(r) + c) * add);
    }
  }
};

// The queries of some rows, in the forms in which they meet keys.
struct Queries {
  PairScalar* paged;   // [dim / 2, rows], rotated and times the channels' widths; of pairs that are in no quad
  Pair* exact;         // [rows, padded dim / 32], as they came
  float* flat;         // [rows, dim], rotated and times the fallback's width
  float* flat_center;  // [rows], with the fallback's center
  QuadQueries quads;   // rotated and times the channels' widths and levels' steps

  Queries(int64_t rows, int64_t dim, vs::Carver& carver) {
    quads.take(rows, dim, carver);
    carver.take(paged, rows * dim / 2);
    carver.take(exact, (vs::kMatrices ? vs::whole_tiles(rows) : rows) * padded(dim) / 32);
    carver.take(flat, rows * dim);
    carver.take(flat_center, rows);
  }
};

// The scratch of one thread. Rows are those of a slice.
struct Scratch {
  std::vector<Queries> queries;  // of an item's slices
  float* scores;             // [rows, kTile]
  Quad* key_counts;          // [kTileGroups, rows, 2] what matrices sum of keys
  float* paged;              // [rows, kTile] weights of tokens read from pages, in groups that have some coded by the fallback
  Pair* paged_pairs;         // [rows, kTileGroups] weights
  PairScalar* exact_pairs;   // [rows, kTileGroups, 16] weights
  Pair* keys;                // [dim / 2, 2] one group's keys; of matrices all of a tile's groups'
  Pair* values;              // [kBlock, kTileGroups]
  Quad* key_quads;           // [dim / 2, 2] one group's keys; of matrices all of a tile's groups', in whole tiles
  Quad* value_quads;         // [kQuadsAtOnce, kTileGroups]; of matrices all of a tile, [blocks of 16 channels, fours of tokens]
  Pair* copied;              // [padded dim] half a group's copied keys, or a group's copied values
  uint32_t *seen, *exact;    // [rows, kTileGroups] which of a group's positions a row sees, and which of these it reads exactly
  Quad* paged_quads;         // [rows, kTileGroups] weights
  uint8_t* paged_bytes;      // [rows, kTile] weights of matrices, 0 for groups that nobody reads from pages
  Quad* counts;              // [2, 2 * kMatrixRows] what matrices sum of values
  float* block;              // [kMatrixRows, 16] the same of bf16
  float* scaled;             // [kTogether, kTile] weights times their tokens' scales
  float* weight_step;        // [rows] of the weights' bytes
  float *vectors, *lines;    // [kTurned, dim]
  uint16_t *high, *low;      // [kTurned, padded dim] vectors to be turned by matrices
  float *item, *span;        // states of an item's slices
  uint16_t *copies, *zeros;  // [kGroup, dim] and [dim]: bf16 rows

  Scratch(const Layer& layer, vs::Carver& carver) {
    const int64_t dim = layer.dim, expanded = vs::kMatrices ? kTileGroups : 1;
    for (int i = 0; i < kRows / kSlice; i++) queries.emplace_back(kSlice, dim, carver);
    carver.take(scores, kSlice * kTile);
    carver.take(key_counts, vs::kMatrices ? kTileGroups * kSlice * 2 : 0);
    carver.take(paged, kSlice * kTile);
    carver.take(paged_pairs, kSlice * kTileGroups);
    carver.take(exact_pairs, kSlice * kTileGroups * 16);
    carver.take(keys, expanded * dim);
    carver.take(values, kBlock * kTileGroups);
    carver.take(key_quads, expanded * 2 * vs::whole_tiles(dim / 2));
    carver.take(value_quads, vs::kMatrices ? value_blocks(layer) * kTileFours : vs::kQuadsAtOnce * kTileGroups);
    carver.take(copied, padded(dim));
    carver.take(seen, kSlice * kTileGroups);
    carver.take(exact, kSlice * kTileGroups);
    carver.take(paged_quads, (vs::kMatrices ? vs::kFusedRows : kSlice) * kTileGroups);
    carver.take(paged_bytes, vs::kMatrices ? kSlice * kTile : 0);
    carver.take(counts, vs::kMatrices ? 4 * vs::kMatrixRows : 0);
    carver.take(block, vs::kMatrices ? vs::kMatrixRows * 16 : 0);
    carver.take(scaled, kTogether * kTile);
    carver.take(weight_step, kSlice);
    carver.take(vectors, kTurned * dim);
    carver.take(lines, kTurned * dim);
    carver.take(high, vs::kMatrices ? kTurned * padded(dim) : 0);
    carver.take(low, vs::kMatrices ? kTurned * padded(dim) : 0);
    carver.take(item, kRows / kSlice * State::floats(kSlice, layer));
    carver.take(span, kRows / kSlice * State::floats(kSlice, layer));
    carver.take(copies, vs::kGroup * dim);
    carver.take(zeros, dim);
  }
};

// One request, one KV head, up to kRows consecutive (query, head of the group) rows.
struct Item {
  int64_t request, head;
  int64_t first_row, rows;        // row = query * group + head of the group
  int64_t first_tile, last_tile;  // positions [first_tile * kTile, last_tile * kTile)
};

// The rows of an item that are attended to together.
inline int64_t slices(const Item& item) { return (item.rows + kSlice - 1) / kSlice; }
inline Item slice_of(const Item& item, int64_t i) {
  Item slice = item;
  slice.first_row += i * kSlice;
  slice.rows = std::min<int64_t>(kSlice, item.rows - i * kSlice);
  return slice;
}

// The states of an item's slices lie one after the other, in so many floats.
inline int64_t states_floats(const Item& item, const Layer& layer) {
  const int64_t last = slices(item) - 1;
  return last * State::floats(kSlice, layer) + State::floats(slice_of(item, last).rows, layer);
}
inline State state_of(float* states, int64_t i, const Item& item, const Layer& layer) {
  return State(states + i * State::floats(kSlice, layer), slice_of(item, i).rows, layer);
}

struct Shape {
  const Layer& layer;
  const StepCall& call;
  const int64_t group;    // query heads per KV head
  const int block_shift;  // blocks hold 2 ** block_shift tokens; -1: no power of two

  Shape(const Layer& of, const StepCall& step)
      : layer(of),
        call(step),
        group(step.num_query_heads / of.heads),
        block_shift(step.pages.block_size & (step.pages.block_size - 1) ? -1 : __builtin_ctzll(step.pages.block_size)) {}
  int64_t queries(int64_t request) const { return call.query_start[request + 1] - call.query_start[request]; }
  int64_t rows(int64_t request) const { return queries(request) * group; }
  // Whether a row of a slice may read pages: not if all that they see are tokens of this step near enough to be read exactly.
  bool reads_pages(const Item& slice) const {
    const int64_t last = (slice.first_row + slice.rows - 1) / group;
    return !call.exact_on || call.context_lens[slice.request] > queries(slice.request) || last >= call.first + call.recent;
  }
};

// Where a row of the pool of copies lies, in elements.
inline int64_t copy_at(const StepCall& call, const Layer& layer, int64_t row, int64_t head) {
  const int64_t entry = row >> call.copy_shift, token = row - (entry << call.copy_shift);
  return (((entry * layer.heads + head) << call.copy_shift) + token) * layer.dim;
}

// Where a group of a request's positions lies in the pages.
inline const uint8_t* group_of(const Shape& shape, const Item& item, int64_t first) {
  const StepCall& call = shape.call;
  const uint32_t position = static_cast<uint32_t>(first), block_size = static_cast<uint32_t>(call.pages.block_size);
  // A division takes as long as a tenth of a group's scores.
  const uint32_t index = shape.block_shift < 0 ? position / block_size : position >> shape.block_shift;
  const int64_t block = call.block_table[item.request * call.block_table_stride + index];
  return call.pages.data + block * call.pages.block_stride + item.head * call.pages.head_stride +
         (position - index * block_size) * shape.layer.slot_bytes;
}

// Calls an item's data into the cache while another one is at work: copies and pages are scattered over their pools, so that
// no hardware sees them coming. A little at a time: what is asked for in one go is dropped.
class Ahead {
 public:
  Ahead(const Shape& shape, const Item* item) : shape_(shape), call_(shape.call), layer_(shape.layer), item_(item) {
    if (!item || !call_.exact_on) return;
    const int64_t width = call_.first + call_.recent;
    row_ = call_.exact_rows + item->request * width;
    end_ = row_ + width;
  }
  void copies(int count) {
    for (; count > 0 && row_ < end_; row_++, count--) {
      if (*row_ < 0) continue;
      const int64_t at = copy_at(call_, layer_, *row_, item_->head);
      for (int64_t c = 0; c < layer_.dim; c += 32) {
        __builtin_prefetch(call_.copy_keys + at + c, 0, 3);
        __builtin_prefetch(call_.copy_values + at + c, 0, 3);
      }
    }
  }
  // The item's group of pages, counting positions from its first; or any other address if there is none.
  const uint8_t* group(int64_t offset, const uint8_t* other) const {
    if (!item_) return other;
    const int64_t first = item_->first_tile * kTile + offset;
    return first < call_.context_lens[item_->request] ? group_of(shape_, *item_, first) : other;
  }

 private:
  const Shape& shape_;
  const StepCall& call_;
  const Layer& layer_;
  const Item* item_;
  const int32_t *row_ = nullptr, *end_ = nullptr;
};

// Positions [low, high) as bits of a group that starts at first.
VS_INLINE uint32_t between(int64_t low, int64_t high, int64_t first) {
  const int64_t a = std::clamp<int64_t>(low - first, 0, 32), b = std::clamp<int64_t>(high - first, 0, 32);
  return a >= b ? 0 : static_cast<uint32_t>(((1ull << b) - 1) & ~((1ull << a) - 1));
}

// A slice at work.
struct Work {
  const Shape& shape;
  const Layer& layer;
  const StepCall& call;
  const Item item;
  const Queries& queries;
  Scratch& scratch;
  const int64_t dim, rows;
  const vs::Singles &key_singles, &value_singles;
  const vs::QuadList &key_quads, &value_quads;
  const float* value_width;  // [dim]
  const float score_scale;   // of products, to scores in bits
  Ahead next;
  int64_t context, before, first_query, last_query;  // before: tokens of the request before the step
  int64_t pages_end;                // where this item's pages end: positions from here on are the next item's, or exact
  int64_t key_lines, value_lines;   // cache lines of a group, the scales counted with the keys
  int64_t position[kSlice];

  Work(const Shape& of, const Item& work, const Queries& prepared, Scratch& own, const Item* following)
      : shape(of),
        layer(shape.layer),
        call(shape.call),
        item(work),
        queries(prepared),
        scratch(own),
        dim(layer.dim),
        rows(item.rows),
        key_singles(layer.key_pairs[item.head]),
        value_singles(layer.value_singles[item.head]),
        key_quads(layer.key_quads[item.head]),
        value_quads(layer.value_quads[item.head]),
        value_width(layer.values.width.get() + item.head * dim),
        score_scale(call.scale * kLog2e),
        next(shape, following) {
    context = call.context_lens[item.request];
    before = context - shape.queries(item.request);
    first_query = before + item.first_row / shape.group;
    last_query = before + (item.first_row + rows - 1) / shape.group;
    const int64_t groups = std::max<int64_t>(last_query - (call.exact_on ? call.recent : 0), 0) / vs::kGroup + 1;
    pages_end = std::min(groups * vs::kGroup, item.last_tile * kTile);
    key_lines = layer.value_start[item.head] / vs::kVectorBytes;
    value_lines = vs::kGroup * layer.slot_bytes / vs::kVectorBytes - key_lines;
    for (int64_t r = 0; r < rows; r++) position[r] = before + (item.first_row + r) / shape.group;
  }

  const uint8_t* group_at(int64_t first) const { return group_of(shape, item, first); }

  // The group of pages that comes so many positions after this one, the next item's after the last.
  const uint8_t* group_ahead(int64_t first, int64_t distance, const uint8_t* other) const {
    const int64_t ahead = first + distance;
    if (ahead < pages_end) return group_at(ahead);
    return next.group(std::max<int64_t>(ahead - pages_end, 0), other);
  }

  // Whether all rows see all of some positions; whether some row would read one of them exactly if it had a copy.
  bool all_see(int64_t first, int64_t count) const {
    return first + count <= first_query + 1 && (call.window <= 0 || first > last_query - call.window);
  }
  bool any_near(int64_t first, int64_t count) const {
    return call.exact_on && (first < call.first || first + count > first_query - call.recent + 1);
  }

  // Which of a group's positions a row sees, and which of these it would read exactly if they had a copy.
  uint32_t seen(int64_t r, int64_t first) const {
    const int64_t p = position[r];
    return between(call.window > 0 ? p - call.window + 1 : 0, p + 1, first);
  }
  uint32_t near(int64_t r, int64_t first) const {
    const int64_t p = position[r];
    return between(0, call.first, first) | between(p - call.recent + 1, p + 1, first);
  }
  // The latter of any of some rows, which are in the order of their positions.
  uint32_t near_some(int64_t start, int64_t count, int64_t first) const {
    const int64_t last = position[std::min(start + count, rows) - 1];
    return between(0, call.first, first) | between(position[start] - call.recent + 1, last + 1, first);
  }
};

// Up to kTileGroups groups of positions, and what is read of them from where.
struct Tile {
  int64_t start;
  int groups;
  const uint8_t* pages[kTileGroups];             // of each group
  const uint8_t* upcoming[kTileGroups];          // of those that come a tile later
  const uint8_t* ahead[kTileGroups];             // of those that come kAhead groups later
  int32_t copy_lines[kTileGroups][vs::kGroup];   // where copies lie in the pool, counting lines of dim
  uint32_t any_paged[kTileGroups], any_exact[kTileGroups];  // positions that some row reads from there
  uint32_t key_flat[kTileGroups], value_flat[kTileGroups];  // tokens whose keys, whose values are coded by the fallback
  v16f value_scale[kTileGroups][2];
  bool whole[kTileGroups];                       // all rows read all of the group from its page
  bool all_whole;                                // of all groups
  uint32_t keys_ready, values_ready;             // groups that are expanded
  v16f key_scale[kTileGroups][2];                // of scores
  bool late;                                     // scores are made when they are weighed, of a few rows after the other

  int64_t first(int group) const { return start + group * vs::kGroup; }

  // To the groups that a slice sees.
  void show(const Work& w) {
    groups = static_cast<int>((std::clamp<int64_t>(w.last_query + 1 - start, 0, kTile) + vs::kGroup - 1) / vs::kGroup);
  }

  // Moves to a tile, of which the item's last slice sees most. Tiles of an item come one after the other: a place is looked up
  // once, when it is fetched.
  void move(const Work& w, int64_t index, bool following) {
    start = index * kTile;
    keys_ready = values_ready = 0;
    show(w);
    for (int g = 0; g < groups; g++) {
      pages[g] = following && first(g) < w.pages_end ? upcoming[g] : w.group_at(first(g));
      upcoming[g] = w.group_ahead(first(g), kTile, pages[g]);
    }
    for (int g = 0; g < groups; g++) {
      const int later = g + kAhead;
      const bool here = later < groups && first(later) < w.pages_end;
      ahead[g] = here ? pages[later] : w.group_ahead(first(g), kAhead * vs::kGroup, pages[g]);
    }
  }
};

// Scales of half a group, from their bytes: the lowest octave's, and powers of two.
VS_INLINE v16f scales(const Layer& layer, const uint8_t* bytes) {
  const v16i byte = of_bytes(bytes);
  const v16f lowest = lookup(layer.lowest_octave.get(), 4, byte & 15);
  return as_float(as_int(lowest) + ((byte & (vs::kFlat - 8)) << 20));
}

// Which of a group's keys are coded by the fallback, and above 32 bits which of its values: the flags of the line of its scales.
VS_INLINE uint64_t flat_masks(const uint8_t* group) {
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask(_mm512_load_si512(group));
#else
  static_assert(vs::kValueScales == vs::kGroup && vs::kGroup == 2 * vs::kHalf, "scales are one line");
  uint64_t flags = 0;
  for (int part = 3; part >= 0; part--) flags = flags << vs::kHalf | high_bits(group + part * vs::kHalf);
  return flags;
#endif
}

// vector[c] = level of the fallback's code, from the 32 bits of each vector of words.
inline void flat_levels(const Work& w, const std::vector<vs::Field>& fields, const uint8_t* words, int extra) {
  for (int64_t c = 0; c < w.dim; c++) {
    uint32_t word;
    memcpy(&word, words + fields[c].offset, 4);
    w.scratch.vectors[c] = fields[c].levels[(word >> (fields[c].shift + extra) & ((1u << fields[c].bits) - 1))];
  }
}

// 32 channels of a row of bf16, or the 16 that are left, as 16 pairs.
VS_INLINE v16u channels(const uint16_t* row, int64_t part, int64_t dim) {
  v16u pairs = {};
  if (32 * part + 32 <= dim)
    memcpy(&pairs, row + 32 * part, 64);
  else
    memcpy(&pairs, row + 32 * part, 32);
  return pairs;
}

}  // namespace

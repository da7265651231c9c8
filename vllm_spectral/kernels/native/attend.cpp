// Attend: one step's queries over compressed pages and exact copies. Compiled once per instruction set.
//
// Work is cut into tiles of 512 and spans of 1024 positions, at fixed multiples of both. A tile's softmax is merged into
// its span's, a span's into the result, in order. So a query's output has the same bits however its prompt was cut, whoever
// shares the batch and however many threads run: each row sees the same operations in the same order everywhere.
//
// Products run over pairs. For scores a pair is two channels of one token: a lane is a token, and a query's pair is
// broadcast. For outputs a pair is two tokens of one channel: lanes are 16 such pairs, added up at the end of a tile.
//
// Where the machine multiplies bytes, narrow fields run over quads: four channels of one token, four tokens of one channel. A
// row's query is rounded to 8 bits of its largest channel; a row's weights in a tile to 8 bits of the largest, each lane's
// rounding error carried on to its next token, so that many small weights do not vanish together. Sums are integers, exact.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "layer.h"
#include "pairs.h"
#include "quads.h"
#include "rows.h"
#include "simd.h"
#include "store.h"

namespace {

constexpr int kTileGroups = 16, kTile = kTileGroups * vs::kGroup;  // positions per softmax tile
constexpr int kSpan = 2 * kTile;                                  // positions per unit of parallel work
constexpr int kRows = 64;                                         // most (query, head) rows attended to together
constexpr int kAhead = 2;                                         // groups from the one at work to the one being fetched
constexpr int kBlock = 16;    // channels whose outputs are summed together
constexpr int kTogether = 4;  // rows that are rotated together
constexpr int kWrites = 16;   // copies per unit of work
constexpr float kNone = -INFINITY;

int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

// Softmax state of a set of rows: numerators in the rotated basis (pages) and in the model's (copies).
struct State {
  int64_t width;        // floats of a row of numerators
  float *peak, *total;  // [rows]
  float* numerators;    // [rows, width], each of the following after the other
  int64_t plain_at, quads_at;
  static int64_t row_floats(const Layer& layer) { return layer.dim + padded(layer.dim) + layer.quad_floats; }
  static size_t floats(int64_t rows, const Layer& layer) { return rows * (2 + row_floats(layer)); }
  State(float* at, int64_t rows, const Layer& layer)
      : width(row_floats(layer)),
        peak(at),
        total(at + rows),
        numerators(at + 2 * rows),
        plain_at(layer.dim),
        quads_at(layer.dim + padded(layer.dim)) {}
  float* rotated(int64_t r) const { return numerators + r * width; }           // [dim]
  float* plain(int64_t r) const { return numerators + r * width + plain_at; }  // [padded dim] of 32 channels, 16 even, then 16 odd
  float* quads(int64_t r) const { return numerators + r * width + quads_at; }  // [quad_floats] rotated, in the order of quads
  void clear(int64_t rows) {
    std::fill(peak, peak + rows, kNone);
    std::fill(total, total + rows, 0.0f);
    std::fill(numerators, numerators + rows * width, 0.0f);
  }
};

// The queries of some rows, in the forms in which they meet keys.
struct Queries {
  PairScalar* paged;  // [dim / 2, rows], rotated and times the channels' widths
  Pair* exact;        // [rows, padded dim / 32], as they came
  float* flat;                // [rows, dim], rotated and times the fallback's width
  float* flat_center;         // [rows], with the fallback's center
  QuadQueries quads;          // rotated and times the channels' widths and levels' steps

  Queries(int64_t rows, int64_t dim, vs::Carver& carver) {
    quads.take(rows, dim, carver);
    carver.take(paged, rows * dim / 2);
    carver.take(exact, rows * padded(dim) / 32);
    carver.take(flat, rows * dim);
    carver.take(flat_center, rows);
  }
};

// The scratch of one thread.
struct Scratch {
  Queries queries;
  float* scores;                    // [rows, kTile]
  float* paged;                     // [rows, kTile] weights of tokens read from pages
  Pair* paged_pairs;                // [rows, kTileGroups] weights
  PairScalar* exact_pairs;          // [rows, kTileGroups, 16] weights
  Pair* keys;                       // [dim / 2, 2] one group's keys
  Pair* values;                     // [kBlock, kTileGroups]
  Quad* key_quads;                  // [dim / 2, 2] one group's keys
  Quad* value_quads;                // [kQuadsAtOnce, kTileGroups]
  Quad* paged_quads;                // [rows, kTileGroups] weights
  float* scaled;                    // [kTile] weights times their tokens' scales
  float* weight_step;               // [rows] of the weights' bytes
  float *vectors, *lines;           // [kTogether, dim]
  float *item, *span;               // states
  uint16_t *copies, *zeros;         // [kGroup, dim] and [dim]: bf16 rows

  Scratch(const Layer& layer, vs::Carver& carver) : queries(kRows, layer.dim, carver) {
    const int64_t dim = layer.dim;
    carver.take(scores, kRows * kTile);
    carver.take(paged, kRows * kTile);
    carver.take(paged_pairs, kRows * kTileGroups);
    carver.take(exact_pairs, kRows * kTileGroups * 16);
    carver.take(keys, dim);
    carver.take(values, kBlock * kTileGroups);
    carver.take(key_quads, dim);
    carver.take(value_quads, vs::kQuadsAtOnce * kTileGroups);
    carver.take(paged_quads, kRows * kTileGroups);
    carver.take(scaled, kTile);
    carver.take(weight_step, kRows);
    carver.take(vectors, kTogether * dim);
    carver.take(lines, kTogether * dim);
    carver.take(item, State::floats(kRows, layer));
    carver.take(span, State::floats(kRows, layer));
    carver.take(copies, vs::kGroup * dim);
    carver.take(zeros, dim);
  }
};

// One request, one KV head, up to kRows consecutive (query, head of the group) rows.
struct Item {
  int64_t request, head;
  int64_t first_row, rows;     // row = query * group + head of the group
  int64_t first_tile, last_tile;  // positions [first_tile * kTile, last_tile * kTile)
};

struct Shape {
  int64_t group;  // query heads per KV head
  const Layer& layer;
  const StepCall& call;
  int64_t queries(int64_t request) const { return call.query_start[request + 1] - call.query_start[request]; }
  int64_t rows(int64_t request) const { return queries(request) * group; }
};

// out[kCount, dim] = vectors[kCount, dim] @ matrix[dim, dim], row-major all.
template <int kCount>
void some_products(const float* vectors, const float* matrix, int64_t dim, float* out) {
  int64_t column = 0;
  for (; column + 64 <= dim; column += 64) {
    v16f sums_of[kCount][4];
    clear<4 * kCount>(&sums_of[0][0]);
    for (int64_t row = 0; row < dim; row++) {
      const float* at = matrix + row * dim + column;
      const v16f part[4] = {load(at), load(at + 16), load(at + 32), load(at + 48)};
#pragma GCC unroll 4
      for (int i = 0; i < kCount; i++) {
        const v16f x = splat(vectors[i * dim + row]);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) sums_of[i][k] = part[k] * x + sums_of[i][k];
      }
    }
    for (int i = 0; i < kCount; i++)
      for (int k = 0; k < 4; k++) store(out + i * dim + column + 16 * k, sums_of[i][k]);
  }
  for (; column < dim; column += 16) {
    v16f sums_of[kCount];
    clear<kCount>(sums_of);
    for (int64_t row = 0; row < dim; row++) {
      const v16f part = load(matrix + row * dim + column);
#pragma GCC unroll 4
      for (int i = 0; i < kCount; i++) sums_of[i] = part * vectors[i * dim + row] + sums_of[i];
    }
    for (int i = 0; i < kCount; i++) store(out + i * dim + column, sums_of[i]);
  }
}

// The same for up to kTogether vectors.
void products(int64_t count, const float* vectors, const float* matrix, int64_t dim, float* out) {
  switch (count) {
    case 1: return some_products<1>(vectors, matrix, dim, out);
    case 2: return some_products<2>(vectors, matrix, dim, out);
    case 3: return some_products<3>(vectors, matrix, dim, out);
    default: return some_products<kTogether>(vectors, matrix, dim, out);
  }
}

// Where a row of the pool of copies lies, in elements.
int64_t copy_at(const StepCall& call, const Layer& layer, int64_t row, int64_t head) {
  const int64_t entry = row >> call.copy_shift, token = row - (entry << call.copy_shift);
  return (((entry * layer.heads + head) << call.copy_shift) + token) * layer.dim;
}

// Copies the i-th of the step's tokens that the plan keeps.
void write_copy(const Layer& layer, const StepCall& call, int64_t i, float* line) {
  for (int64_t head = 0; head < layer.heads; head++) {
    const int64_t at = copy_at(call, layer, call.write_rows[i], head);
    for (const bool keys : {true, false}) {
      uint16_t* to = (keys ? call.copy_keys : call.copy_values) + at;
      read_row(keys ? call.keys : call.values, call.write_tokens[i], head, layer.dim, line);
      for (int64_t c = 0; c < layer.dim; c++) to[c] = bf16_of(line[c]);
    }
  }
}

// Where a group of a request's positions lies in the pages.
const uint8_t* group_of(const StepCall& call, const Layer& layer, const Item& item, int64_t first) {
  const int64_t block_size = call.pages.block_size;
  const int64_t block = call.block_table[item.request * call.block_table_stride + first / block_size];
  return call.pages.data + block * call.pages.block_stride + item.head * call.pages.head_stride +
         first % block_size * layer.slot_bytes;
}

// Calls an item's data into the cache while another one is at work: copies and pages are scattered over their pools, so that
// no hardware sees them coming. A little at a time: what is asked for in one go is dropped.
class Ahead {
 public:
  Ahead(const Shape& shape, const Item* item) : call_(shape.call), layer_(shape.layer), item_(item) {
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
    return first < call_.context_lens[item_->request] ? group_of(call_, layer_, *item_, first) : other;
  }

 private:
  const StepCall& call_;
  const Layer& layer_;
  const Item* item_;
  const int32_t *row_ = nullptr, *end_ = nullptr;
};

class Attention {
 public:
  Attention(const Shape& shape, const Item& item, const Queries& queries, Scratch& scratch, const Item* next)
      : shape_(shape),
        layer_(shape.layer),
        call_(shape.call),
        item_(item),
        q_(queries),
        s_(scratch),
        dim_(layer_.dim),
        rows_(item.rows),
        pairs_(layer_.key_pairs[item.head]),
        quads_(layer_.key_quads[item.head]),
        value_singles_(layer_.value_singles[item.head]),
        value_quads_(layer_.value_quads[item.head]),
        next_(shape, next) {
    context_ = call_.context_lens[item.request];
    before_ = context_ - shape.queries(item.request);
    first_query_ = before_ + item.first_row / shape.group;
    last_query_ = before_ + (item.first_row + rows_ - 1) / shape.group;
    width_ = layer_.values.width.get() + item.head * dim_;
    const int64_t groups = std::max<int64_t>(last_query_ - (call_.exact_on ? call_.recent : 0), 0) / vs::kGroup + 1;
    pages_end_ = std::min(groups * vs::kGroup, item.last_tile * kTile);
    key_lines_ = layer_.value_start[item.head] / vs::kVectorBytes;
    value_lines_ = vs::kGroup * layer_.slot_bytes / vs::kVectorBytes - key_lines_;
    for (int64_t r = 0; r < rows_; r++) position_[r] = before_ + (item.first_row + r) / shape.group;
  }

  // Attends to the item's tiles and merges them, span by span, into the state.
  void run(State& state) {
    State span(s_.span, rows_, layer_);
    const int64_t tiles_per_span = kSpan / kTile;
    for (int64_t tile = item_.first_tile; tile < item_.last_tile;) {
      const int64_t end = std::min((tile / tiles_per_span + 1) * tiles_per_span, item_.last_tile);
      span.clear(rows_);
      for (; tile < end; tile++) attend_tile(tile, span);
      merge(state, span, rows_);
    }
  }

  static void blend(float* into, float keep, const float* from, float add, int64_t count) {
    for (int64_t c = 0; c < count; c += 16) store(into + c, load(into + c) * keep + load(from + c) * add);
  }

  static void merge(State& into, const State& from, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
      if (from.peak[r] == kNone) continue;
      const float most = std::max(into.peak[r], from.peak[r]);
      const float keep = exp_negative(splat(into.peak[r] - most))[0], add = exp_negative(splat(from.peak[r] - most))[0];
      into.total[r] = into.total[r] * keep + from.total[r] * add;
      into.peak[r] = most;
      blend(into.rotated(r), keep, from.rotated(r), add, into.width);
    }
  }

  static void prepare(const Shape& shape, const Item& item, Queries& queries, Scratch& s) {
    const int64_t dim = shape.layer.dim, at = item.head * dim, parts = padded(dim) / 32;
    const vs::Coding& keys = shape.layer.keys;
    for (int64_t start = 0; start < item.rows; start += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, item.rows - start);
      for (int64_t i = 0; i < count; i++) {
        const int64_t r = start + i, row = item.first_row + r;
        const int64_t token = shape.call.query_start[item.request] + row / shape.group;
        const int64_t head = item.head * shape.group + row % shape.group;
        const Rows& query = shape.call.query;
        float* vector = s.vectors + i * dim;
        read_row(query, token, head, dim, vector);
        for (int64_t part = 0; part < parts; part++) {
          Pair& pairs = queries.exact[r * parts + part];
          if (query.dtype == kBFloat16) {
            const uint16_t* in = static_cast<const uint16_t*>(query.data) + token * query.token_stride + head * query.head_stride;
            pairs = Pairs::of_bf16(channels(in, part, dim));
            continue;
          }
          v16f even = {}, odd = {};
          for (int k = 0; k < 16 && 32 * part + 2 * k < dim; k++) {
            even[k] = vector[32 * part + 2 * k];
            odd[k] = vector[32 * part + 2 * k + 1];
          }
          pairs = Pairs::of(even, odd);
        }
      }
      products(count, s.vectors, keys.basis + at * dim, dim, s.lines);
      for (int64_t i = 0; i < count; i++) {
        const int64_t r = start + i;
        float* line = s.lines + i * dim;
        v16f at_center = {};
        for (int64_t c = 0; c < dim; c += 16) {
          const v16f x = load(line + c);
          at_center = at_center + x * load(keys.center.get() + at + c);
          store(queries.flat + r * dim + c, x * load(keys.flat_width.get() + at + c));
          store(line + c, x * load(keys.width.get() + at + c));
        }
        queries.flat_center[r] = sum(at_center);
        Pairs::scalars(line, dim, queries.paged + r, item.rows);
        if constexpr (vs::kQuads) queries.quads.round(shape.layer, item.head, line, r, item.rows);
      }
    }
  }

  static void finish(const Shape& shape, const Item& item, const State& state, Scratch& s) {
    const int64_t dim = shape.layer.dim;
    const float* back = shape.layer.values.transposed.get() + item.head * dim * dim;
    for (int64_t start = 0; start < item.rows; start += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, item.rows - start);
      float share[kTogether];
      for (int64_t i = 0; i < count; i++) {
        share[i] = state.total[start + i] > 0 ? 1.0f / state.total[start + i] : 0.0f;
        const float *rotated = state.rotated(start + i), *quads = state.quads(start + i);
        const int32_t* place = shape.layer.quad_place.get() + item.head * dim;
        for (int64_t c = 0; c < dim; c++)
          s.vectors[i * dim + c] = (rotated[c] + (place[c] >= 0 ? quads[place[c]] : 0.0f)) * share[i];
      }
      products(count, s.vectors, back, dim, s.lines);
      for (int64_t i = 0; i < count; i++) {
        const int64_t row = item.first_row + start + i;
        const float* plain = state.plain(start + i);
        for (int64_t c = 0; c < dim; c += 16) {
          const v16i low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
          const float* part = plain + c / 32 * 32;
          const v16f own = __builtin_shuffle(load(part), load(part + 16), low + static_cast<int>(c % 32 / 2));
          store(s.lines + i * dim + c, own * share[i] + load(s.lines + i * dim + c));
        }
        write_row(shape.call.output, shape.call.query_start[item.request] + row / shape.group,
                  item.head * shape.group + row % shape.group, dim, s.lines + i * dim);
      }
    }
  }

 private:
  const uint8_t* group_at(int64_t first) const { return group_of(call_, layer_, item_, first); }

  // The group of pages that comes so many positions after this one, the next item's after the last.
  const uint8_t* group_ahead(int64_t first, int64_t distance) const {
    const int64_t ahead = first + distance;
    if (ahead < pages_end_) return group_at(ahead);
    return next_.group(std::max<int64_t>(ahead - pages_end_, 0), group_at(first));
  }

  // Positions [low, high) as bits of a group that starts at first.
  static uint32_t between(int64_t low, int64_t high, int64_t first) {
    const int64_t a = std::clamp<int64_t>(low - first, 0, 32), b = std::clamp<int64_t>(high - first, 0, 32);
    return a >= b ? 0 : static_cast<uint32_t>(((1ull << b) - 1) & ~((1ull << a) - 1));
  }

  // Which of a group's positions a row sees, and which of these it would read exactly if they had a copy.
  uint32_t seen(int64_t r, int64_t first) const {
    const int64_t p = position_[r];
    return between(call_.window > 0 ? p - call_.window + 1 : 0, p + 1, first);
  }
  uint32_t near(int64_t r, int64_t first) const {
    const int64_t p = position_[r];
    return between(0, call_.first, first) | between(p - call_.recent + 1, p + 1, first);
  }

  // The pool's rows of a group's positions before the step: -1 without a copy.
  void pool_rows(int64_t first, int32_t* rows) const {
    const int32_t* table = call_.exact_rows + item_.request * (call_.first + call_.recent);
    const int64_t start = std::max<int64_t>(before_ - call_.recent, 0);
    const int64_t low = std::max(first, start), high = std::min(first + vs::kGroup, before_);
    std::fill(rows, rows + vs::kGroup, -1);
    if (low < high) std::copy(table + call_.first + low - start, table + call_.first + high - start, rows + low - first);
    for (int64_t p = first; p < std::min<int64_t>(first + vs::kGroup, std::min<int64_t>(call_.first, before_)); p++)
      rows[p - first] = table[p];
  }

  // Which of a group's positions have an exact copy that some row of the item may read; and where those in the pool lie.
  uint32_t copied(int64_t first, int32_t* lines) const {
    if (!call_.exact_on) return 0;
    const uint32_t candidates = between(0, call_.first, first) | between(first_query_ - call_.recent + 1, last_query_ + 1, first);
    if (!candidates) return 0;
    alignas(64) int32_t rows[vs::kGroup];
    pool_rows(first, rows);
    uint32_t held = 0;
    for (int h = 0; h < 2; h++) {
      const v16i row = load_integers(rows + h * vs::kHalf), entry = row >> call_.copy_shift;
      const v16i line = ((entry * static_cast<int32_t>(layer_.heads) + static_cast<int32_t>(item_.head)) << call_.copy_shift) +
                        (row & ((1 << call_.copy_shift) - 1));
      store_integers(lines + h * vs::kHalf, line);
      held |= (~signs(row) & 0xffff) << h * vs::kHalf;
    }
    return candidates & (held | between(before_, context_, first));
  }

  // Scales of half a group, from their bytes: the fractions of an octave that start at scale 1, and powers of two.
  v16f scales(const uint8_t* bytes) const {
    v16b packed;
    memcpy(&packed, bytes, 16);
    const v16i index = __builtin_convertvector(packed, v16i) & (vs::kFlat - 1);
    const v16f fraction = lookup(layer_.scales.get() + vs::kUnitScale, 3, index & 7);
    return as_float(as_int(fraction) + (((index - vs::kUnitScale) >> 3) << 23));
  }

  static uint32_t flat_mask(const uint8_t* bytes) { return high_bits(bytes) | high_bits(bytes + vs::kHalf) << vs::kHalf; }

  void attend_tile(int64_t tile, State& state) {
    const int64_t start = tile * kTile;
    const int groups = static_cast<int>(std::min<int64_t>((std::min(last_query_ + 1 - start, int64_t{kTile}) + 31) / 32, kTileGroups));
    if (groups <= 0) return;
    uint32_t copies[kTileGroups], any_paged[kTileGroups], any_exact[kTileGroups];
    bool paged = false, exact = false;
    for (int g = 0; g < groups; g++) {
      const int64_t first = start + g * vs::kGroup;
      copies[g] = copied(first, copy_lines_[g]);
      any_paged[g] = any_exact[g] = 0;
      whole_[g] = !copies[g] && first + vs::kGroup <= first_query_ + 1 && (call_.window <= 0 || first > last_query_ - call_.window);
      if (whole_[g]) any_paged[g] = ~0u;
      for (int64_t r = 0; r < rows_ && !whole_[g]; r++) {
        const uint32_t visible = seen(r, first), read = visible & copies[g] & near(r, first);
        any_exact[g] |= read;
        any_paged[g] |= visible & ~read;
      }
      paged |= any_paged[g] != 0;
      exact |= any_exact[g] != 0;
      if (any_paged[g]) {
        const uint8_t* group = group_at(first);
        page_scores(group, group_ahead(first, kAhead * vs::kGroup), g, any_paged[g]);
        value_flat_[g] = flat_mask(group + vs::kValueScales);
        for (int h = 0; h < 2; h++) value_scale_[g][h] = scales(group + vs::kValueScales + h * vs::kHalf);
      }
      if (any_exact[g]) exact_scores(g, first, any_exact[g]);
    }
    if (!paged && !exact) return;
    for (int64_t r = 0; r < rows_; r++) weigh(r, start, groups, copies, any_paged, any_exact, state);
    if (paged) page_outputs(start, groups, any_paged, state);
    if (exact) exact_outputs(start, groups, any_exact, state);
  }

  // scores[r, group g] = scale * q . k for keys in a page, while those of the group at next are fetched: pages are scattered
  // over the pool, so that no hardware sees the next one coming.
  void page_scores(const uint8_t* group, const uint8_t* next, int g, uint32_t wanted) {
    const uint8_t* words = group + layer_.key_start[item_.head];
    const v16f scale[2] = {scales(group) * call_.scale, scales(group + vs::kHalf) * call_.scale};
    switch (rows_) {
      case 1: fused_scores<1>(words, next, scale, g); break;
      case 2: fused_scores<2>(words, next, scale, g); break;
      case 3: fused_scores<3>(words, next, scale, g); break;
      case 4: fused_scores<4>(words, next, scale, g); break;
      case 5: fused_scores<5>(words, next, scale, g); break;
      case 6: fused_scores<6>(words, next, scale, g); break;
      case 7: fused_scores<7>(words, next, scale, g); break;
      case 8: fused_scores<8>(words, next, scale, g); break;
      default: {
        const int64_t half = layer_.key_half[item_.head];
        int64_t count = 0;
        const Quad table = Quads::table(layer_.byte_levels, 128);
        for (size_t i = 0; i < quads_.size(); i++) {
          s_.key_quads[2 * i] = Quads::expand(quads_[i], words + quads_[i].offset, table);
          s_.key_quads[2 * i + 1] = Quads::expand(quads_[i], words + half + quads_[i].offset, table);
          __builtin_prefetch(next + i * vs::kVectorBytes, 0, 3);
        }
        for (const vs::Field& field : pairs_.fields) {
          const Pairs::Table table = Pairs::table(field);
          s_.keys[2 * count] = Pairs::expand_any(table, words + field.offset);
          s_.keys[2 * count + 1] = Pairs::expand_any(table, words + half + field.offset);
          pair_of_[count++] = static_cast<int16_t>(field.channel);
          __builtin_prefetch(next + (quads_.size() + count) * vs::kVectorBytes, 0, 3);
        }
        matrix_scores(q_.paged, count, scale, g);
      }
    }
    flat_scores(group, g, wanted);
  }

  template <int R>
  void fused_scores(const uint8_t* words, const uint8_t* next, const v16f* scale, int g) {
    v16f sums[R][2];
    const vs::Field* fields = pairs_.fields.data();
    const int64_t count = pairs_.fields.size(), narrow = pairs_.narrow, quads = quads_.size();
    const uint8_t* upper = words + layer_.key_half[item_.head];
    const PairScalar* queries = q_.paged;
    int64_t line = 0;  // of the group to come that is fetched next
    if constexpr (vs::kQuads) {
      const Quad table = Quads::table(layer_.byte_levels, 128);
      Quad counts[R][2];
      start_counts<R>(0, counts);
      for (; line < quads; line++) {
        const vs::Quad& quad = quads_[line];
        add_counts<R>(Quads::expand(quad, words + quad.offset, table), Quads::expand(quad, upper + quad.offset, table),
                      q_.quads.bytes + line * R, counts);
        __builtin_prefetch(next + line * vs::kVectorBytes, 0, 3);
      }
      end_counts<R>(0, counts, sums);
    } else {
      clear<2 * R>(&sums[0][0]);
    }
    for (int64_t i = 0; i < narrow; i++) {
      const Pairs::Table table = Pairs::table(fields[i]);
      add_scores<R>(Pairs::expand(table, words + fields[i].offset), Pairs::expand(table, upper + fields[i].offset),
                    queries + fields[i].channel * R, sums);
      __builtin_prefetch(next + line++ * vs::kVectorBytes, 0, 3);
    }
    for (int64_t i = narrow; i < count; i++) {
      const Pairs::Table table = Pairs::table(fields[i]);
      add_scores<R>(Pairs::expand_any(table, words + fields[i].offset), Pairs::expand_any(table, upper + fields[i].offset),
                    queries + fields[i].channel * R, sums);
    }
    for (; line < key_lines_; line++) __builtin_prefetch(next + line * vs::kVectorBytes, 0, 3);
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) store(s_.scores + r * kTile + g * vs::kGroup + h * vs::kHalf, sums[r][h] * scale[h]);
  }

  template <int R>
  static VS_INLINE void add_scores(const Pair& a, const Pair& b, const PairScalar* query, v16f (*sums)[2]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Pair q = Pairs::broadcast(query[r]);
      sums[r][0] = Pairs::dot(sums[r][0], a, q);
      sums[r][1] = Pairs::dot(sums[r][1], b, q);
    }
  }

  // Sums over quads, of R rows from the first on: what they start with, what they come to, and one quad of both halves.
  template <int R>
  VS_INLINE void start_counts(int64_t first, Quad (*counts)[2]) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) counts[r][0] = counts[r][1] = splat(q_.quads.bias[first + r]);
  }
  template <int R>
  static VS_INLINE void add_counts(Quad a, Quad b, const uint32_t* query, Quad (*counts)[2]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Quad q = splat(static_cast<int32_t>(query[r]));
      counts[r][0] = Quads::dot(counts[r][0], a, q);
      counts[r][1] = Quads::dot(counts[r][1], b, q);
    }
  }
  template <int R>
  VS_INLINE void end_counts(int64_t first, const Quad (*counts)[2], v16f (*sums)[2]) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++) sums[r][h] = Quads::opaque(Quads::numbers(counts[r][h]) * q_.quads.step[first + r]);
  }

  // For a group whose quads and pairs lie in s_.key_quads and s_.keys; pair_of_ tells which of the query's pairs each one meets.
  void matrix_scores(const PairScalar* query, int64_t count, const v16f* scale, int g) {
    int64_t r = 0;
    for (; r + 8 <= rows_; r += 8) matrix_rows<8>(query, r, count, scale, g);
    for (; r + 4 <= rows_; r += 4) matrix_rows<4>(query, r, count, scale, g);
    for (; r < rows_; r++) matrix_rows<1>(query, r, count, scale, g);
  }

  template <int R>
  void matrix_rows(const PairScalar* query, int64_t first, int64_t count, const v16f* scale, int g) {
    v16f sums[R][2];
    if constexpr (vs::kQuads) {
      Quad counts[R][2];
      start_counts<R>(first, counts);
      for (int64_t i = 0; i < static_cast<int64_t>(quads_.size()); i++)
        add_counts<R>(s_.key_quads[2 * i], s_.key_quads[2 * i + 1], q_.quads.bytes + i * rows_ + first, counts);
      end_counts<R>(first, counts, sums);
    } else {
      clear<2 * R>(&sums[0][0]);
    }
    for (int64_t i = 0; i < count; i++) {
      const Pair a = s_.keys[2 * i], b = s_.keys[2 * i + 1];
      add_scores<R>(a, b, query + pair_of_[i] * rows_ + first, sums);
    }
    for (int r = 0; r < R; r++)
      for (int h = 0; h < 2; h++)
        store(s_.scores + (first + r) * kTile + g * vs::kGroup + h * vs::kHalf, sums[r][h] * scale[h]);
  }

  // The fallback's keys of a group, one by one: they are rare.
  void flat_scores(const uint8_t* group, int g, uint32_t wanted) {
    for (uint32_t left = flat_mask(group) & wanted; left; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const uint8_t* words = group + layer_.key_start[item_.head] + lane / vs::kHalf * layer_.key_half[item_.head] + lane % vs::kHalf * 4;
      flat_levels(layer_.keys.flat[item_.head], words, 0);
      const float scale = layer_.scales[group[lane] & (vs::kFlat - 1)];
      for (int64_t r = 0; r < rows_; r++) {
        v16f sums = {};
        for (int64_t c = 0; c < dim_; c += 16) sums = load(q_.flat + r * dim_ + c) * load(s_.vectors + c) + sums;
        s_.scores[r * kTile + g * vs::kGroup + lane] = (sum(sums) * scale + q_.flat_center[r]) * call_.scale;
      }
    }
  }

  // vector[c] = level of the fallback's code, from the 32 bits of each vector of words.
  void flat_levels(const std::vector<vs::Field>& fields, const uint8_t* words, int extra) {
    for (int64_t c = 0; c < dim_; c++) {
      uint32_t word;
      memcpy(&word, words + fields[c].offset, 4);
      s_.vectors[c] = fields[c].levels[(word >> (fields[c].shift + extra) & ((1u << fields[c].bits) - 1))];
    }
  }

  // The copies of a group's positions in mask as rows of bf16, in the pool, in the step's own tensor, or in a buffer if that
  // has another type; rows of zeros for all others.
  void copies_of(int g, int64_t first, uint32_t mask, bool keys, const uint16_t** rows) const {
    const uint16_t* pool = keys ? call_.copy_keys : call_.copy_values;
    const uint32_t own_tokens = mask & between(before_, context_, first), pooled = mask & ~own_tokens;
    for (int t = 0; t < vs::kGroup; t++) rows[t] = pooled >> t & 1 ? pool + copy_lines_[g][t] * dim_ : s_.zeros;
    const Rows& own = keys ? call_.keys : call_.values;
    for (uint32_t left = own_tokens; left; left &= left - 1) {
      const int t = __builtin_ctz(left);
      const int64_t token = call_.query_start[item_.request] + first + t - before_;
      if (own.dtype == kBFloat16) {
        rows[t] = static_cast<const uint16_t*>(own.data) + token * own.token_stride + item_.head * own.head_stride;
        continue;
      }
      uint16_t* buffer = s_.copies + t * dim_;
      read_row(own, token, item_.head, dim_, s_.vectors);
      for (int64_t c = 0; c < dim_; c++) buffer[c] = bf16_of(s_.vectors[c]);
      rows[t] = buffer;
    }
  }

  // 32 channels of a row, or the 16 that are left, as 16 pairs.
  static VS_INLINE v16u channels(const uint16_t* row, int64_t part, int64_t dim) {
    v16u pairs = {};
    if (32 * part + 32 <= dim)
      memcpy(&pairs, row + 32 * part, 64);
    else
      memcpy(&pairs, row + 32 * part, 32);
    return pairs;
  }

  // Scores of copies, where a row reads them, over those of pages.
  void exact_scores(int g, int64_t first, uint32_t mask) {
    const uint16_t* rows[vs::kGroup];
    copies_of(g, first, mask, true, rows);
    for (int h = 0; h < 2; h++) {
      const uint32_t half = mask >> h * vs::kHalf & 0xffff;
      if (!half) continue;
      const uint16_t* const* at = rows + h * vs::kHalf;
      for (int64_t r = 0; r < rows_;) {
        switch (rows_ - r) {
          case 1: exact_rows<1>(at, half, r, first, g, h); r += 1; break;
          case 2: exact_rows<2>(at, half, r, first, g, h); r += 2; break;
          default: exact_rows<4>(at, half, r, first, g, h); r += 4;
        }
      }
    }
  }

  // Up to R rows over half a group: a vector of sums holds all of them for as many tokens as it has room for.
  template <int R>
  void exact_rows(const uint16_t* const* keys, uint32_t mask, int64_t start, int64_t first, int g, int h) {
    constexpr int kTokens = 16 / R;
    const int64_t parts = padded(dim_) / 32, last = rows_ - 1;
    alignas(64) float scores[R][16];
    for (int t = 0; t < 16; t += kTokens) {
      if (!(mask >> t & ((1u << kTokens) - 1))) continue;
      v16f products_of[16];  // [row][token]
      clear<16>(products_of);
      for (int64_t part = 0; part < parts; part++) {
        Pair query[R];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) query[i] = q_.exact[std::min(start + i, last) * parts + part];
#pragma GCC unroll 16
        for (int k = 0; k < kTokens; k++) {
          const Pair key = Pairs::of_bf16(channels(keys[t + k], part, dim_));
#pragma GCC unroll 4
          for (int i = 0; i < R; i++) products_of[i * kTokens + k] = Pairs::dot(products_of[i * kTokens + k], key, query[i]);
        }
      }
      if (!start) next_.copies(kTokens);
      alignas(64) float found[16];
      store(found, sums(products_of));
#pragma GCC unroll 4
      for (int i = 0; i < R; i++) memcpy(&scores[i][t], found + i * kTokens, kTokens * sizeof(float));
    }
    for (int i = 0; i < R && start + i < rows_; i++) {
      const uint32_t read = seen(start + i, first) >> h * vs::kHalf & mask & near(start + i, first) >> h * vs::kHalf;
      float* at = s_.scores + (start + i) * kTile + g * vs::kGroup + h * vs::kHalf;
      store(at, select(lanes(read), load(scores[i]) * call_.scale, load(at)));
    }
  }

  // Softmax of one row over a tile, and the weights as pairs of tokens.
  void weigh(int64_t r, int64_t start, int groups, const uint32_t* copies, const uint32_t* any_paged, const uint32_t* any_exact,
             State& state) {
    float* scores = s_.scores + r * kTile;
    v16f most = splat(kNone);
    uint32_t visible[kTileGroups], exact[kTileGroups];
    for (int g = 0; g < groups; g++) {
      if (whole_[g] && call_.soft_cap <= 0) {
        visible[g] = ~0u;
        exact[g] = 0;
        const float* at = scores + g * vs::kGroup;
        most = larger(most, larger(load(at), load(at + vs::kHalf)));
        continue;
      }
      const int64_t first = start + g * vs::kGroup;
      visible[g] = whole_[g] ? ~0u : seen(r, first);
      exact[g] = whole_[g] ? 0 : visible[g] & copies[g] & near(r, first);
      for (int h = 0; h < 2; h++) {
        float* at = scores + g * vs::kGroup + h * vs::kHalf;
        v16f x = load(at);
        if (call_.soft_cap > 0) x = soft_capped(x, call_.soft_cap);
        x = select(lanes(visible[g] >> 16 * h), x, splat(kNone));
        store(at, x);
        most = larger(most, x);
      }
    }
    const float tile_peak = peak(most);
    if (tile_peak == kNone) {
      for (int g = 0; g < groups; g++) {
        const v16f zero = {};
        s_.paged_pairs[r * kTileGroups + g] = Pairs::of(zero, zero);
        s_.paged_quads[r * kTileGroups + g] = Quad{};
        Pairs::spread(Pairs::of(zero, zero), s_.exact_pairs + (r * kTileGroups + g) * 16);
        for (int h = 0; h < 2; h++) store(s_.paged + r * kTile + g * vs::kGroup + h * vs::kHalf, zero);
      }
      return;
    }
    const float now = std::max(state.peak[r], tile_peak);
    const float keep = exp_negative(splat(state.peak[r] - now))[0];
    state.peak[r] = now;
    v16f total = {}, largest = {};
    const bool pairs = !value_singles_.fields.empty();
    for (int g = 0; g < groups; g++) {
      if (vs::kQuads && whole_[g] && !value_flat_[g]) {
        v16f scaled[2];
        for (int h = 0; h < 2; h++) {
          const v16f weight = exp_negative(load(scores + g * vs::kGroup + h * vs::kHalf) - now);
          total = total + weight;
          scaled[h] = weight * value_scale_[g][h];
          store(s_.scaled + g * vs::kGroup + h * vs::kHalf, scaled[h]);
          largest = larger(largest, scaled[h]);
        }
        if (pairs) s_.paged_pairs[r * kTileGroups + g] = Pairs::of(scaled[0], scaled[1]);
        continue;
      }
      v16f paged[2], copied[2];
      for (int h = 0; h < 2; h++) {
        const int64_t at = g * vs::kGroup + h * vs::kHalf;
        const v16f weight = exp_negative(load(scores + at) - now);
        total = total + weight;
        const v16i from_copy = lanes(exact[g] >> 16 * h);
        copied[h] = select(from_copy, weight, v16f{});
        paged[h] = select(from_copy, v16f{}, weight);
      }
      if (any_paged[g]) {
        for (int h = 0; h < 2; h++) {
          store(s_.paged + r * kTile + g * vs::kGroup + h * vs::kHalf, paged[h]);
          paged[h] = select(lanes(value_flat_[g] >> 16 * h), v16f{}, paged[h] * value_scale_[g][h]);
          if constexpr (vs::kQuads) {
            store(s_.scaled + g * vs::kGroup + h * vs::kHalf, paged[h]);
            largest = larger(largest, paged[h]);
          }
        }
        if (pairs) s_.paged_pairs[r * kTileGroups + g] = Pairs::of(paged[0], paged[1]);
      }
      if (any_exact[g]) Pairs::spread(Pairs::of(copied[0], copied[1]), s_.exact_pairs + (r * kTileGroups + g) * 16);
    }
    if constexpr (vs::kQuads) to_bytes(r, groups, any_paged, peak(largest));
    state.total[r] = state.total[r] * keep + sum(total);
    if (keep != 1.0f) {
      float* row = state.rotated(r);
      for (int64_t c = 0; c < state.width; c += 16) store(row + c, load(row + c) * keep);
    }
  }

  // The r-th row's scaled weights as quads of bytes, of which the largest weight is 254.
  void to_bytes(int64_t r, int groups, const uint32_t* any_paged, float largest) {
    const float inverse = largest > 0 ? 254 / largest : 0.0f;
    s_.weight_step[r] = largest / 254;
    v16f carried[2] = {};
    for (int g = 0; g < groups; g++) {
      if (!any_paged[g]) continue;
      Quad bytes[2];
      for (int h = 0; h < 2; h++) {
        const v16f x = load(s_.scaled + g * vs::kGroup + h * vs::kHalf) * inverse + carried[h];
        bytes[h] = Quads::rounded(x);
        carried[h] = x - Quads::numbers(bytes[h]);
      }
      s_.paged_quads[r * kTileGroups + g] = Quads::spread(bytes[0], bytes[1]);
    }
  }

  static v16f soft_capped(v16f x, float cap) {
    // cap * tanh(x / cap), by e ** (-2 |x| / cap).
    const v16f magnitude = select(x < 0.0f, -x, x);
    const v16f e = exp_negative(magnitude * (-2.0f / cap));
    const v16f y = (1.0f - e) / (1.0f + e) * cap;
    return select(x < 0.0f, -y, y);
  }

  void page_outputs(int64_t start, int groups, const uint32_t* any_paged, State& state) {
    int active[kTileGroups], count = 0;
    const uint8_t* words[kTileGroups];
    for (int g = 0; g < groups; g++) {
      const int64_t first = start + g * vs::kGroup;
      next_values_[g] = group_ahead(first, kTile) + key_lines_ * vs::kVectorBytes;
      if (!any_paged[g]) continue;
      active[count] = g;
      words[count++] = group_at(first) + layer_.value_start[item_.head];
    }
    if constexpr (vs::kQuads) quad_outputs(active, count, words, state);
    if (!value_singles_.fields.empty()) pair_outputs(active, count, words, state);
    flat_outputs(start, groups, any_paged, state);
  }

  // Channels in quads, kQuadsAtOnce of them together.
  void quad_outputs(const int* active, int count, const uint8_t* const* words, State& state) {
    int64_t line = 0;
    for (size_t first = 0; first < value_quads_.size(); first += vs::kQuadsAtOnce) {
      const vs::Quad* quads = value_quads_.data() + first;
      const int64_t end = value_lines_ * (first + vs::kQuadsAtOnce) / value_quads_.size();
      for (int k = 0; k < count; k++)
        for (int64_t i = line; i < end; i++) __builtin_prefetch(next_values_[active[k]] + i * vs::kVectorBytes, 0, 2);
      line = end;
      switch (rows_) {
        case 1: quad_rows<1, false>(quads, 0, active, count, words, state); continue;
        case 2: quad_rows<2, false>(quads, 0, active, count, words, state); continue;
        case 3: quad_rows<3, false>(quads, 0, active, count, words, state); continue;
        case 4: quad_rows<4, false>(quads, 0, active, count, words, state); continue;
      }
      const Quad table = Quads::table(layer_.byte_levels, 0);
      for (int j = 0; j < vs::kQuadsAtOnce; j++)
        for (int k = 0; k < count; k++)
          s_.value_quads[j * kTileGroups + k] = Quads::expand(quads[j], words[k] + quads[j].offset, table);
      int64_t r = 0;
      for (; r + 4 <= rows_; r += 4) quad_rows<4, true>(quads, r, active, count, words, state);
      switch (rows_ - r) {
        case 1: quad_rows<1, true>(quads, r, active, count, words, state); break;
        case 2: quad_rows<2, true>(quads, r, active, count, words, state); break;
        case 3: quad_rows<3, true>(quads, r, active, count, words, state); break;
      }
    }
  }

  template <int R, bool kExpanded>
  void quad_rows(const vs::Quad* quads, int64_t first, const int* active, int count, const uint8_t* const* words, State& state) {
    constexpr int kWidth = vs::kQuadsAtOnce;
    const Quad table = Quads::table(layer_.byte_levels, 0);
    Quad counts[16];  // [row][quad]
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) counts[i] = Quad{};
    const Quad* weights = s_.paged_quads + first * kTileGroups;
    for (int k = 0; k < count; k++) {
      Quad level[kWidth];
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; j++)
        level[j] = kExpanded ? s_.value_quads[j * kTileGroups + k] : Quads::expand(quads[j], words[k] + quads[j].offset, table);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const Quad weight = weights[r * kTileGroups + active[k]];
#pragma GCC unroll 4
        for (int j = 0; j < kWidth; j++) counts[r * kWidth + j] = Quads::dot(counts[r * kWidth + j], weight, level[j]);
      }
    }
    // In registers until here: an array that is indexed at run time would live in memory.
    alignas(64) float found[32];  // [row][quad][member]
    store(found, Quads::numbers(sums_but_last(counts)));
    if (R > 2) store(found + 16, Quads::numbers(sums_but_last(counts + 8)));
    const int64_t at = 2 * (quads - value_quads_.data());
    const v8f step = load_half(layer_.quad_steps.get() + item_.head * layer_.quad_floats + at);
    for (int r = 0; r < R; r++) {
      float* out = state.quads(first + r) + at;
      store_half(out, load_half(found + 8 * r) * (step * s_.weight_step[first + r]) + load_half(out));
    }
  }

  void pair_outputs(const int* active, int count, const uint8_t* const* words, State& state) {
    switch (rows_) {
      case 1: fused_outputs<1>(active, count, words, state); break;
      case 2: fused_outputs<2>(active, count, words, state); break;
      case 3: fused_outputs<3>(active, count, words, state); break;
      case 4: fused_outputs<4>(active, count, words, state); break;
      case 5:
      case 6:
      case 7:
      case 8: fused_outputs<8>(active, count, words, state); break;
      default: matrix_outputs(active, count, words, state);
    }
  }

  template <int R>
  void fused_outputs(const int* active, int count, const uint8_t* const* words, State& state) {
    constexpr int kChannels = R <= 4 ? 4 : 2, kSlots = 16 / kChannels;
    const std::vector<vs::Field>& fields = value_singles_.fields;
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
      if (start + kChannels <= value_singles_.narrow)
        add_products<R, kChannels, false>(table, offset, active, count, words, sums_of);
      else
        add_products<R, kChannels, true>(table, offset, active, count, words, sums_of);
      alignas(64) float added[16];
      store(added, sums(sums_of));
      for (int r = 0; r < std::min<int64_t>(kSlots, rows_); r++)
        for (int i = 0; i < std::min<int64_t>(kChannels, total - start); i++) {
          const int32_t c = fields[start + i].channel;
          float& out = state.rotated(r)[c];
          out = added[r * kChannels + i] * width_[c] + out;
        }
    }
  }

  template <int R, int kChannels, bool kWide>
  VS_INLINE void add_products(const Pairs::Table* table, const int64_t* offset, const int* active, int count,
                              const uint8_t* const* words, v16f* sums_of) {
    for (int k = 0; k < count; k++) {
      Pair level[kChannels];
#pragma GCC unroll 4
      for (int i = 0; i < kChannels; i++)
        level[i] = kWide ? Pairs::expand_any(table[i], words[k] + offset[i]) : Pairs::expand(table[i], words[k] + offset[i]);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Pair weight = s_.paged_pairs[r * kTileGroups + active[k]];
#pragma GCC unroll 4
        for (int i = 0; i < kChannels; i++)
          sums_of[r * kChannels + i] = Pairs::dot(sums_of[r * kChannels + i], level[i], weight);
      }
    }
  }

  void matrix_outputs(const int* active, int count, const uint8_t* const* words, State& state) {
    const std::vector<vs::Field>& fields = value_singles_.fields;
    const int64_t total = fields.size();
    for (int64_t start = 0; start < total; start += kBlock) {
      const int64_t channels = std::min<int64_t>(kBlock, total - start);
      for (int i = 0; i < channels; i++) {
        const Pairs::Table table = Pairs::table(fields[start + i]);
        for (int k = 0; k < count; k++)
          s_.values[i * kTileGroups + k] = Pairs::expand_any(table, words[k] + fields[start + i].offset);
      }
      for (int64_t r = 0; r < rows_; r++) {
        alignas(64) float added[16];
        store(added, row_sums(s_.values, s_.paged_pairs + r * kTileGroups, active, count));
        for (int i = 0; i < channels; i++) {
          const int32_t c = fields[start + i].channel;
          float& out = state.rotated(r)[c];
          out = added[i] * width_[c] + out;
        }
      }
    }
  }

  void exact_outputs(int64_t start, int groups, const uint32_t* any_exact, State& state) {
    for (int g = 0; g < groups; g++) {
      if (!any_exact[g]) continue;
      const uint16_t* rows[vs::kGroup];
      copies_of(g, start + g * vs::kGroup, any_exact[g], false, rows);
      const uint32_t tokens = (any_exact[g] | any_exact[g] >> 16) & 0xffff;
      for (int64_t r = 0; r < rows_;) {
        switch (rows_ - r) {
          case 1: add_copies<1>(rows, tokens, r, g, state); r += 1; break;
          case 2: add_copies<2>(rows, tokens, r, g, state); r += 2; break;
          case 3: add_copies<3>(rows, tokens, r, g, state); r += 3; break;
          default: add_copies<4>(rows, tokens, r, g, state); r += 4;
        }
      }
    }
  }

  // R rows' outputs of a group's copies: pairs of tokens, channels in lanes.
  template <int R>
  void add_copies(const uint16_t* const* values, uint32_t tokens, int64_t first, int g, State& state) {
    const int64_t parts = padded(dim_) / 32;
    const PairScalar* weights = s_.exact_pairs + (first * kTileGroups + g) * 16;
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
        const v16u a = channels(values[t], part, dim_), b = channels(values[16 + t], part, dim_);
        const Pair low = Pairs::of_bf16((a & 0xffffu) | b << 16), high = Pairs::of_bf16(a >> 16 | (b & 0xffff0000u));
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

  // For 16 channels, the sum over groups and tokens of values * weights.
  static VS_INLINE v16f row_sums(const Pair* values, const Pair* weights, const int* active, int count) {
    v16f sums_of[16];
    clear<16>(sums_of);
    for (int k = 0; k < count; k++) {
      const Pair weight = weights[active[k]];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) sums_of[i] = Pairs::dot(sums_of[i], values[i * kTileGroups + k], weight);
    }
    return sums(sums_of);
  }

  // The fallback's values of a tile, one by one.
  void flat_outputs(int64_t start, int groups, const uint32_t* any_paged, State& state) {
    const float* flat_width = layer_.values.flat_width.get() + item_.head * dim_;
    const float* center = layer_.values.center.get() + item_.head * dim_;
    for (int g = 0; g < groups; g++) {
      if (!any_paged[g]) continue;
      const uint8_t* group = group_at(start + g * vs::kGroup);
      for (uint32_t left = value_flat_[g] & any_paged[g]; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        flat_levels(layer_.values.flat[item_.head], group + layer_.value_start[item_.head] + lane % vs::kHalf * 4,
                    lane / vs::kHalf * 16);
        const float scale = layer_.scales[group[vs::kValueScales + lane] & (vs::kFlat - 1)];
        for (int64_t c = 0; c < dim_; c += 16)
          store(s_.vectors + c, load(s_.vectors + c) * load(flat_width + c) * scale + load(center + c));
        for (int64_t r = 0; r < rows_; r++) {
          const float weight = s_.paged[r * kTile + g * vs::kGroup + lane];
          float* out = state.rotated(r);
          for (int64_t c = 0; c < dim_; c += 16) store(out + c, load(s_.vectors + c) * weight + load(out + c));
        }
      }
    }
  }

  const Shape& shape_;
  const Layer& layer_;
  const StepCall& call_;
  const Item& item_;
  const Queries& q_;
  Scratch& s_;
  const int64_t dim_, rows_;
  const vs::Singles& pairs_;
  const std::vector<vs::Quad>& quads_;
  const vs::Singles& value_singles_;
  const std::vector<vs::Quad>& value_quads_;
  Ahead next_;
  int64_t context_, before_, first_query_, last_query_;
  int64_t pages_end_;              // where this item's pages end: positions from here on are the next item's, or exact
  int64_t key_lines_, value_lines_;  // cache lines of a group, the scales counted with the keys
  const float* width_;
  int16_t pair_of_[256];
  int64_t position_[kRows];
  const uint8_t* next_values_[kTileGroups];  // those of the tile to come
  int32_t copy_lines_[kTileGroups][vs::kGroup];  // where copies lie in the pool, counting lines of dim
  v16f value_scale_[kTileGroups][2];
  uint32_t value_flat_[kTileGroups];
  bool whole_[kTileGroups];  // all rows read all of the group from its page
};

int64_t tiles(int64_t context) { return (context + kTile - 1) / kTile; }

// What threads take: every request's rows in blocks. Where these alone would leave threads idle, long ones are cut into spans.
struct Plan {
  std::vector<Item> blocks;      // done by one thread, the longest first
  std::vector<Item> cut, spans;  // blocks that are cut, and their spans, in order
  std::vector<int64_t> first_span;  // of each cut block, and the end
  std::vector<int64_t> block_of;    // of each span

  explicit Plan(const Shape& shape) {
    for (int64_t request = 0; request < shape.call.num_requests; request++)
      for (int64_t row = 0; row < shape.rows(request); row += kRows)
        for (int64_t head = 0; head < shape.layer.heads; head++) {
          const int64_t rows = std::min<int64_t>(kRows, shape.rows(request) - row);
          const int64_t before = shape.call.context_lens[request] - shape.queries(request);
          blocks.push_back({request, head, row, rows, 0, tiles(before + (row + rows - 1) / shape.group + 1)});
        }
    std::stable_sort(blocks.begin(), blocks.end(), [](const Item& a, const Item& b) { return a.last_tile > b.last_tile; });
    if (static_cast<int64_t>(blocks.size()) >= 8 * shape.call.num_threads) return;
    const int64_t tiles_per_span = kSpan / kTile;
    const auto is_long = [&](const Item& item) { return item.last_tile > tiles_per_span; };
    const auto end = std::find_if_not(blocks.begin(), blocks.end(), is_long);
    cut.assign(blocks.begin(), end);
    blocks.erase(blocks.begin(), end);
    for (const Item& item : cut) {
      first_span.push_back(spans.size());
      for (int64_t tile = 0; tile < item.last_tile; tile += tiles_per_span) {
        block_of.push_back(first_span.size() - 1);
        spans.push_back(item);
        spans.back().first_tile = tile;
        spans.back().last_tile = std::min(tile + tiles_per_span, item.last_tile);
      }
    }
    first_span.push_back(spans.size());
  }
};

// What cut blocks need beside the threads' scratch.
struct Shared {
  std::vector<Queries> queries;  // of each cut block
  std::vector<float*> states;    // of each span
  Shared(const Plan& plan, const Layer& layer, vs::Carver& carver) {
    for (const Item& item : plan.cut) queries.emplace_back(item.rows, layer.dim, carver);
    for (const Item& item : plan.spans) {
      states.emplace_back();
      carver.take(states.back(), State::floats(item.rows, layer));
    }
  }
};

}  // namespace

int64_t vs_step(const Layer* layer_pointer, const StepCall* call_pointer) {
  const Layer& layer = *layer_pointer;
  const StepCall& call = *call_pointer;
  const Shape shape{call.num_query_heads / layer.heads, layer, call};
  const Plan plan(shape);
  const int64_t dim = layer.dim, blocks = plan.blocks.size(), cut = plan.cut.size(), spans = plan.spans.size();
  const int64_t stored = vs::store_units(layer, call), written = (call.num_writes + kWrites - 1) / kWrites;
  vs::Carver counter(nullptr);
  vs::StoreScratch(layer, counter);
  Scratch(layer, counter);
  const size_t each = counter.used();
  Shared(plan, layer, counter);
  const int64_t needed = (call.num_threads - 1) * each + counter.used();
  if (needed > call.workspace_bytes) return needed;
  vs::Carver carver(call.workspace + call.num_threads * each);
  Shared shared(plan, layer, carver);
#pragma omp parallel num_threads(call.num_threads)
  {
    vs::Carver own(call.workspace + omp_get_thread_num() * each);
    vs::StoreScratch store_scratch(layer, own);
    Scratch scratch(layer, own);
    std::fill(scratch.zeros, scratch.zeros + dim, uint16_t{0});
    // Before anything is read: a request of this step may share a prefix that another one is just writing.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < stored + cut + written; i++) {
      if (i < stored)
        vs::store_unit(layer, call, i, store_scratch);
      else if (i < stored + cut)
        Attention::prepare(shape, plan.cut[i - stored], shared.queries[i - stored], scratch);
      else
        for (int64_t k = (i - stored - cut) * kWrites; k < std::min((i - stored - cut + 1) * kWrites, call.num_writes); k++)
          write_copy(layer, call, k, scratch.lines);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < spans + blocks; i++) {
      if (i < spans) {
        const Item& item = plan.spans[i];
        State state(shared.states[i], item.rows, layer);
        state.clear(item.rows);
        const Item* next = i + call.num_threads < spans ? &item + call.num_threads : nullptr;
        Attention(shape, item, shared.queries[plan.block_of[i]], scratch, next).run(state);
        continue;
      }
      const Item& item = plan.blocks[i - spans];
      State state(scratch.item, item.rows, layer);
      state.clear(item.rows);
      const bool more = i - spans + call.num_threads < blocks;
      Attention::prepare(shape, item, scratch.queries, scratch);
      Attention(shape, item, scratch.queries, scratch, more ? &item + call.num_threads : nullptr).run(state);
      Attention::finish(shape, item, state, scratch);
    }
    if (cut) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < cut; i++) {
        const Item& item = plan.cut[i];
        State state(scratch.item, item.rows, layer);
        state.clear(item.rows);
        for (int64_t k = plan.first_span[i]; k < plan.first_span[i + 1]; k++)
          Attention::merge(state, State(shared.states[k], item.rows, layer), item.rows);
        Attention::finish(shape, item, state, scratch);
      }
    }
  }
  return 0;
}

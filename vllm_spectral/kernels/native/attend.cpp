// Attend: one step's queries over compressed pages and exact copies. Compiled once per instruction set.
//
// Work is cut into tiles of 512 and spans of 1024 positions, at fixed multiples of both. A tile's softmax is merged into
// its span's, a span's into the result, in order. So a query's output has the same bits however its prompt was cut, whoever
// shares the batch and however many threads run: each row sees the same operations in the same order everywhere.
//
// Products run over pairs. For scores a pair is two channels of one token: a lane is a token, and a query's pair is
// broadcast. For outputs a pair is two tokens of one channel: lanes are 16 such pairs, added up at the end of a tile.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "layer.h"
#include "pairs.h"
#include "rows.h"
#include "simd.h"

namespace {

constexpr int kTileGroups = 16, kTile = kTileGroups * vs::kGroup;  // positions per softmax tile
constexpr int kSpan = 2 * kTile;                                  // positions per unit of parallel work
constexpr int kRows = 64;                                         // most (query, head) rows attended to together
constexpr int kAhead = 2;                                         // groups from the one at work to the one being fetched
constexpr int kBlock = 16;  // channels whose outputs are summed together
constexpr float kNone = -INFINITY;

int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

// Softmax state of a set of rows: numerators in the rotated basis (pages) and in the model's (copies).
struct State {
  float *peak, *total;  // [rows]
  float* rotated;       // [rows, dim]
  float* plain;         // [rows, padded dim]; of every 32 channels, 16 even ones, then 16 odd ones
  static size_t floats(int64_t rows, int64_t dim) { return rows * (2 + dim + padded(dim)); }
  State(float* at, int64_t rows, int64_t dim) : peak(at), total(at + rows), rotated(at + 2 * rows), plain(rotated + rows * dim) {}
  void clear(int64_t rows, int64_t dim) {
    std::fill(peak, peak + rows, kNone);
    std::fill(total, total + rows, 0.0f);
    std::fill(rotated, rotated + rows * (dim + padded(dim)), 0.0f);
  }
};

// Hands out 64-byte aligned arrays from one block of memory; from nothing, it counts what they take.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <typename T>
  void take(T*& array, size_t count) {
    array = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

// The queries of some rows, in the forms in which they meet keys.
struct Queries {
  PairScalar* paged;  // [dim / 2, rows], rotated and times the channels' widths
  Pair* exact;        // [rows, padded dim / 32], as they came
  float* flat;                // [rows, dim], rotated and times the fallback's width
  float* flat_center;         // [rows], with the fallback's center

  Queries(int64_t rows, int64_t dim, Carver& carver) {
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
  Pair* exact_values;               // [16, padded dim / 16] one group's values: pairs of tokens, channels in lanes
  float *vector, *line;             // [dim]
  float *item, *span;               // states
  uint16_t *lines, *zeros;          // [kGroup, dim] and [dim]: bf16 rows

  Scratch(int64_t dim, Carver& carver) : queries(kRows, dim, carver) {
    carver.take(scores, kRows * kTile);
    carver.take(paged, kRows * kTile);
    carver.take(paged_pairs, kRows * kTileGroups);
    carver.take(exact_pairs, kRows * kTileGroups * 16);
    carver.take(keys, dim);
    carver.take(values, kBlock * kTileGroups);
    carver.take(exact_values, padded(dim));
    carver.take(vector, dim);
    carver.take(line, dim);
    carver.take(item, State::floats(kRows, dim));
    carver.take(span, State::floats(kRows, dim));
    carver.take(lines, vs::kGroup * dim);
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
  const AttendCall& call;
  int64_t queries(int64_t request) const { return call.query_start[request + 1] - call.query_start[request]; }
  int64_t rows(int64_t request) const { return queries(request) * group; }
};

// vector @ matrix, [dim, dim] row-major.
void product(const float* vector, const float* matrix, int64_t dim, float* out) {
  int64_t column = 0;
  for (; column + 64 <= dim; column += 64) {
    v16f a = {}, b = {}, c = {}, d = {};
    for (int64_t row = 0; row < dim; row++) {
      const float* at = matrix + row * dim + column;
      const v16f x = splat(vector[row]);
      a = load(at) * x + a;
      b = load(at + 16) * x + b;
      c = load(at + 32) * x + c;
      d = load(at + 48) * x + d;
    }
    store(out + column, a);
    store(out + column + 16, b);
    store(out + column + 32, c);
    store(out + column + 48, d);
  }
  for (; column < dim; column += 16) {
    v16f a = {};
    for (int64_t row = 0; row < dim; row++) a = load(matrix + row * dim + column) * vector[row] + a;
    store(out + column, a);
  }
}

// Where a row of the pool of copies lies, in elements.
int64_t copy_at(const AttendCall& call, const Layer& layer, int64_t row, int64_t head) {
  const int64_t entry = row >> call.copy_shift, token = row - (entry << call.copy_shift);
  return (((entry * layer.heads + head) << call.copy_shift) + token) * layer.dim;
}

// Copies the i-th of the step's tokens that the plan keeps.
void write_copy(const Layer& layer, const AttendCall& call, int64_t i, float* line) {
  for (int64_t head = 0; head < layer.heads; head++) {
    const int64_t at = copy_at(call, layer, call.write_rows[i], head);
    for (const bool keys : {true, false}) {
      uint16_t* to = (keys ? call.copy_keys : call.copy_values) + at;
      read_row(keys ? call.keys : call.values, call.write_tokens[i], head, layer.dim, line);
      for (int64_t c = 0; c < layer.dim; c++) to[c] = bf16_of(line[c]);
    }
  }
}

class Attention {
 public:
  Attention(const Shape& shape, const Item& item, const Queries& queries, Scratch& scratch)
      : shape_(shape),
        layer_(shape.layer),
        call_(shape.call),
        item_(item),
        q_(queries),
        s_(scratch),
        dim_(layer_.dim),
        rows_(item.rows),
        pairs_(layer_.key_pairs[item.head]),
        value_fields_(layer_.values.fields[item.head]) {
    context_ = call_.context_lens[item.request];
    before_ = context_ - shape.queries(item.request);
    first_query_ = before_ + item.first_row / shape.group;
    last_query_ = before_ + (item.first_row + rows_ - 1) / shape.group;
    width_ = layer_.values.width.get() + item.head * dim_;
    for (int64_t r = 0; r < rows_; r++) position_[r] = before_ + (item.first_row + r) / shape.group;
  }

  // Calls an item's copies into the second cache: they are scattered over their pool, and most of a short context.
  static void fetch(const Shape& shape, const Item& item) {
    const AttendCall& call = shape.call;
    if (!call.exact_on) return;
    const int64_t width = call.first + call.recent;
    for (int64_t i = 0; i < width; i++) {
      const int32_t row = call.exact_rows[item.request * width + i];
      if (row < 0) continue;
      const int64_t at = copy_at(call, shape.layer, row, item.head);
      for (int64_t c = 0; c < shape.layer.dim; c += 32) {
        __builtin_prefetch(call.copy_keys + at + c, 0, 2);
        __builtin_prefetch(call.copy_values + at + c, 0, 2);
      }
    }
  }

  // Attends to the item's tiles and merges them, span by span, into the state.
  void run(State& state) {
    State span(s_.span, rows_, dim_);
    const int64_t tiles_per_span = kSpan / kTile;
    for (int64_t tile = item_.first_tile; tile < item_.last_tile;) {
      const int64_t end = std::min((tile / tiles_per_span + 1) * tiles_per_span, item_.last_tile);
      span.clear(rows_, dim_);
      for (; tile < end; tile++) attend_tile(tile, span);
      merge(state, span, rows_, dim_);
    }
  }

  static void blend(float* into, float keep, const float* from, float add, int64_t count) {
    for (int64_t c = 0; c < count; c += 16) store(into + c, load(into + c) * keep + load(from + c) * add);
  }

  static void merge(State& into, const State& from, int64_t rows, int64_t dim) {
    for (int64_t r = 0; r < rows; r++) {
      if (from.peak[r] == kNone) continue;
      const float most = std::max(into.peak[r], from.peak[r]);
      const float keep = exp_negative(splat(into.peak[r] - most))[0], add = exp_negative(splat(from.peak[r] - most))[0];
      into.total[r] = into.total[r] * keep + from.total[r] * add;
      into.peak[r] = most;
      blend(into.rotated + r * dim, keep, from.rotated + r * dim, add, dim);
      blend(into.plain + r * padded(dim), keep, from.plain + r * padded(dim), add, padded(dim));
    }
  }

  static void prepare(const Shape& shape, const Item& item, Queries& queries, Scratch& s) {
    const int64_t dim = shape.layer.dim, at = item.head * dim;
    const vs::Coding& keys = shape.layer.keys;
    for (int64_t r = 0; r < item.rows; r++) {
      const int64_t row = item.first_row + r;
      read_row(shape.call.query, shape.call.query_start[item.request] + row / shape.group,
               item.head * shape.group + row % shape.group, dim, s.vector);
      for (int64_t part = 0; part < padded(dim) / 32; part++) {
        v16f even = {}, odd = {};
        for (int i = 0; i < 16 && 32 * part + 2 * i < dim; i++) {
          even[i] = s.vector[32 * part + 2 * i];
          odd[i] = s.vector[32 * part + 2 * i + 1];
        }
        queries.exact[r * padded(dim) / 32 + part] = Pairs::of(even, odd);
      }
      product(s.vector, keys.basis + at * dim, dim, s.line);
      v16f at_center = {};
      for (int64_t c = 0; c < dim; c += 16) {
        const v16f x = load(s.line + c);
        at_center = at_center + x * load(keys.center.get() + at + c);
        store(queries.flat + r * dim + c, x * load(keys.flat_width.get() + at + c));
        store(s.line + c, x * load(keys.width.get() + at + c));
      }
      queries.flat_center[r] = sum(at_center);
      Pairs::scalars(s.line, dim, queries.paged + r, item.rows);
    }
  }

  static void finish(const Shape& shape, const Item& item, const State& state, Scratch& s) {
    const int64_t dim = shape.layer.dim;
    const float* back = shape.layer.values.transposed.get() + item.head * dim * dim;
    for (int64_t r = 0; r < item.rows; r++) {
      const int64_t row = item.first_row + r;
      const float share = state.total[r] > 0 ? 1.0f / state.total[r] : 0.0f;
      for (int64_t c = 0; c < dim; c += 16) store(s.vector + c, load(state.rotated + r * dim + c) * share);
      product(s.vector, back, dim, s.line);
      const float* plain = state.plain + r * padded(dim);
      for (int64_t c = 0; c < dim; c++) s.line[c] += plain[c / 32 * 32 + c % 2 * 16 + c % 32 / 2] * share;
      write_row(shape.call.output, shape.call.query_start[item.request] + row / shape.group,
                item.head * shape.group + row % shape.group, dim, s.line);
    }
  }

 private:
  const uint8_t* group_at(int64_t first) const {
    const int64_t block_size = call_.pages.block_size;
    const int64_t block = call_.block_table[item_.request * call_.block_table_stride + first / block_size];
    return call_.pages.data + block * call_.pages.block_stride + item_.head * call_.pages.head_stride +
           first % block_size * layer_.slot_bytes;
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

  // The pool's row of a position before the step: -1 without a copy.
  int64_t pool_row(int64_t position) const {
    const int32_t* rows = call_.exact_rows + item_.request * (call_.first + call_.recent);
    const int64_t start = std::max<int64_t>(before_ - call_.recent, 0);
    if (position < call_.first) return rows[position];
    return position < start ? -1 : rows[call_.first + position - start];
  }

  // Which of a group's positions have an exact copy that some row of the item may read.
  uint32_t copied(int64_t first) const {
    if (!call_.exact_on) return 0;
    uint32_t candidates = between(0, call_.first, first) | between(first_query_ - call_.recent + 1, last_query_ + 1, first);
    uint32_t found = candidates & between(before_, context_, first);
    for (uint32_t left = candidates & ~found; left; left &= left - 1) {
      const int bit = __builtin_ctz(left);
      if (first + bit < before_ && pool_row(first + bit) >= 0) found |= 1u << bit;
    }
    return found;
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
      copies[g] = copied(first);
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
        const int64_t ahead = std::min(first + kAhead * vs::kGroup, last_query_ / vs::kGroup * vs::kGroup);
        page_scores(group, group_at(ahead), g, any_paged[g]);
        value_flat_[g] = flat_mask(group + vs::kValueScales);
        for (int h = 0; h < 2; h++) value_scale_[g][h] = scales(group + vs::kValueScales + h * vs::kHalf);
      }
      if (any_exact[g]) {
        exact_scores(g, first, any_exact[g]);
      }
    }
    if (!paged && !exact) return;
    for (int64_t r = 0; r < rows_; r++) weigh(r, start, groups, copies, any_paged, any_exact, state);
    if (paged) page_outputs(start, groups, any_paged, state);
    if (exact) exact_outputs(start, groups, any_exact, state);
  }

  // scores[r, group g] = scale * q . k for keys in a page, while the group at next is fetched: pages are scattered over the
  // pool, so that no hardware sees the next one coming.
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
        for (const vs::Field& field : pairs_.fields) {
          const Pairs::Table table = Pairs::table(field);
          s_.keys[2 * count] = Pairs::expand_any(table, words + field.offset);
          s_.keys[2 * count + 1] = Pairs::expand_any(table, words + half + field.offset);
          pair_of_[count++] = static_cast<int16_t>(field.channel);
          __builtin_prefetch(next + count * vs::kVectorBytes, 0, 3);
        }
        matrix_scores(q_.paged, count, scale, g);
      }
    }
    flat_scores(group, g, wanted);
  }

  template <int R>
  void fused_scores(const uint8_t* words, const uint8_t* next, const v16f* scale, int g) {
    v16f sums[R][2];
    clear<2 * R>(&sums[0][0]);
    const vs::Field* fields = pairs_.fields.data();
    const int64_t count = pairs_.fields.size(), narrow = pairs_.narrow;
    const uint8_t* upper = words + layer_.key_half[item_.head];
    const PairScalar* queries = q_.paged;
    const int64_t lines = vs::kGroup * layer_.slot_bytes / vs::kVectorBytes;
    for (int64_t i = 0; i < narrow; i++) {
      const Pairs::Table table = Pairs::table(fields[i]);
      add_scores<R>(Pairs::expand(table, words + fields[i].offset), Pairs::expand(table, upper + fields[i].offset),
                    queries + fields[i].channel * R, sums);
      __builtin_prefetch(next + i * vs::kVectorBytes, 0, 3);
    }
    for (int64_t i = narrow; i < count; i++) {
      const Pairs::Table table = Pairs::table(fields[i]);
      add_scores<R>(Pairs::expand_any(table, words + fields[i].offset), Pairs::expand_any(table, upper + fields[i].offset),
                    queries + fields[i].channel * R, sums);
    }
    for (int64_t i = narrow; i < lines; i++) __builtin_prefetch(next + i * vs::kVectorBytes, 0, 3);
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

  // For a group whose pairs lie in s_.keys; pair_of_ tells which of the query's pairs each one meets.
  void matrix_scores(const PairScalar* query, int64_t count, const v16f* scale, int g) {
    int64_t r = 0;
    for (; r + 8 <= rows_; r += 8) matrix_rows<8>(query, r, count, scale, g);
    for (; r + 4 <= rows_; r += 4) matrix_rows<4>(query, r, count, scale, g);
    for (; r < rows_; r++) matrix_rows<1>(query, r, count, scale, g);
  }

  template <int R>
  void matrix_rows(const PairScalar* query, int64_t first, int64_t count, const v16f* scale, int g) {
    v16f sums[R][2];
    clear<2 * R>(&sums[0][0]);
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
        for (int64_t c = 0; c < dim_; c += 16) sums = load(q_.flat + r * dim_ + c) * load(s_.vector + c) + sums;
        s_.scores[r * kTile + g * vs::kGroup + lane] = (sum(sums) * scale + q_.flat_center[r]) * call_.scale;
      }
    }
  }

  // vector[c] = level of the fallback's code, from the 32 bits of each vector of words.
  void flat_levels(const std::vector<vs::Field>& fields, const uint8_t* words, int extra) {
    for (int64_t c = 0; c < dim_; c++) {
      uint32_t word;
      memcpy(&word, words + fields[c].offset, 4);
      s_.vector[c] = fields[c].levels[(word >> (fields[c].shift + extra) & ((1u << fields[c].bits) - 1))];
    }
  }

  // A copy as a row of bf16: in the pool, in the step's own tensor, or in a buffer if that has another type.
  const uint16_t* copy_of(int64_t position, bool keys, uint16_t* buffer) const {
    if (position < before_)
      return (keys ? call_.copy_keys : call_.copy_values) + copy_at(call_, layer_, pool_row(position), item_.head);
    const Rows& rows = keys ? call_.keys : call_.values;
    const int64_t token = call_.query_start[item_.request] + position - before_;
    if (rows.dtype == kBFloat16)
      return static_cast<const uint16_t*>(rows.data) + token * rows.token_stride + item_.head * rows.head_stride;
    read_row(rows, token, item_.head, dim_, s_.vector);
    for (int64_t c = 0; c < dim_; c++) buffer[c] = bf16_of(s_.vector[c]);
    return buffer;
  }

  // The copies of a group's positions in mask; rows of zeros for the others.
  void copies_of(int64_t first, uint32_t mask, bool keys, const uint16_t** rows) const {
    for (int t = 0; t < vs::kGroup; t++)
      rows[t] = mask >> t & 1 ? copy_of(first + t, keys, s_.lines + t * dim_) : s_.zeros;
  }

  // 32 channels of a row, or the 16 that are left, as 16 pairs.
  VS_INLINE v16u channels(const uint16_t* row, int64_t part) const {
    v16u pairs = {};
    if (32 * part + 32 <= dim_)
      memcpy(&pairs, row + 32 * part, 64);
    else
      memcpy(&pairs, row + 32 * part, 32);
    return pairs;
  }

  // Scores of copies, where a row reads them, over those of pages.
  void exact_scores(int g, int64_t first, uint32_t mask) {
    const uint16_t* rows[vs::kGroup];
    copies_of(first, mask, true, rows);
    const int64_t parts = padded(dim_) / 32;
    for (int h = 0; h < 2; h++) {
      if (!(mask >> 16 * h & 0xffff)) continue;
      for (int64_t r = 0; r < rows_; r++) {
        const uint32_t read = (seen(r, first) & mask & near(r, first)) >> 16 * h;
        if (!(read & 0xffff)) continue;
        v16f products[16];
        clear<16>(products);
        for (int64_t part = 0; part < parts; part++) {
          const Pair query = q_.exact[r * parts + part];
#pragma GCC unroll 16
          for (int t = 0; t < 16; t++)
            products[t] = Pairs::dot(products[t], Pairs::of_bf16(channels(rows[16 * h + t], part)), query);
        }
        float* at = s_.scores + r * kTile + g * vs::kGroup + h * vs::kHalf;
        store(at, select(lanes(read), sums(products) * call_.scale, load(at)));
      }
    }
  }

  // Softmax of one row over a tile, and the weights as pairs of tokens.
  void weigh(int64_t r, int64_t start, int groups, const uint32_t* copies, const uint32_t* any_paged, const uint32_t* any_exact,
             State& state) {
    float* scores = s_.scores + r * kTile;
    v16f most = splat(kNone);
    uint32_t visible[kTileGroups], exact[kTileGroups];
    for (int g = 0; g < groups; g++) {
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
        Pairs::spread(Pairs::of(zero, zero), s_.exact_pairs + (r * kTileGroups + g) * 16);
        for (int h = 0; h < 2; h++) store(s_.paged + r * kTile + g * vs::kGroup + h * vs::kHalf, zero);
      }
      return;
    }
    const float now = std::max(state.peak[r], tile_peak);
    const float keep = exp_negative(splat(state.peak[r] - now))[0];
    state.peak[r] = now;
    v16f total = {};
    for (int g = 0; g < groups; g++) {
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
        }
        s_.paged_pairs[r * kTileGroups + g] = Pairs::of(paged[0], paged[1]);
      }
      if (any_exact[g]) Pairs::spread(Pairs::of(copied[0], copied[1]), s_.exact_pairs + (r * kTileGroups + g) * 16);
    }
    state.total[r] = state.total[r] * keep + sum(total);
    if (keep != 1.0f) {
      float *rotated = state.rotated + r * dim_, *plain = state.plain + r * padded(dim_);
      for (int64_t c = 0; c < dim_; c += 16) store(rotated + c, load(rotated + c) * keep);
      for (int64_t c = 0; c < padded(dim_); c += 16) store(plain + c, load(plain + c) * keep);
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
      if (!any_paged[g]) continue;
      active[count] = g;
      words[count++] = group_at(start + g * vs::kGroup) + layer_.value_start[item_.head];
    }
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
    flat_outputs(start, groups, any_paged, state);
  }

  template <int R>
  void fused_outputs(const int* active, int count, const uint8_t* const* words, State& state) {
    constexpr int kChannels = R <= 4 ? 4 : 2, kSlots = 16 / kChannels;
    for (int64_t c = 0; c < dim_; c += kChannels) {
      int any = 0, widest = 0;
      Pairs::Table table[kChannels];
      for (int i = 0; i < kChannels; i++) {
        any |= value_fields_[c + i].bits;
        widest = std::max(widest, value_fields_[c + i].bits);
        table[i] = Pairs::table(value_fields_[c + i]);
      }
      if (!any) continue;
      v16f sums_of[16];  // [row][channel]
      clear<16>(sums_of);
      const int64_t offset[4] = {value_fields_[c].offset, value_fields_[c + 1].offset, value_fields_[c + 2 % kChannels].offset,
                                 value_fields_[c + 3 % kChannels].offset};
      if (widest <= vs::kNarrow)
        add_products<R, kChannels, false>(table, offset, active, count, words, sums_of);
      else
        add_products<R, kChannels, true>(table, offset, active, count, words, sums_of);
      alignas(64) float added[16];
      store(added, sums(sums_of));
      for (int r = 0; r < std::min<int64_t>(kSlots, rows_); r++) {
        float* out = state.rotated + r * dim_ + c;
        for (int i = 0; i < kChannels; i++) out[i] = added[r * kChannels + i] * width_[c + i] + out[i];
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
    for (int64_t c = 0; c < dim_; c += kBlock) {
      for (int i = 0; i < kBlock; i++) {
        const Pairs::Table table = Pairs::table(value_fields_[c + i]);
        for (int k = 0; k < count; k++)
          s_.values[i * kTileGroups + k] = Pairs::expand_any(table, words[k] + value_fields_[c + i].offset);
      }
      for (int64_t r = 0; r < rows_; r++)
        add_outputs(s_.values, s_.paged_pairs + r * kTileGroups, active, count, width_ + c, state.rotated + r * dim_ + c);
    }
  }

  void exact_outputs(int64_t start, int groups, const uint32_t* any_exact, State& state) {
    const int64_t parts = padded(dim_) / 32;
    for (int g = 0; g < groups; g++) {
      if (!any_exact[g]) continue;
      const uint16_t* rows[vs::kGroup];
      copies_of(start + g * vs::kGroup, any_exact[g], false, rows);
      uint32_t tokens = any_exact[g] | any_exact[g] >> 16;
      for (int i = 0; i < 16; i++)
        for (int64_t part = 0; part < parts; part++) {
          const v16u a = channels(rows[i], part), b = channels(rows[16 + i], part);
          Pair* to = s_.exact_values + (i * parts + part) * 2;
          to[0] = Pairs::of_bf16((a & 0xffffu) | b << 16);
          to[1] = Pairs::of_bf16(a >> 16 | (b & 0xffff0000u));
        }
      for (int64_t r = 0; r < rows_; r++) {
        const PairScalar* weights = s_.exact_pairs + (r * kTileGroups + g) * 16;
        for (int64_t part = 0; part < parts; part++) {
          float* out = state.plain + r * parts * 32 + part * 32;
          v16f even = load(out), odd = load(out + 16);
          for (uint32_t left = tokens & 0xffff; left; left &= left - 1) {
            const int i = __builtin_ctz(left);
            const Pair weight = Pairs::broadcast(weights[i]);
            even = Pairs::dot(even, s_.exact_values[(i * parts + part) * 2], weight);
            odd = Pairs::dot(odd, s_.exact_values[(i * parts + part) * 2 + 1], weight);
          }
          store(out, even);
          store(out + 16, odd);
        }
      }
    }
  }

  // out[16 channels] += width * sum over groups and tokens of values * weights.
  VS_INLINE void add_outputs(const Pair* values, const Pair* weights, const int* active, int count, const float* width, float* out) {
    v16f sums_of[16];
    clear<16>(sums_of);
    for (int k = 0; k < count; k++) {
      const Pair weight = weights[active[k]];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) sums_of[i] = Pairs::dot(sums_of[i], values[i * kTileGroups + k], weight);
    }
    const v16f added = sums(sums_of);
    store(out, added * load(width) + load(out));
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
          store(s_.vector + c, load(s_.vector + c) * load(flat_width + c) * scale + load(center + c));
        for (int64_t r = 0; r < rows_; r++) {
          const float weight = s_.paged[r * kTile + g * vs::kGroup + lane];
          float* out = state.rotated + r * dim_;
          for (int64_t c = 0; c < dim_; c += 16) store(out + c, load(s_.vector + c) * weight + load(out + c));
        }
      }
    }
  }

  const Shape& shape_;
  const Layer& layer_;
  const AttendCall& call_;
  const Item& item_;
  const Queries& q_;
  Scratch& s_;
  const int64_t dim_, rows_;
  const vs::KeyPairs& pairs_;
  const std::vector<vs::Field>& value_fields_;
  int64_t context_, before_, first_query_, last_query_;
  const float* width_;
  int16_t pair_of_[256];
  int64_t position_[kRows];
  v16f value_scale_[kTileGroups][2];
  uint32_t value_flat_[kTileGroups];
  bool whole_[kTileGroups];  // all rows read all of the group from its page
};

int64_t tiles(int64_t context) { return (context + kTile - 1) / kTile; }

// All items of a call: every request's rows in blocks; cut into spans where the blocks alone would leave threads idle.
struct Plan {
  std::vector<Item> items, whole;     // whole: one per block of rows, in the order of its spans' items
  std::vector<int64_t> first_item;    // of each whole
  std::vector<int64_t> whole_of;      // of each item
  bool split;

  explicit Plan(const Shape& shape) {
    for (int64_t request = 0; request < shape.call.num_requests; request++)
      for (int64_t row = 0; row < shape.rows(request); row += kRows)
        for (int64_t head = 0; head < shape.layer.heads; head++) {
          const int64_t rows = std::min<int64_t>(kRows, shape.rows(request) - row);
          const int64_t before = shape.call.context_lens[request] - shape.queries(request);
          whole.push_back({request, head, row, rows, 0, tiles(before + (row + rows - 1) / shape.group + 1)});
        }
    split = static_cast<int64_t>(whole.size()) < 8 * shape.call.num_threads;
    if (!split) {
      // Long ones first, so that none is left over at the end.
      std::stable_sort(whole.begin(), whole.end(), [](const Item& a, const Item& b) { return a.last_tile > b.last_tile; });
      return;
    }
    for (const Item& item : whole) {
      first_item.push_back(items.size());
      for (int64_t tile = 0; tile < item.last_tile; tile += kSpan / kTile) {
        items.push_back(item);
        whole_of.push_back(first_item.size() - 1);
        items.back().first_tile = tile;
        items.back().last_tile = std::min<int64_t>(tile + kSpan / kTile, item.last_tile);
      }
    }
    first_item.push_back(items.size());
  }
};

// What the split plan needs beside the threads' scratch.
struct Shared {
  std::vector<Queries> queries;  // of each whole
  std::vector<float*> states;    // of each item
  Shared(const Plan& plan, int64_t dim, Carver& carver) {
    if (!plan.split) return;
    for (const Item& item : plan.whole) queries.emplace_back(item.rows, dim, carver);
    for (const Item& item : plan.items) {
      states.emplace_back();
      carver.take(states.back(), State::floats(item.rows, dim));
    }
  }
};

}  // namespace

int64_t vs_attend(const Layer* layer_pointer, const AttendCall* call_pointer) {
  const Layer& layer = *layer_pointer;
  const AttendCall& call = *call_pointer;
  const Shape shape{call.num_query_heads / layer.heads, layer, call};
  const Plan plan(shape);
  const int64_t dim = layer.dim, wholes = plan.whole.size(), items = plan.items.size();
  Carver counter(nullptr);
  Scratch(dim, counter);
  const size_t each = counter.used();
  Shared(plan, dim, counter);
  const int64_t needed = (call.num_threads - 1) * each + counter.used();
  if (needed > call.workspace_bytes) return needed;
  Carver carver(call.workspace + call.num_threads * each);
  Shared shared(plan, dim, carver);
#pragma omp parallel num_threads(call.num_threads)
  {
    Carver own(call.workspace + omp_get_thread_num() * each);
    Scratch scratch(dim, own);
    std::fill(scratch.zeros, scratch.zeros + dim, uint16_t{0});
    // Before anything is read: a request of this step may share a prefix that another one is just writing.
    if (call.num_writes > 0) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < call.num_writes; i++) write_copy(layer, call, i, scratch.line);
    }
    if (plan.split) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < wholes; i++) Attention::prepare(shape, plan.whole[i], shared.queries[i], scratch);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < items; i++) {
        const Item& item = plan.items[i];
        State state(shared.states[i], item.rows, dim);
        state.clear(item.rows, dim);
        Attention(shape, item, shared.queries[plan.whole_of[i]], scratch).run(state);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < wholes; i++) {
        const Item& item = plan.whole[i];
        State state(scratch.item, item.rows, dim);
        state.clear(item.rows, dim);
        for (int64_t k = plan.first_item[i]; k < plan.first_item[i + 1]; k++)
          Attention::merge(state, State(shared.states[k], item.rows, dim), item.rows, dim);
        Attention::finish(shape, item, state, scratch);
      }
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < wholes; i++) {
        const Item& item = plan.whole[i];
        State state(scratch.item, item.rows, dim);
        state.clear(item.rows, dim);
        if (i + call.num_threads < wholes) Attention::fetch(shape, plan.whole[i + call.num_threads]);
        Attention::prepare(shape, item, scratch.queries, scratch);
        Attention(shape, item, scratch.queries, scratch).run(state);
        Attention::finish(shape, item, state, scratch);
      }
    }
  }
  return 0;
}

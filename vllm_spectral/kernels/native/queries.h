// Where attention enters the rotated basis and leaves it: queries once before their keys, outputs once after their values.
#pragma once
#include "work.h"

namespace {

// The queries of an item's rows, rotated.
inline void prepare(const Shape& shape, const Item& item, Queries& queries, Scratch& s) {
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

// The output of an item's rows: numerators over totals, rotated back.
inline void finish(const Shape& shape, const Item& item, const State& state, Scratch& s) {
  const int64_t dim = shape.layer.dim;
  const float* back = shape.layer.values.transposed.get() + item.head * dim * dim;
  const int32_t* place = shape.layer.quad_place.get() + item.head * dim;
  for (int64_t start = 0; start < item.rows; start += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, item.rows - start);
    float share[kTogether];
    for (int64_t i = 0; i < count; i++) {
      share[i] = state.total[start + i] > 0 ? 1.0f / state.total[start + i] : 0.0f;
      const float *rotated = state.rotated(start + i), *quads = state.quads(start + i);
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

}  // namespace

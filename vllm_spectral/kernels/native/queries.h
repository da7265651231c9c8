// Where attention enters the rotated basis and leaves it: queries once before their keys, outputs once after their values.
#pragma once
#include "work.h"

namespace {

// lines[count, dim] of the scratch = its vectors[count, dim] @ matrix[dim, dim].
inline void turn(Scratch& s, int64_t count, const float* matrix, int64_t dim) {
  for (int64_t i = 0; i < count; i += kTogether)
    products(std::min<int64_t>(kTogether, count - i), s.vectors + i * dim, matrix, dim, s.lines + i * dim);
}

// A query as it came, in pairs; its vector is the same in float32, left out for bf16.
inline void read_query(const Rows& query, int64_t token, int64_t head, int64_t dim, float* vector, Pair* exact) {
  const int64_t parts = padded(dim) / 32;
  if (query.dtype == kBFloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(query.data) + token * query.token_stride + head * query.head_stride;
    for (int64_t part = 0; part < parts; part++) exact[part] = Pairs::of_bf16(channels(in, part, dim));
    if (vs::kMatrices) return;
  }
  read_row(query, token, head, dim, vector);
  if (query.dtype == kBFloat16) return;
  for (int64_t part = 0; part < parts; part++) {
    v16f even = {}, odd = {};
    for (int k = 0; k < 16 && 32 * part + 2 * k < dim; k++) {
      even[k] = vector[32 * part + 2 * k];
      odd[k] = vector[32 * part + 2 * k + 1];
    }
    exact[part] = Pairs::of(even, odd);
  }
}

// The queries of a slice's rows, rotated.
inline void prepare_slice(const Shape& shape, const Item& item, Queries& queries, Scratch& s) {
  const Layer& layer = shape.layer;
  const int64_t dim = layer.dim, at = item.head * dim, parts = padded(dim) / 32;
  const vs::Coding& keys = layer.keys;
  const bool matrices = vs::kMatrices && shape.call.query.dtype == kBFloat16, pages = shape.reads_pages(item);
  for (int64_t start = 0; start < item.rows; start += kTurned) {
    const int64_t count = std::min<int64_t>(kTurned, item.rows - start);
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = item.first_row + start + i, token = shape.call.query_start[item.request] + row / shape.group;
      const int64_t head = item.head * shape.group + row % shape.group;
      read_query(shape.call.query, token, head, dim, s.vectors + i * dim, queries.exact + (start + i) * parts);
    }
    if (!pages) continue;
    if (matrices)
      Matrices::rotate(reinterpret_cast<const uint16_t*>(queries.exact + start * parts), nullptr, parts * sizeof(Pair),
                       layer.key_tiles.high(item.head), layer.key_tiles.low(item.head), dim, s.lines);
    else
      turn(s, count, keys.basis + at * dim, dim);
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
      for (const vs::Field& field : layer.key_pairs[item.head].fields)
        queries.paged[field.channel * item.rows + r] = Pairs::scalar(line[2 * field.channel], line[2 * field.channel + 1]);
      if constexpr (vs::kQuads) queries.quads.round(layer, item.head, line, r, item.rows);
    }
  }
}

inline void prepare(const Shape& shape, const Item& item, std::vector<Queries>& queries, Scratch& s) {
  for (int64_t i = 0; i < slices(item); i++) prepare_slice(shape, slice_of(item, i), queries[i], s);
}

// lines[count, dim] of the scratch = what some rows have read from pages, times their shares, rotated back.
inline void turn_back(const Layer& layer, int64_t head, const State& state, int64_t start, int64_t count, const float* share, Scratch& s) {
  const int64_t dim = layer.dim, width = padded(dim);
  const int32_t* place = layer.quad_place.get() + head * dim;
  for (int64_t i = 0; i < count; i++) {
    const float *rotated = state.rotated(start + i), *quads = state.quads(start + i);
    for (int64_t c = 0; c < dim; c += 16) {
      const v16f x = (load(rotated + c) + gather(quads, layer.quad_floats, load_integers(place + c))) * share[i];
      if (vs::kMatrices)
        Matrices::split(x, s.high + i * width + c, s.low + i * width + c);
      else
        store(s.vectors + i * dim + c, x);
    }
    for (int64_t c = dim; vs::kMatrices && c < width; c++) s.high[i * width + c] = s.low[i * width + c] = 0;
  }
  if (vs::kMatrices)
    Matrices::rotate(s.high, s.low, width * sizeof(uint16_t), layer.value_tiles.high(head), layer.value_tiles.low(head), dim, s.lines);
  else
    turn(s, count, layer.values.transposed.get() + head * dim * dim, dim);
}

// The output of a slice's rows: numerators over totals.
inline void finish_slice(const Shape& shape, const Item& item, const State& state, Scratch& s) {
  const Layer& layer = shape.layer;
  const int64_t dim = layer.dim;
  const bool pages = shape.reads_pages(item);
  for (int64_t start = 0; start < item.rows; start += kTurned) {
    const int64_t count = std::min<int64_t>(kTurned, item.rows - start);
    float share[kTurned];
    for (int64_t i = 0; i < count; i++) share[i] = state.total[start + i] == 0 ? 0.0f : 1.0f / state.total[start + i];
    if (pages)
      turn_back(layer, item.head, state, start, count, share, s);
    else
      std::fill(s.lines, s.lines + count * dim, 0.0f);
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

inline void finish(const Shape& shape, const Item& item, float* states, Scratch& s) {
  for (int64_t i = 0; i < slices(item); i++) finish_slice(shape, slice_of(item, i), state_of(states, i, item, shape.layer), s);
}

}  // namespace

// Store: rotate, scale, quantize, choose the fallback, pack and write. Compiled once per instruction set, without
// contracting products and sums, so that every set stores the bytes that the Python reference stores.
#include "store.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "rotate.h"
#include "rows.h"
#include "simd.h"

namespace {

constexpr int kChunk = 16;  // tokens per unit of work: one lane each when codes are packed
constexpr int kTried = 8;   // most scales tried, one lane each: a vector holds two tokens

struct Fit {
  int scale;    // index
  float error;  // squared
};

// One allocation of bits: the water-filled one, or the fallback's.
struct Allocation {
  const vs::Field* fields;
  const float *width, *inverse_width;
  float inverse_stored;
};

// Calls work(std::integral_constant<int, bits>), so that every number of bits gets code of its own.
template <typename Work>
VS_INLINE void with_bits(int bits, const Work& work) {
  switch (bits) {
    case 0: work(std::integral_constant<int, 0>()); break;
    case 1: work(std::integral_constant<int, 1>()); break;
    case 2: work(std::integral_constant<int, 2>()); break;
    case 3: work(std::integral_constant<int, 3>()); break;
    case 4: work(std::integral_constant<int, 4>()); break;
    case 5: work(std::integral_constant<int, 5>()); break;
    case 6: work(std::integral_constant<int, 6>()); break;
    case 7: work(std::integral_constant<int, 7>()); break;
    default: work(std::integral_constant<int, 8>());
  }
}

// Nearest codes of some vectors of numbers: how many of the codebook's boundaries lie below each; all for NaN.
template <int kBits, int kVectors>
VS_INLINE void nearest_codes(const float* edges, const v16f* x, v16i* codes) {
  for (int v = 0; v < kVectors; v++) codes[v] = v16i{};
#pragma GCC unroll 8
  for (int depth = 0; depth < kBits; depth++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++)
      codes[v] = codes[v] + codes[v] - ~(lookup(edges + vs::edges_at(depth), depth, codes[v]) >= x[v]);
}

// How many of the rising bounds between scales do not lie above each of some numbers; all for NaN.
v16i bounds_below(const float* bounds, v16f x) {
  v16i index = {};
#pragma GCC unroll 7
  for (int step = vs::kScales / 2; step; step /= 2) index -= ~(x < lookup(bounds, 7, index + (step - 1))) & -step;
  return index;
}

// whitened[c * kChunk + t] of all tokens of a chunk, and the scales around which to search.
void whiten(const float* rotated, const float* center, const Allocation& to, int64_t dim, const Layer& layer, float* whitened,
            int* middle, float* power_of) {
  v16f power = {};
  for (int64_t c = 0; c < dim; c++) {
    v16f x = load(rotated + c * kChunk);
    if (center) x = x - center[c];
    const v16f w = x * to.inverse_width[c];
    store(whitened + c * kChunk, w);
    const v16f square = w * w;
    power = power + (to.fields[c].bits ? square : v16f{});
  }
  power = power * to.inverse_stored;
  store(power_of, power);
  store_integers(middle, bounds_below(layer.scale_bounds.get(), power));
}

// The best scales of twice kVectors tokens, which need not differ: a vector holds two tokens, kTried scales each.
template <int kVectors>
void search(const float* whitened, const int* tokens, const int* middle, const Allocation& to, int64_t dim, const Layer& layer,
            Fit* fits) {
  const v16i of_second = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  const v16i step = {0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7};
  v16i lane[kVectors], index[kVectors];
  v16f scale[kVectors], inverse[kVectors], error[kVectors];
  for (int v = 0; v < kVectors; v++) {
    const int first = tokens[2 * v], second = tokens[2 * v + 1];
    lane[v] = of_second ? splat(second) : splat(first);
    index[v] = (of_second ? splat(middle[second]) : splat(middle[first])) + static_cast<int>(layer.search_first) + step;
    index[v] = index[v] < 0 ? splat(0) : index[v];
    index[v] = index[v] > vs::kScales - 1 ? splat(vs::kScales - 1) : index[v];
    scale[v] = lookup(layer.scales.get(), 7, index[v]);
    inverse[v] = lookup(layer.inverse_scales.get(), 7, index[v]);
    error[v] = v16f{};
  }
  for (int64_t c = 0; c < dim; c++) {
    v16f w[kVectors];
    for (int v = 0; v < kVectors; v++) w[v] = lookup(whitened + c * kChunk, 4, lane[v]);
    const vs::Field& field = to.fields[c];
    const float width = to.width[c];
    with_bits(field.bits, [&](auto constant) {
      constexpr int bits = constant;
      v16f scaled[kVectors];
      v16i codes[kVectors];
      for (int v = 0; v < kVectors; v++) scaled[v] = w[v] * inverse[v];
      if (bits) nearest_codes<bits, kVectors>(&layer.edges[bits * vs::kEdges], scaled, codes);
      for (int v = 0; v < kVectors; v++) {
        v16f restored = {};
        if (bits) restored = lookup(field.levels, bits, codes[v]) * scale[v];
        const v16f miss = (w[v] - restored) * width;
        error[v] = error[v] + miss * miss;
      }
    });
  }
  for (int v = 0; v < kVectors; v++) {
    alignas(64) float errors[16];
    store(errors, error[v]);
    for (int which = 0; which < 2; which++) {
      Fit best{0, INFINITY};  // so it stays for a vector that is not finite, or whose square is not
      for (int i = kTried * which; i < kTried * which + layer.search_count; i++)
        if (errors[i] < best.error) best = {index[v][i], errors[i]};
      fits[tokens[2 * v + which]] = best;
    }
  }
}

void best_scales(const float* whitened, const int* tokens, int count, const int* middle, const Allocation& to, int64_t dim,
                 const Layer& layer, Fit* fits) {
  constexpr int kVectors = 4;
  for (int i = 0; i < count; i += 2 * kVectors) {
    int some[2 * kVectors];
    for (int j = 0; j < 2 * kVectors; j++) some[j] = tokens[std::min(i + j, count - 1)];
    if (count - i > 2)
      search<kVectors>(whitened, some, middle, to, dim, layer, fits);
    else
      search<1>(whitened, some, middle, to, dim, layer, fits);
  }
}

// Adds the codes of the tokens in mask to words[vector * kChunk + t], 32 bits for keys and 16 for values.
void code(const float* whitened, const Fit* fits, uint32_t mask, const Allocation& to, int64_t dim, const Layer& layer,
          uint32_t* words) {
  v16f inverse;
  for (int t = 0; t < kChunk; t++) inverse[t] = layer.inverse_scales[mask >> t & 1 ? fits[t].scale : 0];
  const v16i chosen = lanes(mask);
  for (int64_t c = 0; c < dim; c++) {
    const vs::Field& field = to.fields[c];
    if (!field.bits) continue;
    const v16f scaled = load(whitened + c * kChunk) * inverse;
    v16i found;
    with_bits(field.bits, [&](auto bits) { nearest_codes<bits, 1>(&layer.edges[bits * vs::kEdges], &scaled, &found); });
    v16i* word = reinterpret_cast<v16i*>(words + field.offset / vs::kVectorBytes * kChunk);
    *word |= (found & chosen) << field.shift;
  }
}

// Where the fields of a token's key or value lie: of each vector, the key's 4 bytes or the value's 2.
struct Place {
  uint8_t *scale, *fields;
};

Place place_of(const Layer& layer, const StepCall& call, int64_t slot, int64_t head, bool keys) {
  const int64_t offset = slot % call.pages.block_size;
  const int lane = offset % vs::kGroup, half = lane / vs::kHalf;
  uint8_t* group = call.pages.data + slot / call.pages.block_size * call.pages.block_stride + head * call.pages.head_stride +
                   offset / vs::kGroup * vs::kGroup * layer.slot_bytes;
  if (keys)
    return {group + lane, group + layer.key_start[head] + half * layer.key_half[head] + lane % vs::kHalf * 4};
  return {group + vs::kValueScales + lane, group + layer.value_start[head] + lane % vs::kHalf * 4 + half * 2};
}

}  // namespace

namespace vs {

StoreScratch::StoreScratch(const Layer& layer, Carver& carver) {
  carver.take(vectors, kTogether * layer.dim);
  carver.take(turned, kChunk * layer.dim);
  carver.take(rotated, layer.dim * kChunk);
  carver.take(whitened, layer.dim * kChunk);
  carver.take(flat_whitened, layer.dim * kChunk);
  carver.take(words, layer.slot_bytes / 2 * kChunk);
}

int64_t store_units(const Layer& layer, const StepCall& call) {
  return (call.num_stored + kChunk - 1) / kChunk * layer.heads * 2;
}

void store_unit(const Layer& layer, const StepCall& call, int64_t unit, StoreScratch& scratch) {
  const int64_t dim = layer.dim, start = unit / (2 * layer.heads) * kChunk, head = unit / 2 % layer.heads;
  const bool keys = unit % 2 == 0;
  const Coding& coding = keys ? layer.keys : layer.values;
  const Rows& rows = keys ? call.keys : call.values;
  const int64_t room = keys ? layer.key_half[head] : kGroup * layer.slot_bytes - layer.value_start[head];
  const int64_t vectors = room / kVectorBytes;
  int tokens[kChunk], count = 0;
  Place places[kChunk];
  for (int t = 0; t < kChunk && start + t < call.num_stored; t++) {
    const int64_t slot = call.slot_mapping[start + t];
    if (slot < 0) continue;
    const Place place = place_of(layer, call, slot, head, keys);
    // All lines of a group are written to, and in a decode step none is at hand: let them come while we compute.
    if (!count || (place.fields - places[count - 1].fields) / kVectorBytes != 0)
      for (int64_t v = 0; v < vectors; v++) __builtin_prefetch(place.fields + v * kVectorBytes, 1, 3);
    places[count] = place;
    tokens[count++] = t;
  }
  if (!count) return;
  float* rotated = scratch.rotated;
  if (count < kChunk) memset(rotated, 0, dim * kChunk * sizeof(float));
  for (int i = 0; i < count; i += kTogether) {
    const int some = std::min(kTogether, count - i);
    float* turned = scratch.turned + i * dim;
    for (int j = 0; j < some; j++) {
      read_row(rows, start + tokens[i + j], head, dim, turned);
      for (int64_t c = 0; c < dim; c++) scratch.vectors[j * dim + c] = turned[c];
    }
    rotate(scratch.vectors, some, coding.basis + head * dim * dim, dim, turned);
    for (int j = 0; count < kChunk && j < some; j++)
      for (int64_t c = 0; c < dim; c++) rotated[c * kChunk + tokens[i + j]] = turned[j * dim + c];
  }
  for (int64_t c = 0; count == kChunk && c < dim; c += kChunk) {
    v16f block[kChunk];
    for (int t = 0; t < kChunk; t++) block[t] = load(scratch.turned + t * dim + c);
    transpose(block);
    for (int k = 0; k < kChunk; k++) store(rotated + (c + k) * kChunk, block[k]);
  }
  const int64_t at = head * dim;
  const Allocation spectral = {coding.fields[head].data(), coding.width.get() + at, coding.inverse_width.get() + at,
                               coding.inverse_stored[head]};
  const Allocation flat = {coding.flat[head].data(), coding.flat_width.get() + at, coding.inverse_flat_width.get() + at,
                           coding.inverse_flat_stored[head]};
  Fit fits[kChunk], flat_fits[kChunk];
  int middle[kChunk], flat_middle[kChunk];
  float power[kChunk], flat_power[kChunk];
  whiten(rotated, nullptr, spectral, dim, layer, scratch.whitened, middle, power);
  best_scales(scratch.whitened, tokens, count, middle, spectral, dim, layer, fits);
  whiten(rotated, coding.center.get() + at, flat, dim, layer, scratch.flat_whitened, flat_middle, flat_power);
  uint32_t plain_mask = 0, flat_mask = 0;
  int tried[kChunk], num_tried = 0;
  for (int i = 0; i < count; i++) {
    const int t = tokens[i];
    plain_mask |= 1u << t;
    if (flat_power[t] * coding.flat_needed[head] < fits[t].error * layer.fallback_gain) tried[num_tried++] = t;
  }
  if (num_tried) best_scales(scratch.flat_whitened, tried, num_tried, flat_middle, flat, dim, layer, flat_fits);
  for (int i = 0; i < num_tried; i++) {
    const int t = tried[i];
    if (flat_fits[t].error < fits[t].error * layer.fallback_gain) {
      flat_mask |= 1u << t;
      plain_mask &= ~(1u << t);
    }
  }
  uint32_t* words = scratch.words;
  memset(words, 0, vectors * kChunk * sizeof(uint32_t));
  if (plain_mask) code(scratch.whitened, fits, plain_mask, spectral, dim, layer, words);
  if (flat_mask) code(scratch.flat_whitened, flat_fits, flat_mask, flat, dim, layer, words);
  for (int i = 0; i < count; i++) {
    const int t = tokens[i];
    const bool is_flat = flat_mask >> t & 1;
    *places[i].scale = static_cast<uint8_t>((is_flat ? flat_fits : fits)[t].scale | (is_flat ? kFlat : 0));
    uint8_t* to = places[i].fields;
    if (keys)
      for (int64_t v = 0; v < vectors; v++) memcpy(to + v * kVectorBytes, words + v * kChunk + t, 4);
    else
      for (int64_t v = 0; v < vectors; v++) memcpy(to + v * kVectorBytes, words + v * kChunk + t, 2);
  }
}

}  // namespace vs

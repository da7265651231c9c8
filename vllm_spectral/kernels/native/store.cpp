// Store: rotate, scale, quantize, choose the fallback, pack and write. Compiled once per instruction set, without
// contracting products and sums, so that every set stores the bytes that the Python reference stores.
#include <algorithm>
#include <cmath>

#include "layer.h"
#include "rotate.h"
#include "rows.h"
#include "simd.h"

namespace {

constexpr int kChunk = 16;  // tokens per work item: one lane each when codes are packed

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

// whitened[c * kChunk + t] and the scale around which to search, for all tokens of a chunk.
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
  for (int t = 0; t < kChunk; t++) {
    const float* bounds = layer.scale_bounds.get();
    middle[t] = static_cast<int>(std::upper_bound(bounds, bounds + vs::kScales - 1, power[t]) - bounds);
  }
}

// The best scale of two tokens, eight candidates each, one per lane.
void search(const float* whitened, int first, int second, const int* middle, const Allocation& to, int64_t dim,
            const Layer& layer, Fit* fits) {
  v16i index;
  for (int i = 0; i < 16; i++) {
    const int candidate = middle[i < 8 ? first : second] + static_cast<int>(layer.search_first) + (i & 7);
    index[i] = std::clamp(candidate, 0, vs::kScales - 1);
  }
  v16f scale, inverse;
  for (int i = 0; i < 16; i++) {
    scale[i] = layer.scales[index[i]];
    inverse[i] = layer.inverse_scales[index[i]];
  }
  const v16i of_second = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  v16f error = {};
  for (int64_t c = 0; c < dim; c++) {
    const v16f w = select(of_second, splat(whitened[c * kChunk + second]), splat(whitened[c * kChunk + first]));
    const int bits = to.fields[c].bits;
    v16f restored = {};
    if (bits) {
      const v16i code = nearest_code(&layer.boundaries[bits * layer.row], bits, w * inverse);
      restored = lookup(&layer.levels[bits * layer.row], bits, code) * scale;
    }
    const v16f miss = (w - restored) * to.width[c];
    error = error + miss * miss;
  }
  for (int which = 0; which < 2; which++) {
    int best = 8 * which;
    for (int i = best + 1; i < 8 * which + layer.search_count; i++)
      if (error[i] < error[best]) best = i;
    fits[which ? second : first] = {index[best], error[best]};
  }
}

void best_scales(const float* whitened, const int* tokens, int count, const int* middle, const Allocation& to, int64_t dim,
                 const Layer& layer, Fit* fits) {
  for (int i = 0; i < count; i += 2)
    search(whitened, tokens[i], tokens[std::min(i + 1, count - 1)], middle, to, dim, layer, fits);
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
    const v16i found = nearest_code(&layer.boundaries[field.bits * layer.row], field.bits, load(whitened + c * kChunk) * inverse);
    v16i* word = reinterpret_cast<v16i*>(words + field.offset / vs::kVectorBytes * kChunk);
    *word |= (found & chosen) << field.shift;
  }
}

struct Scratch {
  vs::Array<double> vectors;
  vs::Array<float> line, turned, rotated, whitened, flat_whitened;
  vs::Array<uint32_t> words;
  explicit Scratch(int64_t dim, int64_t slot_bytes)
      : vectors(kTogether * dim),
        line(dim),
        turned(kTogether * dim),
        rotated(dim * kChunk),
        whitened(dim * kChunk),
        flat_whitened(dim * kChunk),
        words(slot_bytes / 2 * kChunk) {}
};

void store_chunk(const Layer& layer, const StoreCall& call, int64_t start, int64_t head, bool keys, Scratch& scratch) {
  const int64_t dim = layer.dim;
  const vs::Coding& coding = keys ? layer.keys : layer.values;
  const Rows& rows = keys ? call.keys : call.values;
  int tokens[kChunk], count = 0;
  for (int t = 0; t < kChunk && start + t < call.num_tokens; t++)
    if (call.slot_mapping[start + t] >= 0) tokens[count++] = t;
  if (!count) return;
  float* rotated = scratch.rotated.get();
  for (int i = 0; i < count; i += kTogether) {
    const int some = std::min(kTogether, count - i);
    for (int j = 0; j < some; j++) {
      read_row(rows, start + tokens[i + j], head, dim, scratch.line.get());
      for (int64_t c = 0; c < dim; c++) scratch.vectors[j * dim + c] = scratch.line[c];
    }
    rotate(scratch.vectors.get(), coding.basis + head * dim * dim, dim, scratch.turned.get());
    for (int j = 0; j < some; j++)
      for (int64_t c = 0; c < dim; c++) rotated[c * kChunk + tokens[i + j]] = scratch.turned[j * dim + c];
  }
  const int64_t at = head * dim;
  const Allocation spectral = {coding.fields[head].data(), coding.width.get() + at, coding.inverse_width.get() + at,
                               coding.inverse_stored[head]};
  const Allocation flat = {coding.flat[head].data(), coding.flat_width.get() + at, coding.inverse_flat_width.get() + at,
                           coding.inverse_flat_stored[head]};
  Fit fits[kChunk], flat_fits[kChunk];
  int middle[kChunk], flat_middle[kChunk];
  float power[kChunk], flat_power[kChunk];
  whiten(rotated, nullptr, spectral, dim, layer, scratch.whitened.get(), middle, power);
  best_scales(scratch.whitened.get(), tokens, count, middle, spectral, dim, layer, fits);
  whiten(rotated, coding.center.get() + at, flat, dim, layer, scratch.flat_whitened.get(), flat_middle, flat_power);
  uint32_t plain_mask = 0, flat_mask = 0;
  int tried[kChunk], num_tried = 0;
  for (int i = 0; i < count; i++) {
    const int t = tokens[i];
    plain_mask |= 1u << t;
    if (flat_power[t] * coding.flat_needed[head] < fits[t].error * layer.fallback_gain) tried[num_tried++] = t;
  }
  if (num_tried) best_scales(scratch.flat_whitened.get(), tried, num_tried, flat_middle, flat, dim, layer, flat_fits);
  for (int i = 0; i < num_tried; i++) {
    const int t = tried[i];
    if (flat_fits[t].error < fits[t].error * layer.fallback_gain) {
      flat_mask |= 1u << t;
      plain_mask &= ~(1u << t);
    }
  }
  uint32_t* words = scratch.words.get();
  const int64_t room = keys ? layer.key_half[head] : vs::kGroup * layer.slot_bytes - layer.value_start[head];
  const int64_t vectors = room / vs::kVectorBytes;
  memset(words, 0, vectors * kChunk * sizeof(uint32_t));
  if (plain_mask) code(scratch.whitened.get(), fits, plain_mask, spectral, dim, layer, words);
  if (flat_mask) code(scratch.flat_whitened.get(), flat_fits, flat_mask, flat, dim, layer, words);
  for (int i = 0; i < count; i++) {
    const int t = tokens[i];
    const int64_t slot = call.slot_mapping[start + t], offset = slot % call.pages.block_size;
    const int lane = offset % vs::kGroup, half = lane / vs::kHalf;
    uint8_t* group = call.pages.data + slot / call.pages.block_size * call.pages.block_stride + head * call.pages.head_stride +
                     offset / vs::kGroup * vs::kGroup * layer.slot_bytes;
    const bool is_flat = flat_mask >> t & 1;
    group[(keys ? 0 : vs::kValueScales) + lane] =
        static_cast<uint8_t>((is_flat ? flat_fits : fits)[t].scale | (is_flat ? vs::kFlat : 0));
    if (keys) {
      uint8_t* to = group + layer.key_start[head] + half * layer.key_half[head] + lane % vs::kHalf * 4;
      for (int64_t v = 0; v < vectors; v++) memcpy(to + v * vs::kVectorBytes, words + v * kChunk + t, 4);
    } else {
      uint8_t* to = group + layer.value_start[head] + lane % vs::kHalf * 4 + half * 2;
      for (int64_t v = 0; v < vectors; v++) memcpy(to + v * vs::kVectorBytes, words + v * kChunk + t, 2);
    }
  }
}

}  // namespace

void vs_store(const Layer* layer, const StoreCall* call) {
  const int64_t chunks = (call->num_tokens + kChunk - 1) / kChunk, items = chunks * layer->heads * 2;
#pragma omp parallel num_threads(call->num_threads)
  {
    Scratch scratch(layer->dim, layer->slot_bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; item++)
      store_chunk(*layer, *call, item / (2 * layer->heads) * kChunk, item / 2 % layer->heads, item % 2 == 0, scratch);
  }
}

// Products of fours of 8-bit integers, one instruction for 64 of them, for fields narrow enough that one table of bytes holds
// the levels of all their widths. Machines without that instruction have no quads: their lists are empty.
#pragma once
#include "carver.h"
#include "layer.h"
#include "simd.h"

namespace {

struct Quads {
  typedef v16i Value;  // 64 bytes

#if defined(VS_QUADS)
  // The levels of both members of a quad: for keys, lanes are 16 tokens of four channels each; for values, lanes alternate
  // between both channels and hold four tokens each, in the order of spread().
  template <bool kAlike>
  static VS_INLINE Value expand(const vs::Quad& quad, const uint8_t* words, Value table) {
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(quad.places), _mm512_load_si512(words));
    if (kAlike) return (Value)_mm512_permutexvar_epi8(codes, (__m512i)table);
    // (codes & mask) | mark: the entry of code c of b bits is 2 ** b + c.
    const __m512i index = _mm512_ternarylogic_epi64(codes, _mm512_set1_epi64(quad.mask), _mm512_set1_epi64(quad.mark), 0xea);
    return (Value)_mm512_permutexvar_epi8(index, (__m512i)table);
  }
  static VS_INLINE Value dot(Value sum, Value natural, Value integer) {
    return (Value)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)natural, (__m512i)integer);
  }
  // Natural numbers of half a group and of the other, 32 tokens, in the order in which values are expanded, for both channels.
  static VS_INLINE Value spread(Value low, Value high) {
    const __m128i twice = _mm_setr_epi8(0, 1, 4, 5, 0, 1, 4, 5, 8, 9, 12, 13, 8, 9, 12, 13);
    return (Value)_mm512_shuffle_epi8((__m512i)(low | high << 8), _mm512_broadcast_i32x4(twice));
  }
  // The same for one channel: 32 bytes.
  static VS_INLINE void store_spread(uint8_t* to, Value low, Value high) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)(low | high << 8)));
  }
  static VS_INLINE void store_bytes(int8_t* to, Value x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)x));
  }
  static VS_INLINE Value rounded(v16f x) { return (Value)_mm512_cvtps_epi32((__m512)x); }
  // 32 pairs of bytes in another order; 0 for a negative index. from: 64 pairs, of which the first half are all if few.
  static VS_INLINE void permute(const int16_t* order, const int8_t* from, bool few, void* to) {
    const __m512i index = _mm512_loadu_si512(order), low = _mm512_load_si512(from);
    const __mmask32 some = ~_mm512_movepi16_mask(index);
    const __m512i found = few ? _mm512_maskz_permutexvar_epi16(some, index, low)
                              : _mm512_maskz_permutex2var_epi16(some, low, index, _mm512_load_si512(from + 64));
    _mm512_storeu_si512(to, found);
  }
  // Keeps the compiler from contracting a product here, but not there.
  static VS_INLINE v16f opaque(v16f x) {
    asm("" : "+v"(x));
    return x;
  }
#else
  template <bool kAlike>
  static VS_INLINE Value expand(const vs::Quad&, const uint8_t*, Value) {
    return Value{};
  }
  static VS_INLINE Value dot(Value sum, Value, Value) { return sum; }
  static VS_INLINE Value spread(Value, Value) { return Value{}; }
  static VS_INLINE void store_spread(uint8_t*, Value, Value) {}
  static VS_INLINE void store_bytes(int8_t*, Value) {}
  static VS_INLINE Value rounded(v16f) { return Value{}; }
  static VS_INLINE void permute(const int16_t*, const int8_t*, bool, void*) {}
  static VS_INLINE v16f opaque(v16f x) { return x; }
#endif
  // The levels that a quad of so many bits is expanded by.
  static VS_INLINE Value table(const vs::Array<int8_t>& levels, int32_t bits, uint32_t flip) {
    const Value bytes = load_integers(reinterpret_cast<const int32_t*>(levels.get() + bits * vs::kByteLevels));
    return bytes ^ splat(static_cast<int32_t>(0x01010101u * flip));
  }
  static VS_INLINE Value expand_any(const vs::Quad& quad, const uint8_t* words, const vs::Array<int8_t>& levels, uint32_t flip) {
    const Value by = table(levels, quad.bits, flip);
    return quad.bits ? expand<true>(quad, words, by) : expand<false>(quad, words, by);
  }
  static VS_INLINE v16f numbers(Value x) { return __builtin_convertvector(x, v16f); }
};
typedef Quads::Value Quad;

// The queries of some rows as bytes.
struct QuadQueries {
  uint32_t* bytes;  // [quads, rows], four each; if matrices multiply so many rows, [rows, quads], both in whole tiles
  int32_t* bias;    // [rows], what sums start with: bytes of keys are levels plus 128
  float* step;      // [rows] of the bytes

  void take(int64_t rows, int64_t dim, vs::Carver& carver) {
    carver.take(bytes, vs::kMatrices ? vs::whole_tiles(rows) * vs::whole_tiles(dim / 2) : rows * dim / 2);
    carver.take(bias, rows);
    carver.take(step, rows);
  }

  // The r-th of some rows, from its channels times their widths; line is used up.
  void round(const Layer& layer, int64_t head, float* line, int64_t r, int64_t rows) {
    const float* steps = layer.key_steps.get() + head * layer.dim;
    v16f most = {};
    for (int64_t c = 0; c < layer.dim; c += 16) {
      const v16f x = load(line + c) * load(steps + c);
      store(line + c, x);
      most = larger(most, larger(x, -x));
    }
    const float largest = peak(most), inverse = largest > 0 ? 127 / largest : 0.0f;
    alignas(64) int8_t rounded[256 + 16] = {};
    v16u total = {};  // without a sign, since what is no number is rounded to the smallest integer
    for (int64_t c = 0; c < layer.dim; c += 16) {
      const v16i x = Quads::rounded(load(line + c) * inverse);
      total = total + (v16u)x;
      Quads::store_bytes(rounded + c, x);
    }
    uint32_t sum_of = 0;
    for (int k = 0; k < 16; k++) sum_of += total[k];
    bias[r] = static_cast<int32_t>(0u - 128u * sum_of);
    step[r] = largest / 127;
    const vs::QuadList& quads = layer.key_quads[head];
    const int64_t stride = vs::whole_tiles(quads.size());
    const bool matrix = vs::is_matrix(rows);
    alignas(64) uint32_t own[128];
    uint32_t* to = matrix ? bytes + r * stride : own;
    if (layer.dim <= 128) {
      for (int64_t i = 0; i < stride; i += 16) Quads::permute(quads.order.data() + 2 * i, rounded, layer.dim <= 64, to + i);
    } else {
      for (int64_t i = 0; i < 2 * stride; i++)
        memcpy(reinterpret_cast<uint16_t*>(to) + i, rounded + (quads.order[i] < 0 ? layer.dim : 2 * quads.order[i]), 2);
    }
    for (int64_t i = 0; !matrix && i < quads.size(); i++) bytes[i * rows + r] = own[i];
  }
};

}  // namespace

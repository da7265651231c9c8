// Products of pairs, the kernels' unit of arithmetic: in bf16 where the machine multiplies it, else in float32.
#pragma once
#include "layer.h"
#include "simd.h"

namespace {

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Pairs of bf16, multiplied and added by one instruction.
struct Pairs {
  typedef v16u Value;
  struct Scalar {
    uint32_t bits;
  };
  // How to expand one field: its table in a register, unless its codes are wide.
  struct Table {
    __m512i levels;
    __m128i shift;
    const uint32_t* memory;
    int bits;
  };
  static VS_INLINE Table table(const vs::Field& field) {
    return {_mm512_load_si512(field.pairs), _mm_cvtsi32_si128(field.shift), field.pairs, field.bits};
  }
  static VS_INLINE Value expand(const Table& table, const uint8_t* words) {
    return (Value)_mm512_permutexvar_epi16(_mm512_srl_epi16(_mm512_load_si512(words), table.shift), table.levels);
  }
  static VS_INLINE Value expand_any(const Table& table, const uint8_t* words) {
    if (table.bits <= vs::kNarrow) return expand(table, words);
    return wide(table.memory, table.bits, _mm512_srl_epi16(_mm512_load_si512(words), table.shift));
  }
  static VS_INLINE v16f dot(v16f sum, Value a, Value b) {
    return (v16f)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static VS_INLINE Value broadcast(const Scalar& x) { return v16u{} + x.bits; }
  static VS_INLINE Scalar scalar(float even, float odd) {
    const __m128i pair = (__m128i)_mm_cvtneps_pbh(_mm_set_ps(0, 0, odd, even));
    return {static_cast<uint32_t>(_mm_cvtsi128_si32(pair))};
  }
  static VS_INLINE Value of(v16f even, v16f odd) {
    const v16u low = (v16u)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const v16u high = (v16u)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return low | high << 16;
  }
  // From the 32 bits of two bf16 numbers.
  static VS_INLINE Value of_bf16(v16u both) { return both; }
  static VS_INLINE void spread(const Value& value, Scalar* to) { memcpy(to, &value, 64); }
  // The k-th pair of some vectors in memory.
  static VS_INLINE Scalar member(const Value* values, int64_t k) {
    Scalar pair;
    memcpy(&pair, reinterpret_cast<const uint32_t*>(values) + k, 4);
    return pair;
  }

 private:
  static Value wide(const uint32_t* table, int bits, __m512i index) {
    const __m512i* part = reinterpret_cast<const __m512i*>(table);
    const __m512i first = _mm512_permutex2var_epi16(part[0], index, part[1]);
    if (bits == 6) return (Value)first;
    const __mmask32 bit6 = _mm512_movepi16_mask(_mm512_slli_epi16(index, 9));
    const __m512i low = _mm512_mask_blend_epi16(bit6, first, _mm512_permutex2var_epi16(part[2], index, part[3]));
    if (bits == 7) return (Value)low;
    const __m512i third = _mm512_permutex2var_epi16(part[4], index, part[5]);
    const __m512i high = _mm512_mask_blend_epi16(bit6, third, _mm512_permutex2var_epi16(part[6], index, part[7]));
    return (Value)_mm512_mask_blend_epi16(_mm512_movepi16_mask(_mm512_slli_epi16(index, 8)), low, high);
  }
};
#else
// Pairs of float32.
struct Pairs {
  struct Value {
    v16f even, odd;
  };
  struct Scalar {
    float even, odd;
  };
  struct Table {
    const float* levels;
    int bits, shift;
  };
  static VS_INLINE Table table(const vs::Field& field) { return {field.levels, field.bits, field.shift}; }
  static VS_INLINE Value expand(const Table& table, const uint8_t* words) {
    const v16i both = (v16i)load_words(words) >> table.shift;
    const int32_t mask = (1 << table.bits) - 1;
    return {lookup(table.levels, table.bits, both & mask), lookup(table.levels, table.bits, both >> 16 & mask)};
  }
  static VS_INLINE Value expand_any(const Table& table, const uint8_t* words) { return expand(table, words); }
  static VS_INLINE v16f dot(v16f sum, const Value& a, const Value& b) { return a.odd * b.odd + (a.even * b.even + sum); }
  static VS_INLINE Value broadcast(const Scalar& x) { return {splat(x.even), splat(x.odd)}; }
  static VS_INLINE Scalar scalar(float even, float odd) { return {even, odd}; }
  static VS_INLINE Value of(v16f even, v16f odd) { return {even, odd}; }
  static VS_INLINE Value of_bf16(v16u both) { return {(v16f)(both << 16), (v16f)(both & 0xffff0000u)}; }
  static VS_INLINE void spread(const Value& value, Scalar* to) {
    for (int i = 0; i < 16; i++) to[i] = {value.even[i], value.odd[i]};
  }
  static VS_INLINE Scalar member(const Value* values, int64_t k) { return {values[k / 16].even[k % 16], values[k / 16].odd[k % 16]}; }
};
#endif
typedef Pairs::Value Pair;
typedef Pairs::Scalar PairScalar;

}  // namespace

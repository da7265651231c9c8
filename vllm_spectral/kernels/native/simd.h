// Vectors of 16 lanes for every instruction set, by the compiler's vector extension where it suffices. This file is
// compiled once per instruction set; what it finds defined decides which primitives it has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef float v16f __attribute__((vector_size(64), may_alias, aligned(64)));
typedef int32_t v16i __attribute__((vector_size(64), may_alias, aligned(64)));
typedef uint32_t v16u __attribute__((vector_size(64), may_alias, aligned(64)));
typedef float v16f_u __attribute__((vector_size(64), may_alias, aligned(4)));
typedef int32_t v16i_u __attribute__((vector_size(64), may_alias, aligned(4)));
typedef uint8_t v16b __attribute__((vector_size(16), may_alias, aligned(1)));
typedef float v8f __attribute__((vector_size(32), may_alias, aligned(32)));
typedef double v8d __attribute__((vector_size(64), may_alias, aligned(64)));

#define VS_INLINE inline __attribute__((always_inline))

VS_INLINE v16f splat(float x) { return v16f{} + x; }
VS_INLINE v16i splat(int32_t x) { return v16i{} + x; }
VS_INLINE v16f load(const float* p) { return *reinterpret_cast<const v16f_u*>(p); }
VS_INLINE void store(float* p, v16f x) { *reinterpret_cast<v16f_u*>(p) = x; }
VS_INLINE v8f load_half(const float* p) {
  v8f x;
  memcpy(&x, p, sizeof(x));
  return x;
}
VS_INLINE void store_half(float* p, v8f x) { memcpy(p, &x, sizeof(x)); }
VS_INLINE v16i load_integers(const int32_t* p) { return *reinterpret_cast<const v16i_u*>(p); }
VS_INLINE void store_integers(int32_t* p, v16i x) { *reinterpret_cast<v16i_u*>(p) = x; }
VS_INLINE v16u load_words(const void* p) { return *static_cast<const v16u*>(p); }
VS_INLINE v16f as_float(v16i x) { return reinterpret_cast<v16f&>(x); }
VS_INLINE v16i as_int(v16f x) { return reinterpret_cast<v16i&>(x); }
VS_INLINE v16f select(v16i mask, v16f a, v16f b) { return as_float((mask & as_int(a)) | (~mask & as_int(b))); }
VS_INLINE v16f larger(v16f a, v16f b) {
#if defined(__AVX512F__)
  return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}

// 16 bytes as natural numbers. The compiler's own conversion moves them one by one.
VS_INLINE v16i of_bytes(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return (v16i)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#else
  v16b packed;
  memcpy(&packed, bytes, 16);
  return __builtin_convertvector(packed, v16i);
#endif
}

// Lanes set in the low 16 bits of a mask.
VS_INLINE v16i lanes(uint32_t mask) {
#if defined(__AVX512F__)
  return (v16i)_mm512_maskz_set1_epi32(static_cast<__mmask16>(mask), -1);
#endif
  const v16i bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (splat(static_cast<int32_t>(mask & 0xffff)) & bit) != 0;
}

// Which lanes are negative, as bits.
VS_INLINE uint32_t signs(v16i x) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)x);
#else
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= (static_cast<uint32_t>(x[i]) >> 31) << i;
  return mask;
#endif
}

// The highest bit of each of 16 bytes.
VS_INLINE uint32_t high_bits(const uint8_t* bytes) {
#if defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
#else
  uint32_t mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<uint32_t>(bytes[i] >> 7) << i;
  return mask;
#endif
}

#if defined(__AVX512F__)
// Of 2 ** kBits floats in registers: faster than 16 loads.
template <int kBits>
VS_INLINE v16f lookup_wide(const float* table, v16i index) {
  if constexpr (kBits == 5) {
    return (v16f)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)index, _mm512_load_ps(table + 16));
  } else {
    const v16f low = lookup_wide<kBits - 1>(table, index), high = lookup_wide<kBits - 1>(table + (1 << (kBits - 1)), index);
    const __mmask16 upper = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(1 << (kBits - 1)));
    return (v16f)_mm512_mask_blend_ps(upper, (__m512)low, (__m512)high);
  }
}
#endif

// table[index] for a table of 2 ** bits floats, at most 8 bits, 64-byte aligned, at least 16 entries allocated.
VS_INLINE v16f lookup(const float* table, [[maybe_unused]] int bits, v16i index) {
#if defined(__AVX512F__)
  if (bits <= 4) return (v16f)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
  if (bits == 5) return lookup_wide<5>(table, index);
  if (bits == 6) return lookup_wide<6>(table, index);
  if (bits == 7) return lookup_wide<7>(table, index);
  return lookup_wide<8>(table, index);
#elif defined(__AVX2__)
  const __m256i* half = reinterpret_cast<const __m256i*>(&index);
  __m256 out[2];
  for (int i = 0; i < 2; i++) {
    if (bits <= 3) {
      out[i] = _mm256_permutevar8x32_ps(_mm256_load_ps(table), half[i]);
    } else if (bits == 4) {
      const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), half[i]);
      const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), half[i]);
      out[i] = _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(half[i], 28)));
    } else {
      out[i] = _mm256_i32gather_ps(table, half[i], 4);
    }
  }
  v16f result;
  memcpy(&result, out, sizeof(result));
  return result;
#else
  v16f result;
  for (int i = 0; i < 16; i++) result[i] = table[index[i]];
  return result;
#endif
}

#if defined(__AVX512F__)
// Of 64 floats, faster than 16 loads.
VS_INLINE v16f gather_near(const float* from, v16i index) {
  const v16f low = (v16f)_mm512_permutex2var_ps((__m512)load(from), (__m512i)index, (__m512)load(from + 16));
  const v16f high = (v16f)_mm512_permutex2var_ps((__m512)load(from + 32), (__m512i)index, (__m512)load(from + 48));
  return (v16f)_mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(32)), (__m512)low, (__m512)high);
}
#endif

// from[index] of so many floats, or 0 where the index is negative.
VS_INLINE v16f gather(const float* from, [[maybe_unused]] int64_t size, v16i index) {
#if defined(__AVX512F__)
  const __mmask16 some = _mm512_cmpge_epi32_mask((__m512i)index, _mm512_setzero_si512());
  if (size == 64) return (v16f)_mm512_maskz_mov_ps(some, (__m512)gather_near(from, index));
  if (size == 128) {
    const __mmask16 far = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(64));
    const v16f near = gather_near(from, index), other = gather_near(from + 64, index);
    return (v16f)_mm512_maskz_mov_ps(some, _mm512_mask_blend_ps(far, (__m512)near, (__m512)other));
  }
  return (v16f)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, (__m512i)index, from, 4);
#else
  v16f result;
  for (int i = 0; i < 16; i++) result[i] = index[i] < 0 ? 0.0f : from[index[i]];
  return result;
#endif
}

// An initializer in braces becomes a slow string instruction.
template <int kCount>
VS_INLINE void clear(v16f* vectors) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) vectors[i] = v16f{};
}

// Sums of 16 vectors, lane by lane pairs first: out[i] is the sum of rows[i], in an order that is the same for all i.
template <int kDistance, typename V>
VS_INLINE V fold(V a, V b) {
  v16i low, high;
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const bool second = i & kDistance;
    low[i] = (second ? 16 : 0) + i;
    high[i] = (second ? 16 : 0) + (i ^ kDistance);
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

VS_INLINE v16f sums(v16f* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) rows[i] = fold<8>(rows[i], rows[i + 8]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) rows[i] = fold<4>(rows[i], rows[i + 4]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) rows[i] = fold<2>(rows[i], rows[i + 2]);
  return fold<1>(rows[0], rows[1]);
}

// Of 8 vectors, even and odd lanes apart: out[2i] is the sum of rows[i]'s even lanes, out[2i + 1] of its odd ones.
VS_INLINE v16i sums_but_last(v16i* rows) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) rows[i] = fold<8>(rows[i], rows[i + 4]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) rows[i] = fold<4>(rows[i], rows[i + 2]);
  return fold<2>(rows[0], rows[1]);
}

// Of 16 vectors as the rows of a matrix: blocks of kDistance exchanged across the diagonal; all four sizes transpose it.
template <int kDistance, typename V>
VS_INLINE void exchange(V* rows) {
  v16i upper, lower;
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    upper[i] = i & kDistance ? 16 + i - kDistance : i;
    lower[i] = i & kDistance ? 16 + i : i + kDistance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    if (i & kDistance) continue;
    const V a = rows[i], b = rows[i + kDistance];
    rows[i] = __builtin_shuffle(a, b, upper);
    rows[i + kDistance] = __builtin_shuffle(a, b, lower);
  }
}

template <typename V>
VS_INLINE void transpose(V* rows) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
}

template <int kDistance>
VS_INLINE v16f swapped(v16f x) {
  v16i other;
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) other[i] = i ^ kDistance;
  return __builtin_shuffle(x, other);
}

VS_INLINE float sum(v16f x) {
  x = x + swapped<8>(x);
  x = x + swapped<4>(x);
  x = x + swapped<2>(x);
  x = x + swapped<1>(x);
  return x[0];
}

VS_INLINE float peak(v16f x) {
  x = larger(x, swapped<8>(x));
  x = larger(x, swapped<4>(x));
  x = larger(x, swapped<2>(x));
  x = larger(x, swapped<1>(x));
  return x[0];
}

// 2 ** (x - base), for a whole number base, relative error below 3e-6; 0 at x = -infinity and where it would be below 2 ** -126,
// infinity or anything where it would not be a float32. The base moves nothing but the exponent: 2 ** (x - base) is 2 ** x times
// a power of two, exactly. NaN stays NaN.
VS_INLINE v16f exp2_above(v16f x, float base) {
#if defined(__AVX512DQ__)
  const v16f f = (v16f)_mm512_reduce_ps((__m512)x, 0x09);  // less its whole part, rounded down; 0 for -infinity
  const v16f n = x - f;
#else
  const float magic = 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds to an integer
  const v16i zero = x - base < -126.0f;
  x = select(zero, splat(base), x);
  const v16f n = (x - 0.5f + magic) - magic;  // this needs -fno-fast-math
  const v16f f = x - n;
#endif
  // The polynomial of degree 4 with the smallest relative error on [0, 1], 3e-6, of those that are 1 at 0.
  v16f y = splat(1.342668e-2f);
  y = y * f + 5.224247e-2f;
  y = y * f + 2.412802e-1f;
  y = y * f + 6.9304484e-1f;
  y = y * f + 1.0f;
#if defined(__AVX512DQ__)
  return (v16f)_mm512_scalef_ps((__m512)y, (__m512)(n - base));
#else
  // Without a sign, since what is no float32 may overflow.
  const v16u exponent = (v16u)__builtin_convertvector(n - base, v16i) << 23;
  return select(zero, splat(0.0f), as_float((v16i)((v16u)as_int(y) + exponent)));
#endif
}

// 2 ** n for a whole number n <= 0, or -infinity.
inline float power_of_two(float n) { return n < -126.0f ? 0.0f : std::ldexp(1.0f, static_cast<int>(n)); }

// Rounded to nearest even. NaN stays NaN.
VS_INLINE uint16_t bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

VS_INLINE float float_of_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace

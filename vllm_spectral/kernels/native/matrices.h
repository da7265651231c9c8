// Products of matrices, where the machine has tiles of them (AMX): up to 16 rows of 64 bytes each. One instruction multiplies
// 16 rows with 16 columns of 64 bytes, or of 32 bf16 numbers. Sums of bytes are integers, the same as those of quads one by
// one; bf16 rotates every row, few or many, so that its bits do not depend on how many there are.
//
// Of bytes, A is [rows, bytes], row-major. B's rows hold four bytes of each of 16 columns: of keys, columns are tokens and the four are
// channels, which is how quads are expanded; of values, columns are channels and the four are tokens.
#pragma once
#include "pairs.h"
#include "quads.h"
#include "tiles.h"

namespace {

#if defined(VS_MATRICES)
// The thread's tiles are ours while this lives; whoever had set them up before finds his shapes again, not his data.
class Matrices {
 public:
  Matrices() {
    _tile_storeconfig(&before_);
    Config own{};
    own.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
      own.rows[tile] = vs::kMatrixRows;
      own.row_bytes[tile] = vs::kVectorBytes;
    }
    _tile_loadconfig(&own);
  }
  ~Matrices() {
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;

  // counts[rows, 2, 16] = queries[rows, fours] * keys[fours, 2, 16], both halves of a group. Rows and fours count whole
  // tiles: what lies behind the last row comes out as it may, what lies behind the last four must be zero in the queries.
  static VS_INLINE void scores(const uint32_t* queries, const Quad* keys, int64_t fours, int64_t rows, Quad* counts) {
    constexpr int64_t kKeys = 2 * vs::kVectorBytes, kCounts = 2 * vs::kVectorBytes;
    settle();
    const int64_t row_bytes = 4 * fours;
    for (int64_t first = 0; first < rows; first += 2 * vs::kMatrixRows) {
      const bool two = first + vs::kMatrixRows < rows;
      _tile_zero(0);
      _tile_zero(1);
      if (two) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < fours; k += vs::kMatrixRows) {
        _tile_loadd(4, keys + 2 * k, kKeys);
        _tile_loadd(5, keys + 2 * k + 1, kKeys);
        _tile_loadd(6, queries + first * fours + k, row_bytes);
        _tile_dpbsud(0, 6, 4);
        _tile_dpbsud(1, 6, 5);
        if (!two) continue;
        _tile_loadd(7, queries + (first + vs::kMatrixRows) * fours + k, row_bytes);
        _tile_dpbsud(2, 7, 4);
        _tile_dpbsud(3, 7, 5);
      }
      Quad* to = counts + 2 * first;
      _tile_stored(0, to, kCounts);
      _tile_stored(1, to + 1, kCounts);
      if (!two) continue;
      _tile_stored(2, to + 2 * vs::kMatrixRows, kCounts);
      _tile_stored(3, to + 2 * vs::kMatrixRows + 1, kCounts);
    }
    settle();
  }

  // counts[2, 32, 16] = weights[32, 4 * fours] * values[2, fours, 16], of two blocks of channels; of weights one or two tiles of
  // rows, which are row_bytes apart. Blocks of values are so many vectors apart.
  static VS_INLINE void outputs(const uint8_t* weights, int64_t row_bytes, const Quad* values, int64_t block, int64_t fours, bool two,
                                Quad* counts) {
    settle();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < fours; k += vs::kMatrixRows) {
      _tile_loadd(4, values + k, vs::kVectorBytes);
      _tile_loadd(5, values + block + k, vs::kVectorBytes);
      _tile_loadd(6, weights + 4 * k, row_bytes);
      _tile_dpbusd(0, 6, 4);
      _tile_dpbusd(1, 6, 5);
      if (!two) continue;
      _tile_loadd(7, weights + vs::kMatrixRows * row_bytes + 4 * k, row_bytes);
      _tile_dpbusd(2, 7, 4);
      _tile_dpbusd(3, 7, 5);
    }
    _tile_stored(0, counts, vs::kVectorBytes);
    _tile_stored(1, counts + 2 * vs::kMatrixRows, vs::kVectorBytes);
    if (two) {
      _tile_stored(2, counts + vs::kMatrixRows, vs::kVectorBytes);
      _tile_stored(3, counts + 3 * vs::kMatrixRows, vs::kVectorBytes);
    }
    settle();
  }

  // out[16, dim] = vectors[16, dim] * basis[dim, dim]. Vectors are bf16, or sums of two bf16 numbers; the basis is one of
  // TiledBases. What is left out are products of what is small in both.
  static VS_INLINE void rotate(const uint16_t* high, const uint16_t* low, int64_t row_bytes, const uint16_t* basis_high,
                               const uint16_t* basis_low, int64_t dim, float* out) {
    settle();
    const int64_t columns = dim / vs::kMatrixRows;
    for (int64_t first = 0; first < columns; first += 4) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; 32 * step < dim; step++) {
        _tile_loadd(4, high + 32 * step, row_bytes);
        if (low) _tile_loadd(5, low + 32 * step, row_bytes);
        const int64_t at = (step * columns + first) * vs::kTileNumbers;
#define VS_COLUMN(i)                                                            \
  if (first + i < columns) {                                                    \
    _tile_loadd(6, basis_low + at + i * vs::kTileNumbers, vs::kVectorBytes);    \
    _tile_loadd(7, basis_high + at + i * vs::kTileNumbers, vs::kVectorBytes);   \
    _tile_dpbf16ps(i, 4, 6);                                                    \
    if (low) _tile_dpbf16ps(i, 5, 7);                                           \
    _tile_dpbf16ps(i, 4, 7);                                                    \
  }
        VS_COLUMN(0)
        VS_COLUMN(1)
        VS_COLUMN(2)
        VS_COLUMN(3)
#undef VS_COLUMN
      }
      float* to = out + first * vs::kMatrixRows;
      _tile_stored(0, to, 4 * dim);
      if (first + 1 < columns) _tile_stored(1, to + vs::kMatrixRows, 4 * dim);
      if (first + 2 < columns) _tile_stored(2, to + 2 * vs::kMatrixRows, 4 * dim);
      if (first + 3 < columns) _tile_stored(3, to + 3 * vs::kMatrixRows, 4 * dim);
    }
    settle();
  }

  // out[16, 16] = a[16, 32 * steps] * b[32 * steps, 16], of bf16; a step of a's rows is 64 bytes, one of b's 16 vectors of pairs.
  static VS_INLINE void pairs(const Pair* a, int64_t row_bytes, const Pair* b, int64_t steps, float* out) {
    settle();
    _tile_zero(0);
    for (int64_t step = 0; step < steps; step++) {
      _tile_loadd(4, a + step, row_bytes);
      _tile_loadd(5, b + step * vs::kMatrixRows, vs::kVectorBytes);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, out, vs::kVectorBytes);
    settle();
  }

  // 16 numbers as the sum of two bf16 numbers each.
  static VS_INLINE void split(v16f x, uint16_t* high, uint16_t* low) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)x);
    const v16f back = (v16f)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), rounded);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), (__m256i)_mm512_cvtneps_pbh((__m512)(x - back)));
  }

  // Eight vectors' 64-bit lanes, transposed: of quads of values of one group, lane i holds both channels' i-th four of tokens.
  static VS_INLINE void transpose(const Quad* quads, Quad* to) {
    __m512i twos[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      twos[i] = _mm512_unpacklo_epi64((__m512i)quads[i], (__m512i)quads[i + 1]);
      twos[i + 1] = _mm512_unpackhi_epi64((__m512i)quads[i], (__m512i)quads[i + 1]);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; odd++) {
      const __m512i even_low = _mm512_shuffle_i64x2(twos[odd], twos[2 + odd], 0x88);
      const __m512i odd_low = _mm512_shuffle_i64x2(twos[odd], twos[2 + odd], 0xdd);
      const __m512i even_high = _mm512_shuffle_i64x2(twos[4 + odd], twos[6 + odd], 0x88);
      const __m512i odd_high = _mm512_shuffle_i64x2(twos[4 + odd], twos[6 + odd], 0xdd);
      to[odd] = (Quad)_mm512_shuffle_i64x2(even_low, even_high, 0x88);
      to[4 + odd] = (Quad)_mm512_shuffle_i64x2(even_low, even_high, 0xdd);
      to[2 + odd] = (Quad)_mm512_shuffle_i64x2(odd_low, odd_high, 0x88);
      to[6 + odd] = (Quad)_mm512_shuffle_i64x2(odd_low, odd_high, 0xdd);
    }
  }

 private:
  // The compiler does not know that tiles read and write memory.
  static VS_INLINE void settle() { asm volatile("" ::: "memory"); }
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Config before_{};
};
#else
class Matrices {
 public:
  Matrices() {}
  static VS_INLINE void scores(const uint32_t*, const Quad*, int64_t, int64_t, Quad*) {}
  static VS_INLINE void outputs(const uint8_t*, int64_t, const Quad*, int64_t, int64_t, bool, Quad*) {}
  static VS_INLINE void rotate(const uint16_t*, const uint16_t*, int64_t, const uint16_t*, const uint16_t*, int64_t, float*) {}
  static VS_INLINE void pairs(const Pair*, int64_t, const Pair*, int64_t, float*) {}
  static VS_INLINE void split(v16f, uint16_t*, uint16_t*) {}
  static VS_INLINE void transpose(const Quad*, Quad*) {}
};
#endif

}  // namespace

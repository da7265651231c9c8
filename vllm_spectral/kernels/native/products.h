// Products of vectors of float32 with a small square matrix.
#pragma once
#include <cstdint>

#include "simd.h"

namespace {

constexpr int kTogether = 4;  // vectors that are multiplied together

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
inline void products(int64_t count, const float* vectors, const float* matrix, int64_t dim, float* out) {
  switch (count) {
    case 1: return some_products<1>(vectors, matrix, dim, out);
    case 2: return some_products<2>(vectors, matrix, dim, out);
    case 3: return some_products<3>(vectors, matrix, dim, out);
    default: return some_products<kTogether>(vectors, matrix, dim, out);
  }
}

}  // namespace

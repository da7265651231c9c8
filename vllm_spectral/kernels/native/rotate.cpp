#include "rotate.h"

#include "simd.h"

namespace {

template <int kCount>
void rotate_some(const double* vectors, const float* basis, int64_t dim, float* out) {
  for (int64_t column = 0; column < dim; column += 16) {
    v8d low[kCount] = {}, high[kCount] = {};
    for (int64_t row = 0; row < dim; row++) {
      v8f first, second;
      memcpy(&first, basis + row * dim + column, 32);
      memcpy(&second, basis + row * dim + column + 8, 32);
      const v8d a = __builtin_convertvector(first, v8d), b = __builtin_convertvector(second, v8d);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; i++) {
        const double x = vectors[i * dim + row];
        low[i] += a * x;
        high[i] += b * x;
      }
    }
    for (int i = 0; i < kCount; i++) {
      const v8f first = __builtin_convertvector(low[i], v8f), second = __builtin_convertvector(high[i], v8f);
      memcpy(out + i * dim + column, &first, 32);
      memcpy(out + i * dim + column + 8, &second, 32);
    }
  }
}

}  // namespace

void rotate(const double* vectors, int count, const float* basis, int64_t dim, float* out) {
  // Rows beyond the count are scratch, and nobody reads what becomes of them.
  if (count == 1) return rotate_some<1>(vectors, basis, dim, out);
  if (count == 2) return rotate_some<2>(vectors, basis, dim, out);
  if (count <= 4) return rotate_some<4>(vectors, basis, dim, out);
  rotate_some<kTogether>(vectors, basis, dim, out);
}

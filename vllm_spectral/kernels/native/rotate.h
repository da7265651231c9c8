// Rotation of new keys and values: the one product whose result is stored. Apart from the rest, because products and sums
// may be contracted here: in double, that changes a result less than its rounding to float32 does.
#pragma once
#include <cstdint>

constexpr int kTogether = 8;  // vectors rotated at once, so that each part of the basis is read once for all

// out[count, dim] = vectors[count, dim] @ basis[dim, dim], summed over the basis' rows in order, rounded once; count is at
// most kTogether, and both arrays have room for so many.
void rotate(const double* vectors, int count, const float* basis, int64_t dim, float* out);

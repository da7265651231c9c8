// Rotation of new keys and values: the one product whose result is stored. Apart from the rest, because products and sums
// may be contracted here: in double, that changes a result less than its rounding to float32 does.
#pragma once
#include <cstdint>

constexpr int kTogether = 4;  // vectors rotated at once, so that each part of the basis is read once for all

// out[kTogether, dim] = vectors[kTogether, dim] @ basis[dim, dim], summed over the basis' rows in order, rounded once.
void rotate(const double* vectors, const float* basis, int64_t dim, float* out);

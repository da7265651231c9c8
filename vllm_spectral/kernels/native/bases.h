// Bases in the order in which tiles of bf16 read them: of 32 rows and 16 columns, a tile's rows hold the pairs of two
// neighbouring rows, column by column. Each entry is the sum of two bf16 numbers, which leaves some 2 ** -17 of it.
#pragma once
#include "array.h"
#include "features.h"
#include "simd.h"

namespace vs {

constexpr int kTileNumbers = 512;  // bf16 numbers of a tile

class TiledBases {
 public:
  // bases: [heads, dim, dim]. Rows are filled up with zeros to whole tiles.
  TiledBases(const float* bases, int64_t heads, int64_t dim, bool transpose)
      : each_((dim + 31) / 32 * (dim / kMatrixRows) * kTileNumbers), high_(heads * each_), low_(heads * each_) {
    for (int64_t i = 0; i < heads * dim * dim; i++) {
      const int64_t head = i / (dim * dim), first = i / dim % dim, second = i % dim;
      const int64_t row = transpose ? second : first, column = transpose ? first : second;
      const int64_t tile = row / 32 * (dim / kMatrixRows) + column / kMatrixRows;
      const int64_t at = head * each_ + tile * kTileNumbers + row % 32 / 2 * 32 + column % kMatrixRows * 2 + row % 2;
      high_[at] = bf16_of(bases[i]);
      low_[at] = bf16_of(bases[i] - float_of_bf16(high_[at]));
    }
  }
  const uint16_t* high(int64_t head) const { return high_.get() + head * each_; }
  const uint16_t* low(int64_t head) const { return low_.get() + head * each_; }
  size_t bytes() const { return high_.bytes() + low_.bytes(); }

 private:
  int64_t each_;  // numbers of a head
  Array<uint16_t> high_, low_;
};

}  // namespace vs

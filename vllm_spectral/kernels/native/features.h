// What an instruction set can multiply.
#pragma once
#include <cstdint>

namespace vs {

// Whether narrow fields are expanded to bytes, two of the same vector of words at once; see quads.h.
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define VS_QUADS
constexpr bool kQuads = true;
#else
constexpr bool kQuads = false;
#endif
// Whether matrices are multiplied by tiles, many rows with quads and all rows with bases; see matrices.h.
#if (defined(__AMX_INT8__) && defined(__AMX_BF16__) || defined(VS_EMULATE_TILES)) && defined(__AVX512BF16__) && defined(VS_QUADS)
#define VS_MATRICES
constexpr bool kMatrices = true;
#else
constexpr bool kMatrices = false;
#endif
constexpr int kMatrixRows = 16;   // of a tile, which are its columns as well, and the fours of bytes of a row
constexpr int64_t whole_tiles(int64_t n) { return (n + kMatrixRows - 1) / kMatrixRows * kMatrixRows; }

}  // namespace vs

// Tiles of AMX: the machine's, or the same in plain C++, so that what is written for them can be tested on machines without.
// Source of what the instructions do: Intel's manual for software developers, volume 2, TDPBF16PS, TDPBSUD and TDPBUSD.
#pragma once
#include "features.h"

#if defined(VS_MATRICES) && !defined(VS_EMULATE_TILES)
#include <immintrin.h>
#elif defined(VS_MATRICES)
#include <cstring>
#include <immintrin.h>

#include "simd.h"

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#undef _tile_dpbusd
#define _tile_loadconfig(config) (static_cast<void>(config))
#define _tile_storeconfig(config) (memset(config, 0, 64))
#define _tile_release()
#define _tile_loadd(tile, from, stride) vs::emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) vs::emulated::store(tile, to, stride)
#define _tile_zero(tile) vs::emulated::zero(tile)
#define _tile_dpbf16ps(sum, a, b) vs::emulated::add_bf16(sum, a, b)
#define _tile_dpbsud(sum, a, b) vs::emulated::add_bytes<int8_t, uint8_t>(sum, a, b)
#define _tile_dpbusd(sum, a, b) vs::emulated::add_bytes<uint8_t, int8_t>(sum, a, b)

namespace vs::emulated {

struct Tile {
  alignas(64) uint8_t rows[16][64];
};
inline thread_local Tile tiles[8];

inline void zero(int tile) { memset(&tiles[tile], 0, sizeof(Tile)); }

inline void load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(tiles[tile].rows[row], static_cast<const uint8_t*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; row++) memcpy(static_cast<uint8_t*>(to) + row * stride, tiles[tile].rows[row], 64);
}

template <typename A, typename B>
void add_bytes(int sum, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      int32_t total;
      memcpy(&total, tiles[sum].rows[m] + 4 * n, 4);
      for (int k = 0; k < 16; k++)
        for (int i = 0; i < 4; i++)
          total += static_cast<A>(tiles[a].rows[m][4 * k + i]) * static_cast<B>(tiles[b].rows[k][4 * n + i]);
      memcpy(tiles[sum].rows[m] + 4 * n, &total, 4);
    }
}

// Even and odd members of all pairs are summed apart, then added to what was there.
inline void add_bf16(int sum, int a, int b) {
  const auto number = [](const uint8_t* at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return float_of_bf16(bits);
  };
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float of[2] = {0, 0}, total;
      for (int k = 0; k < 16; k++)
        for (int i = 0; i < 2; i++)
          of[i] = __builtin_fmaf(number(tiles[a].rows[m] + 4 * k + 2 * i), number(tiles[b].rows[k] + 4 * n + 2 * i), of[i]);
      memcpy(&total, tiles[sum].rows[m] + 4 * n, 4);
      total += of[0] + of[1];
      memcpy(tiles[sum].rows[m] + 4 * n, &total, 4);
    }
}

}  // namespace vs::emulated
#endif

// Reading and writing rows of the model's tensors in any of its dtypes.
#pragma once
#include "abi.h"
#include "simd.h"

namespace {

VS_INLINE float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  float x;
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u | fraction << 13 : (exponent + 112) << 23 | fraction << 13);
  memcpy(&x, &bits, 4);
  if (exponent == 0) x = (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 5.9604644775390625e-8f;
  return x;
}

VS_INLINE uint16_t half_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds beyond the largest half
  if (bits < 0x38800000u) {                       // subnormal: a multiple of 2 ** -24
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    return sign | static_cast<uint16_t>(__builtin_rintf(magnitude * 16777216.0f));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

// Row (token, head) as float32.
VS_INLINE void read_row(const Rows& rows, int64_t token, int64_t head, int64_t dim, float* out) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride;
  if (rows.dtype == kFloat32) {
    memcpy(out, static_cast<const float*>(rows.data) + at, dim * sizeof(float));
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(rows.data) + at;
    if (rows.dtype == kBFloat16)
      for (int64_t c = 0; c < dim; c++) out[c] = float_of_bf16(in[c]);
    else
      for (int64_t c = 0; c < dim; c++) out[c] = float_of_half(in[c]);
  }
}

VS_INLINE void write_row(const Rows& rows, int64_t token, int64_t head, int64_t dim, const float* in) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride;
  if (rows.dtype == kFloat32) {
    memcpy(static_cast<float*>(rows.data) + at, in, dim * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(rows.data) + at;
    if (rows.dtype == kBFloat16)
      for (int64_t c = 0; c < dim; c++) out[c] = bf16_of(in[c]);
    else
      for (int64_t c = 0; c < dim; c++) out[c] = half_of_float(in[c]);
  }
}

}  // namespace

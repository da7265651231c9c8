// The C interface between Python and the kernels. Pointers are to contiguous arrays unless strides are given; strides
// count elements. A layer keeps pointing to its two bases, and to nothing else of the caller's.
#pragma once
#include <cstdint>

#define VS_API __attribute__((visibility("default")))

extern "C" {

// How the keys, or the values, of one layer are coded; see VectorCoding and FieldTable in the Python codec.
// [H] = num_heads, [D] = head_dim.
struct CodingSpec {
  const float* basis;       // [H, D, D], basis vectors as columns
  const float* center;      // [H, D]
  const float* width;       // [H, D]
  const float* flat_width;  // [H, D]
  const float* flat_needed;  // [H], times a vector's mean square: the error that the fallback must beat to be tried
  const int32_t *bits, *offset, *shift;                 // [H, D], of the water-filled fields
  const int32_t *flat_bits, *flat_offset, *flat_shift;  // [H, D], of the fallback's fields
  // offset: bytes from the start of the fields (of a half group, for keys) to the 64-byte vector that holds the field.
  // shift: from bit 0 of the lane's 32 bits for keys, of its 16 bits for values.
};

struct LayerSpec {
  int64_t num_heads, head_dim, slot_bytes, max_bits;
  CodingSpec keys, values;
  const int32_t* key_start;    // [H] byte of a group where the first half's key fields start
  const int32_t* key_half;     // [H] bytes of one half's key fields
  const int32_t* value_start;  // [H] byte of a group where the value fields start
  const float *levels, *boundaries;  // [max_bits + 1, 2 ** max_bits]
  const float *scales, *inverse_scales, *scale_bounds;  // [128], [128], [127]
  int64_t search_first, search_count;  // scales tried: center + first ... center + first + count - 1
  float fallback_gain;  // it is taken if it leaves at most this share of the error
};

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Rows {  // [num_tokens, heads, head_dim], the last dimension contiguous
  void* data;
  int64_t token_stride, head_stride;
  int32_t dtype;
};

struct Pages {  // [num_blocks, num_heads, block_size, slot_bytes]
  uint8_t* data;
  int64_t block_stride, head_stride, block_size;
};

// One step of one layer: new tokens are compressed into the pages, then queries attend to them. Either may be left out.
struct StepCall {
  Rows query, keys, values, output;  // the step's tokens
  Pages pages;
  // Storing.
  const int64_t* slot_mapping;  // [num_stored], negative: padding
  int64_t num_stored;           // the first so many of the step's tokens; 0: the pages have them already
  // Attending.
  const int32_t* block_table;  // [num_requests, block_table_stride]
  int64_t block_table_stride;
  const int32_t *query_start, *context_lens;  // [num_requests + 1], [num_requests]
  int64_t num_requests, num_query_heads;      // no requests: nobody attends
  // The exact tier. exact_on: the step's own tokens are read exactly inside windows, and copies if exact_rows says so.
  int32_t exact_on, first, recent;
  uint16_t *copy_keys, *copy_values;  // [entries, num_heads, 2 ** copy_shift, head_dim] bf16; row r: entry r >> copy_shift
  int32_t copy_shift;
  const int64_t *write_tokens, *write_rows;  // [num_writes]: tokens of the step to be copied first, and where to
  int64_t num_writes;
  const int32_t* exact_rows;  // [num_requests, first + recent]; row of position j < first at j, of position j >= start
                              // at first + j - start, start = max(queries' first position - recent, 0); -1: no copy
  float scale, soft_cap;      // soft_cap 0: none
  int32_t window;             // sliding window in tokens, the query's own included; 0: none
  int32_t num_threads;
  uint8_t* workspace;  // 64-byte aligned
  int64_t workspace_bytes;
};

struct Layer;  // opaque
VS_API Layer* vs_layer_create(const LayerSpec* spec);  // null: no memory
VS_API void vs_layer_destroy(Layer* layer);
VS_API int64_t vs_layer_bytes(const Layer* layer);
VS_API int64_t vs_step(const Layer* layer, const StepCall* call);  // 0; or nothing was done, and so many bytes are needed; -1: no memory
VS_API const char* vs_isa();         // the instruction set this library was compiled for
VS_API const char* vs_machine_isas();  // comma-separated, those that this machine can run, best first
VS_API int64_t vs_read(const uint8_t* data, int64_t bytes, int32_t num_threads);  // a checksum: reads, for measuring bandwidth
}

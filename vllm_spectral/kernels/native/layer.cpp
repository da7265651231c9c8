// Creating layers, telling instruction sets, and the yardstick of memory bandwidth.
#include "layer.h"

Layer* vs_layer_create(const LayerSpec* spec) { return new Layer(*spec); }
void vs_layer_destroy(Layer* layer) { delete layer; }
int64_t vs_layer_bytes(const Layer* layer) { return static_cast<int64_t>(layer->bytes()); }

const char* vs_isa() { return VS_ISA; }

const char* vs_machine_isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  if (vnni && bf16) return "avx512_vnni_bf16,avx512_vnni,avx512_bf16,avx512,avx2,portable";
  if (vnni) return "avx512_vnni,avx512,avx2,portable";
  if (bf16) return "avx512_bf16,avx512,avx2,portable";
  if (avx512) return "avx512,avx2,portable";
  if (avx2) return "avx2,portable";
#endif
  return "portable";
}

int64_t vs_read(const uint8_t* data, int64_t bytes, int32_t num_threads) {
  const int64_t* words = reinterpret_cast<const int64_t*>(data);
  int64_t total = 0;
#pragma omp parallel for num_threads(num_threads) reduction(+ : total) schedule(static)
  for (int64_t i = 0; i < bytes / 8; i++) total += words[i];
  return total;
}

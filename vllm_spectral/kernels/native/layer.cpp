// Creating layers, telling instruction sets, and the yardstick of memory bandwidth.
#include "layer.h"

#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

Layer* vs_layer_create(const LayerSpec* spec) {
  try {
    return new Layer(*spec);
  } catch (const std::bad_alloc&) {
    return nullptr;  // no exception may leave a function of C
  }
}
void vs_layer_destroy(Layer* layer) { delete layer; }
int64_t vs_layer_bytes(const Layer* layer) { return static_cast<int64_t>(layer->bytes()); }

const char* vs_isa() { return VS_ISA; }

#if defined(__x86_64__)
// Whether the processor has tiles of bytes, and the kernel lets this process use them: it wants to be asked once.
static bool has_matrices() {
#if defined(VS_EMULATE_TILES)
  return true;
#elif defined(__linux__)
  constexpr int kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2), the state's number
  constexpr unsigned kNeeded = 1u << 24 | 1u << 25 | 1u << 22;  // tiles, of bytes, of bf16
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const char* vs_machine_isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
  if (vnni && bf16 && has_matrices()) return "avx512_amx,avx512_vnni_bf16,avx512_vnni,avx512_bf16,avx512,avx2,portable";
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

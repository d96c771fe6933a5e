#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jaxserve {

#if defined(__x86_64__)
// Tiles hold 8 KiB of a thread's state, for which Linux wants to be asked (its manual: "Using XSTATE
// features in user space applications"). One answer counts for all threads of the process.
static bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // of leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kVectorsOfBfloat16 = 1u << 5;  // of the leaf's second part, EAX
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kVectorsOfBfloat16) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAll = kBfloat16 | kTile | kInt8;
  return (d & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const Kernels* const* available_kernels() {
  static const Kernels* found[6] = {};
  static const bool once = [] {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni && amx_kernels() != nullptr && may_use_tiles()) found[count++] = amx_kernels();
    if (vnni) found[count++] = &kAvx512Vnni;
    if (avx512) found[count++] = &kAvx512;
    if (avx2) found[count++] = &kAvx2;
#endif
    found[count] = &kPlain;
    return true;
  }();
  (void)once;
  return found;
}

}  // namespace jaxserve

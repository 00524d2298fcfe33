// Picks the instruction set that the CPU kernels run on; included after each_isa.h.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace compaware {

enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
#ifdef CK_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The best one of this machine, or the one named by COMPAWARE_ISA, which lets a test run the others. Read once.
inline Isa isa() {
  static const Isa chosen = [] {
    const char* const name = std::getenv("COMPAWARE_ISA");
    if (!name || !*name) return best_isa();
    int i = 0;
    for (const char* known : {"baseline", "avx2", "avx512"}) {
      if (name == std::string(known) && i <= static_cast<int>(best_isa())) return static_cast<Isa>(i);
      ++i;
    }
    STD_TORCH_CHECK(false, "COMPAWARE_ISA: wanted baseline, avx2 or avx512, and one that this machine has; got ", name);
    return Isa::baseline;
  }();
  return chosen;
}

}  // namespace compaware

// `kernel` as compiled for the chosen instruction set.
#ifdef CK_X86_LEVELS
#define CK_OF_ISA(...) \
  (isa() == Isa::avx512 ? avx512::__VA_ARGS__ : isa() == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define CK_OF_ISA(...) (isa(), baseline::__VA_ARGS__)
#endif

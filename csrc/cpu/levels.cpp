#include "levels.h"

#include <cstdlib>
#include <stdexcept>
#if defined(LIT_DID_HAS_X86_LEVELS)
#include <cpuid.h>
#endif

namespace lit_did::cpu {

std::vector<std::string> simd_levels() {
#if defined(LIT_DID_HAS_X86_LEVELS)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

#if defined(LIT_DID_HAS_X86_LEVELS)
// Whether the processor has every bit of `wanted` in one register of a CPUID leaf.
enum Register { kEbx, kEcx };
static bool has(unsigned leaf, Register where, unsigned wanted) {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx)) return false;
  return ((where == kEbx ? ebx : ecx) & wanted) == wanted;
}

// Whether the operating system saves the registers that these bits of XCR0 stand for.
static bool saves(unsigned wanted) {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & wanted) == wanted;
}
#endif

// __builtin_cpu_supports is not used: with zig's compiler runtime it finds nothing.
static std::vector<std::string> usable_levels() {
  std::vector<std::string> levels{"baseline"};
#if defined(LIT_DID_HAS_X86_LEVELS)
  if (has(1, kEcx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C) && saves(0x6) && has(7, kEbx, bit_AVX2)) {
    levels.push_back("avx2");
    if (has(7, kEbx, bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ) && saves(0xe6)) {
      levels.push_back("avx512");
    }
  }
#endif
  return levels;
}

static std::string choose() {
  const auto usable = usable_levels();
  const char* wanted = std::getenv("LIT_DID_SIMD");
  if (!wanted || !*wanted) return usable.back();
  std::string names;
  for (const std::string& level : usable) {
    if (level == wanted) return level;
    names += names.empty() ? level : ", " + level;
  }
  throw std::invalid_argument("Expected the environment variable LIT_DID_SIMD to be one of " + names + ", but got " +
                              wanted + ".");
}

const std::string& simd_level() {
  static const std::string level = choose();
  return level;
}

}  // namespace lit_did::cpu

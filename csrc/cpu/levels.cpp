#include "levels.h"

#include <cstdlib>
#include <stdexcept>

namespace lit_did::cpu {

std::vector<std::string> simd_levels() {
#if defined(LIT_DID_HAS_X86_LEVELS)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

static std::vector<std::string> usable_levels() {
  std::vector<std::string> levels{"baseline"};
#if defined(LIT_DID_HAS_X86_LEVELS)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    levels.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
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

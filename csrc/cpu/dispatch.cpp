// Chooses the row kernels for this processor, once.
#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace lit_did::cpu {

std::vector<const RowKernels*> usable_rows() {
  std::vector<const RowKernels*> tables{&baseline_rows()};
#if defined(LIT_DID_HAS_X86_LEVELS)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&avx2_rows());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      tables.push_back(&avx512_rows());
    }
  }
#endif
  return tables;
}

std::vector<std::string> simd_levels() {
#if defined(LIT_DID_HAS_X86_LEVELS)
  return {baseline_rows().level, avx2_rows().level, avx512_rows().level};
#else
  return {baseline_rows().level};
#endif
}

static const RowKernels& choose() {
  const auto tables = usable_rows();
  const char* wanted = std::getenv("LIT_DID_SIMD");
  if (!wanted || !*wanted) return *tables.back();
  std::string usable;
  for (const RowKernels* table : tables) {
    if (table->level == std::string(wanted)) return *table;
    usable += usable.empty() ? table->level : std::string(", ") + table->level;
  }
  throw std::invalid_argument("Expected the environment variable LIT_DID_SIMD to be one of " + usable + ", but got " +
                              wanted + ".");
}

const RowKernels& rows() {
  static const RowKernels& table = choose();
  return table;
}

}  // namespace lit_did::cpu

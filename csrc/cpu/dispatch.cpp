#include "dispatch.h"

#include "levels.h"

namespace lit_did::cpu {

static const RowKernels& choose() {
#if defined(LIT_DID_HAS_X86_LEVELS)
  if (simd_level() == "avx512") return avx512_rows();
  if (simd_level() == "avx2") return avx2_rows();
#endif
  simd_level();  // raises where LIT_DID_SIMD names another level
  return baseline_rows();
}

const RowKernels& rows() {
  static const RowKernels& table = choose();
  return table;
}

}  // namespace lit_did::cpu

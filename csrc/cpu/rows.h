// What the per-instruction-set row kernels offer to the operators: one table of function pointers a level. No torch
// here: this file is compiled with every instruction set's flags.
#pragma once

#include <cstdint>

#include "../row_statistics.h"
#include "../scalar_types.h"

namespace lit_did {

// Entries that one partial RowStatistics covers. Rows are split here, by position alone, so that the bits of a
// row do not depend on how many threads share it. A multiple of every block size.
constexpr int64_t kSplit = 16384;

// Accumulates entries [0, size) of one split of a row. `statistics`: RowStatistics<Real, double>, begun afresh.
using AccumulateFn = void (*)(const void* policy, const void* reference, int64_t size, double scale, void* statistics);

// What the gradient of a row takes. A side with a softcap c has logits c tanh(x / c), and its gradient is that in x.
// Given is 1 / c, or 0 without a softcap. The careful path takes softcaps, too.
template <typename Real>
struct RowCoefficients : GradientCoefficients<Real> {
  Real policy_inverse_softcap, reference_inverse_softcap;

  LIT_DID_INLINE RowCoefficients(const GradientCoefficients<Real>& c, double policy_inverse, double reference_inverse)
      : GradientCoefficients<Real>(c),
        policy_inverse_softcap(Real(policy_inverse)),
        reference_inverse_softcap(Real(reference_inverse)) {
    this->careful = this->careful || policy_inverse != 0 || reference_inverse != 0;
  }
};

// Writes the gradient of a row, or of `size` entries from a multiple of kSplit on. Either output may be null.
// `coefficients`: RowCoefficients<Real>. `label` counts from the first entry; < 0 or >= size adds nothing.
// `large`: the whole gradient exceeds the caches, which may as well keep something else.
using GradientFn = void (*)(const void* policy, const void* reference, int64_t size, int64_t label, double scale,
                            const void* coefficients, bool logprobs_only, bool large, void* grad_policy,
                            void* grad_reference);

struct RowKernels {
  // [policy kind][reference kind]; doubles only with doubles, null otherwise.
  AccumulateFn accumulate[4][4];
  GradientFn gradient[4][4];
};

const RowKernels& baseline_rows();
#if defined(LIT_DID_HAS_X86_LEVELS)
const RowKernels& avx2_rows();
const RowKernels& avx512_rows();
#endif

}  // namespace lit_did

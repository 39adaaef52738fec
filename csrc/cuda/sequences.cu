// Launches the per-sequence reduction. Compiled by nvcc without torch.
#include "sequences.cuh"

namespace lit_did::cuda {

template <typename Real>
void launch(const SequenceArguments& a, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(a.sequences));
  if (a.sequences < kManySequences)
    LIT_DID_LAUNCH((sequence_kernel<Real, kThreadsForFew>), grid, dim3(kThreadsForFew), stream, a);
  else
    LIT_DID_LAUNCH((sequence_kernel<Real, kThreadsForMany>), grid, dim3(kThreadsForMany), stream, a);
}

cudaError_t reduce_sequences(const SequenceArguments& a, cudaStream_t stream) {
  if (a.sequences == 0) return cudaSuccess;
  if (a.sequences > 0x7fffffff) return cudaErrorInvalidValue;
  if (a.kind == ScalarKind::kDouble)
    launch<double>(a, stream);
  else
    launch<float>(a, stream);
  return cudaGetLastError();
}

}  // namespace lit_did::cuda

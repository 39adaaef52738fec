// Launches the per-sequence reduction. Compiled by nvcc without torch.
#include "sequences.cuh"

namespace lit_did::cuda {

cudaError_t reduce_sequences(const SequenceArguments& a, cudaStream_t stream) {
  if (a.sequences == 0) return cudaSuccess;
  if (a.sequences > 0x7fffffff) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(a.sequences)), threads(kSequenceThreads);
  if (a.kind == ScalarKind::kDouble)
    LIT_DID_LAUNCH((sequence_kernel<double>), grid, threads, stream, a);
  else
    LIT_DID_LAUNCH((sequence_kernel<float>), grid, threads, stream, a);
  return cudaGetLastError();
}

}  // namespace lit_did::cuda

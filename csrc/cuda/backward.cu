// Launches the backward. Compiled by nvcc without torch.
#include "backward.cuh"

namespace lit_did::cuda {

cudaError_t backward(const BackwardArguments& a, cudaStream_t stream) {
  const Problem& problem = a.problem;
  const int64_t stretches = (problem.vocabulary + kBackwardStretch - 1) / kBackwardStretch;
  const int64_t blocks = problem.rows * stretches;
  if (blocks == 0 || (!a.grad_policy.data && !a.grad_reference.data)) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks)), threads(kBackwardThreads);
  const int count = static_cast<int>(stretches);
  bool logprobs_only = true;
  for (int i = 2; i < kNumStatistics; ++i) logprobs_only = logprobs_only && !a.grads[i];
  if (!logprobs_only) {
    return with_types(problem.policy.kind, problem.reference.kind, [&](auto p, auto r) {
      using P = decltype(p);
      using R = decltype(r);
      const GradientScaling<typename RealOf<P>::type> by(a);
      LIT_DID_LAUNCH((backward_kernel<P, R>), grid, threads, stream, a, by, 1 / problem.temperature, count);
      return cudaGetLastError();
    });
  }
  cudaError_t error = cudaSuccess;
  if (a.grad_policy.data) {
    error = with_type(problem.policy.kind, [&](auto p) {
      using P = decltype(p);
      const GradientScaling<typename RealOf<P>::type> by(a);
      LIT_DID_LAUNCH((logprob_backward_kernel<P, true>), grid, threads, stream, a, by, 1 / problem.temperature, count);
      return cudaGetLastError();
    });
  }
  if (a.grad_reference.data && error == cudaSuccess) {
    error = with_type(problem.reference.kind, [&](auto r) {
      using R = decltype(r);
      const GradientScaling<typename RealOf<R>::type> by(a);
      LIT_DID_LAUNCH((logprob_backward_kernel<R, false>), grid, threads, stream, a, by, 1 / problem.temperature, count);
      return cudaGetLastError();
    });
  }
  return error;
}

}  // namespace lit_did::cuda

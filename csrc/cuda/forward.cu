// Launches the forward. Compiled by nvcc without torch.
#include "forward.cuh"

namespace lit_did::cuda {
namespace {

int64_t splits_of(const Problem& problem) { return (problem.vocabulary + kForwardSplit - 1) / kForwardSplit; }

}  // namespace

int64_t forward_workspace_bytes(const Problem& problem) {
  const bool is_double = problem.policy.kind == ScalarKind::kDouble;
  const size_t bytes = is_double ? sizeof(RowStatistics<double, double>) : sizeof(RowStatistics<float, float>);
  return problem.rows * splits_of(problem) * static_cast<int64_t>(bytes);
}

cudaError_t forward(const ForwardArguments& a, cudaStream_t stream) {
  const Problem& problem = a.problem;
  const int64_t splits = splits_of(problem), blocks = problem.rows * splits;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return with_types(problem.policy.kind, problem.reference.kind, [&](auto p, auto r) {
    using P = decltype(p);
    using R = decltype(r);
    const Scaling<typename RealOf<P>::type> by(problem.temperature);
    LIT_DID_LAUNCH((forward_kernel<P, R>), dim3(static_cast<unsigned>(blocks)), dim3(kForwardThreads), stream, a, by,
                   static_cast<int>(splits));
    LIT_DID_LAUNCH((finish_kernel<P, R>), dim3(static_cast<unsigned>((problem.rows + kWarp - 1) / kWarp)), dim3(kWarp),
                   stream, a, by, static_cast<int>(splits));
    return cudaGetLastError();
  });
}

}  // namespace lit_did::cuda

// Launches the forward. Compiled by nvcc without torch.
#include "forward.cuh"

namespace lit_did::cuda {
namespace {

Cut cut_of(const Problem& problem) {
  const int parts = parts_of(problem.vocabulary), most = problem.rows * parts <= kFewParts ? 1 : kPartsABlock;
  const int blocks_a_row = (parts + most - 1) / most;
  return {(parts + blocks_a_row - 1) / blocks_a_row, blocks_a_row};
}

}  // namespace

int64_t forward_workspace_bytes(const Problem& problem) {
  if (cut_of(problem).blocks_a_row <= 1) return 0;
  const bool is_double = problem.policy.kind == ScalarKind::kDouble;
  const size_t bytes = is_double ? sizeof(PartSums<double>) : sizeof(PartSums<float>);
  return problem.rows * parts_of(problem.vocabulary) * static_cast<int64_t>(bytes);
}

cudaError_t forward(const ForwardArguments& a, cudaStream_t stream) {
  const Problem& problem = a.problem;
  const Cut cut = cut_of(problem);
  const int64_t blocks = problem.rows * cut.blocks_a_row;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return with_types(problem.policy.kind, problem.reference.kind, [&](auto p, auto r) {
    using P = decltype(p);
    using R = decltype(r);
    using Real = typename RealOf<P>::type;
    const Scaling<Real> by(problem.temperature);
    auto* parts = cut.blocks_a_row > 1 ? static_cast<PartSums<Real>*>(a.workspace) : nullptr;
    LIT_DID_LAUNCH((forward_kernel<P, R>), dim3(static_cast<unsigned>(blocks)), dim3(kForwardThreads), stream, a, by,
                   cut, parts);
    if (parts)
      LIT_DID_LAUNCH((finish_kernel<P, R>), dim3(static_cast<unsigned>(problem.rows)), dim3(kForwardThreads), stream, a,
                     by, parts);
    return cudaGetLastError();
  });
}

}  // namespace lit_did::cuda

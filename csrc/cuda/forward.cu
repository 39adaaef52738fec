// Launches the forward. Compiled by nvcc without torch.
#include "forward.cuh"

namespace lit_did::cuda {
namespace {

Cut cut_of(const Problem& problem) {
  const int parts = parts_of(problem.vocabulary), most = problem.rows * parts <= kFewParts ? 1 : kPartsABlock;
  const int blocks_a_row = (parts + most - 1) / most;
  return {(parts + blocks_a_row - 1) / blocks_a_row, blocks_a_row};
}

// With `parts`, or without where a block takes all parts of a row.
cudaError_t launch(const ForwardArguments& a, const Cut& cut, void* parts, int64_t stride, bool finishes,
                   cudaStream_t stream) {
  const Problem& problem = a.problem;
  const int64_t blocks = problem.rows * cut.blocks_a_row;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return with_types(problem.policy.kind, problem.reference.kind, [&](auto p, auto r) {
    using P = decltype(p);
    using R = decltype(r);
    using Real = typename RealOf<P>::type;
    const Scaling<Real> by(problem.temperature);
    auto* to = static_cast<PartSums<Real>*>(parts);
    LIT_DID_LAUNCH((forward_kernel<P, R>), dim3(static_cast<unsigned>(blocks)), dim3(kForwardThreads), stream, a, by,
                   cut, to, stride);
    if (finishes)
      LIT_DID_LAUNCH((finish_kernel<P, R>), dim3(static_cast<unsigned>(problem.rows)), dim3(kForwardThreads), stream, a,
                     by, to, stride);
    return cudaGetLastError();
  });
}

}  // namespace

int64_t part_bytes(ScalarKind kind) {
  return kind == ScalarKind::kDouble ? sizeof(PartSums<double>) : sizeof(PartSums<float>);
}

int64_t forward_workspace_bytes(const Problem& problem) {
  if (cut_of(problem).blocks_a_row <= 1) return 0;
  return problem.rows * parts_of(problem.vocabulary) * part_bytes(problem.policy.kind);
}

cudaError_t forward(const ForwardArguments& a, cudaStream_t stream) {
  const Cut cut = cut_of(a.problem);
  const bool inside = cut.blocks_a_row == 1;
  return launch(a, cut, inside ? nullptr : a.workspace, parts_of(a.problem.vocabulary), !inside, stream);
}

cudaError_t forward_parts(const PartsArguments& a, cudaStream_t stream) {
  ForwardArguments arguments{};
  arguments.problem = a.problem;
  return launch(arguments, cut_of(a.problem), a.parts, a.stride, false, stream);
}

}  // namespace lit_did::cuda

// Launches the kernels of a vocabulary in slices. Compiled by nvcc without torch.
#include "partials.cuh"

namespace lit_did::cuda {
namespace {

dim3 a_thread_a_row(int64_t rows) { return dim3(static_cast<unsigned>((rows + kWarp - 1) / kWarp)); }

}  // namespace

cudaError_t partials(const PartialsArguments& a, cudaStream_t stream) {
  const Problem& problem = a.problem;
  if (a.slice_entries <= 0 || a.slice_entries > kPartEntries) return cudaErrorInvalidValue;
  const int64_t slices = (problem.vocabulary + a.slice_entries - 1) / a.slice_entries, blocks = problem.rows * slices;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return with_types(problem.policy.kind, problem.reference.kind, [&](auto p, auto r) {
    using P = decltype(p);
    using R = decltype(r);
    const Scaling<typename RealOf<P>::type> by(problem.temperature);
    LIT_DID_LAUNCH((partials_kernel<P, R>), dim3(static_cast<unsigned>(blocks)), dim3(kForwardThreads), stream, a, by,
                   static_cast<int>(slices));
    return cudaGetLastError();
  });
}

cudaError_t merge(const SlicesArguments& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  LIT_DID_LAUNCH(merge_slices_kernel, a_thread_a_row(a.rows), dim3(kWarp), stream, a);
  return cudaGetLastError();
}

cudaError_t finish(const FinishArguments& a, cudaStream_t stream) {
  if (a.slices.rows == 0) return cudaSuccess;
  const dim3 grid = a_thread_a_row(a.slices.rows);
  if (a.kind == ScalarKind::kDouble)
    LIT_DID_LAUNCH((finish_slices_kernel<double>), grid, dim3(kWarp), stream, a);
  else
    LIT_DID_LAUNCH((finish_slices_kernel<float>), grid, dim3(kWarp), stream, a);
  return cudaGetLastError();
}

}  // namespace lit_did::cuda

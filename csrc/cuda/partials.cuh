// A vocabulary in slices: the partial statistics of one, and what several say together (row_partials.h).
//
// Reads      every entry of a slice's two rows once, nothing of a row whose label is ignored; then 128 bytes a row and
//            slice.
// Writes     128 bytes a row and slice; then nine statistics and five normalizers a row.
// Threads    one block a row of a slice, as forward.cuh has it for a split; then a thread a row, which merges its
// slices
//            in their order.
// Bits       The order of every addition follows from the slices' sizes alone.
#pragma once

#include "forward.cuh"
#include "partials.h"

namespace lit_did::cuda {

template <typename P, typename R>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<typename RealOf<P>::type>)
    partials_kernel(const PartialsArguments a, const Scaling<typename RealOf<P>::type> by) {
  using Real = typename RealOf<P>::type;
  const int64_t row = blockIdx.x, label = a.problem.labels[row], size = a.problem.vocabulary;
  if (label == a.problem.ignore_index) return;
  const P* policy = row_of<const P>(a.problem.policy, row);
  const R* reference = row_of<const R>(a.problem.reference, row);
  const auto sums = split_statistics<P, R, Real>(policy, reference, static_cast<int>(size), by);
  if (threadIdx.x != 0) return;
  const int64_t entry = label - a.problem.first_entry;
  const bool held = label >= a.problem.first_entry && entry < size;
  double at_policy = 0, at_reference = 0;
  if (held) {
    at_policy = effective_logit<Real>(load_entry(policy + entry), by.limit) * double(by.scale);
    at_reference = effective_logit<Real>(load_entry(reference + entry), by.limit) * double(by.scale);
  }
  a.partials[row] = partials_of(sums, size, held, at_policy, at_reference);
}

// The slices of a row together.
__device__ __forceinline__ RowPartials merged_row(const SlicesArguments& a, int64_t row) {
  RowPartials whole = a.partials[row];
  for (int64_t slice = 1; slice < a.slices; ++slice) whole = merged(whole, a.partials[slice * a.rows + row]);
  return whole;
}

static __global__ void __launch_bounds__(kWarp) merge_slices_kernel(const SlicesArguments a) {
  const int64_t row = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  if (row >= a.rows || a.labels[row] == a.ignore_index) return;
  a.partials[row] = merged_row(a, row);
}

template <typename Real>
__global__ void __launch_bounds__(kWarp) finish_slices_kernel(const FinishArguments a) {
  const int64_t row = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  if (row >= a.slices.rows) return;
  TokenStatistics<double> s{};
  RowNormalizers normalizers{};
  if (a.slices.labels[row] != a.slices.ignore_index) s = merged_row(a.slices, row).finish(&normalizers);
  const double values[kNumStatistics] = {s.policy_logprob,
                                         s.reference_logprob,
                                         s.token_did_entropy,
                                         s.token_did_concentration,
                                         s.token_did_log_partition,
                                         s.policy_entropy,
                                         s.reference_entropy,
                                         s.kl,
                                         s.reverse_kl};
#pragma unroll
  for (int i = 0; i < kNumStatistics; ++i) static_cast<Real*>(a.statistics[i])[row] = Real(values[i]);
  a.normalizers[row] = normalizers;
}

}  // namespace lit_did::cuda

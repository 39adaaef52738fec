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

// By one thread.
template <typename P, typename R, typename Real>
__device__ __forceinline__ void write_partials(const PartialsArguments& a, int64_t row,
                                               const RowStatistics<Real, double>& sums, const Scaling<Real>& by) {
  const int64_t label = a.problem.labels[row], entry = label - a.problem.first_entry, size = a.problem.vocabulary;
  const bool held = label >= a.problem.first_entry && entry < size;
  double at_policy = 0, at_reference = 0;
  if (held) {
    const P* policy = row_of<const P>(a.problem.policy, row) + entry;
    const R* reference = row_of<const R>(a.problem.reference, row) + entry;
    at_policy = effective_logit<Real>(load_entry(policy), by.limit) * double(by.scale);
    at_reference = effective_logit<Real>(load_entry(reference), by.limit) * double(by.scale);
  }
  a.partials[row] = partials_of(sums, size, held, at_policy, at_reference);
}

// Rows that a block takes of a slice of so many parts, so that each of its warps has a part.
constexpr int rows_a_block(int parts) { return parts < kForwardWarps ? kForwardWarps / parts : 1; }

template <typename P, typename R>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<typename RealOf<P>::type>)
    partials_kernel(const PartialsArguments a, const Scaling<typename RealOf<P>::type> by) {
  using Real = typename RealOf<P>::type;
  __shared__ PartSums<Real> of_block[kMostPartsABlock];
  const int size = static_cast<int>(a.problem.vocabulary), count = parts_of(size), rows = rows_a_block(count);
  const int warps_a_row = kForwardWarps / rows;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, of_row = warp % warps_a_row;
  const int64_t row = int64_t(blockIdx.x) * rows + warp / warps_a_row;
  PartSums<Real>* const parts = of_block + warp / warps_a_row * count;
  const bool counts =
      warp < rows * warps_a_row && row < a.problem.rows && a.problem.labels[row] != a.problem.ignore_index;
  if (counts) {
    const P* policy = row_of<const P>(a.problem.policy, row);
    const R* reference = row_of<const R>(a.problem.reference, row);
    const int mine = of_row * count / warps_a_row, past = (of_row + 1) * count / warps_a_row;
    const int end = smaller_of(past * kPartEntries, size);
    if (bytes_past_boundary(policy) != 0 || bytes_past_boundary(reference) != 0) [[unlikely]] {
      add_parts<P, R, false>(policy, reference, mine * kPartEntries, end, size, by, parts + mine);
    } else {
      add_parts<P, R, true>(policy, reference, mine * kPartEntries, end, size, by, parts + mine);
    }
  }
  __syncthreads();
  if (!counts || of_row != 0) return;
  const auto sums = count == 1 ? to_double(parts[0]) : merge_parts(parts, count);
  if (threadIdx.x % kWarp == 0) write_partials<P, R, Real>(a, row, sums, by);
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

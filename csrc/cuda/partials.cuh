// A vocabulary in slices: the partial statistics of each, and what several say together (row_partials.h).
//
// Reads      every entry of a slice's two rows once, nothing of a row whose label is ignored; then 128 bytes a row and
//            slice.
// Writes     128 bytes a row and slice; then nine statistics and five normalizers a row.
// Threads    one warp a slice of a row, which is a part of it as in forward.cuh; then a thread a row, which merges its
//            slices in their order.
// Bits       The order of every addition follows from the slices' sizes alone.
#pragma once

#include "forward.cuh"
#include "partials.h"

namespace lit_did::cuda {

// By one thread: of the `size` entries from `begin` of the row's logits.
template <typename P, typename R, typename Real>
__device__ __forceinline__ void write_partials(const PartialsArguments& a, int64_t row, int slice, const P* policy,
                                               const R* reference, int size, const PartSums<Real>& sums,
                                               const Scaling<Real>& by) {
  const int64_t first = a.problem.first_entry + int64_t(slice) * a.slice_entries, label = a.problem.labels[row];
  const bool held = label >= first && label < first + size;
  double at_policy = 0, at_reference = 0;
  if (held) {
    at_policy = effective_logit<Real>(load_entry(policy + (label - first)), by.limit) * double(by.scale);
    at_reference = effective_logit<Real>(load_entry(reference + (label - first)), by.limit) * double(by.scale);
  }
  a.partials[slice * a.stride + row] = partials_of(to_double(sums), size, held, at_policy, at_reference);
}

// One block a slice of a row: row * slices + slice.
template <typename P, typename R>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<typename RealOf<P>::type>)
    partials_kernel(const PartialsArguments a, const Scaling<typename RealOf<P>::type> by, int slices) {
  using Real = typename RealOf<P>::type;
  const int block = static_cast<int>(blockIdx.x), row = block / slices, slice = block - row * slices;
  if (a.problem.labels[row] == a.problem.ignore_index) [[unlikely]] {
    return;
  }
  __shared__ PartSums<Real> sums;
  const int64_t begin = int64_t(slice) * a.slice_entries, rest = a.problem.vocabulary - begin;
  const int size = rest < a.slice_entries ? static_cast<int>(rest) : a.slice_entries;
  const P* policy = row_of<const P>(a.problem.policy, row) + begin;
  const R* reference = row_of<const R>(a.problem.reference, row) + begin;
  if (bytes_past_boundary(policy) != 0 || bytes_past_boundary(reference) != 0) [[unlikely]] {
    add_parts<P, R, false>(policy, reference, size, by, &sums);
  } else {
    add_parts<P, R, true>(policy, reference, size, by, &sums);
  }
  __syncwarp();
  if (threadIdx.x == 0) write_partials(a, row, slice, policy, reference, size, sums, by);
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
  write_statistics<Real>(s, a.statistics, row);
  a.normalizers[row] = normalizers;
}

}  // namespace lit_did::cuda

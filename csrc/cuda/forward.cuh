// The forward: nine statistics of every row, in one pass over both rows.
//
// Computes   lit_did::RowStatistics of two [V] rows and what follows from it (row_statistics.h).
// Reads      every entry of both rows once; nothing of a row whose label is ignored.
// Writes     one RowStatistics a split; then nine statistics and five normalizers a row.
// Threads    one block a split of a row. A thread adds its chunks to sums of its own, whose origins its warp moves. In
//            the end a warp adds its lanes' sums by shuffles, and one merge in shared memory makes the split's. Then a
//            thread a row.
// Bits       The order of every addition follows from V alone: not from addresses, the number of rows or the device.
#pragma once

#include "entries.cuh"

namespace lit_did::cuda {

constexpr int kForwardThreads = 256;
// Blocks that the registers of a multiprocessor hold: three hide the latency of memory, doubles leave room for two.
template <typename Real>
constexpr int kForwardBlocks = sizeof(Real) == 4 ? 3 : 2;
// Entries that one partial RowStatistics covers: enough chunks a thread to pay for the merge.
constexpr int kForwardSplit = kEntriesABlock;

// How far (as a power of 2) entries may rise above an origin before the sums are brought to another one. Exponentials
// stay far from overflow, and the rounding of an exponent that near to 0 is no larger than that of 2^x.
constexpr int kSlack = 4;

// A thread's sums, with the largest logits that its origins allow.
template <typename Real>
struct Accumulator {
  RowStatistics<Real, Real> sums;
  Real policy_limit = minus_infinity<Real>(), reference_limit = minus_infinity<Real>();
  Real difference_limit = minus_infinity<Real>();

  __device__ __forceinline__ void rebase(Real policy, Real reference, Real difference, const Scaling<Real>& by) {
    const Real p = larger(sums.policy_max, policy * by.scale);
    const Real r = larger(sums.reference_max, reference * by.scale);
    const Real d = larger(sums.difference_max, difference * by.scale);
    sums.rebase(p, r, d);
    policy_limit = smaller((p + kSlack) * by.inverse, by.limit);
    reference_limit = smaller((r + kSlack) * by.inverse, by.limit);
    difference_limit = (d + kSlack) * by.inverse;
  }

  // By all lanes of a warp together. `entries` of the chunk belong to the row; none where that is 0 or less.
  template <typename P, typename R, int kEntries>
  __device__ __forceinline__ void add(const Chunk<P, kEntries>& policy, const Chunk<R, kEntries>& reference,
                                      int entries, const Scaling<Real>& by) {
    Real z_max = policy[0], r_max = reference[0], d_max = Real(policy[0]) - Real(reference[0]);
    Real lowest = smaller(z_max, r_max);
#pragma unroll
    for (int i = 1; i < kEntries; ++i) {
      const Real z = policy[i], r = reference[i];
      z_max = larger(z_max, z);
      r_max = larger(r_max, r);
      d_max = larger(d_max, z - r);
      lowest = smaller(lowest, smaller(z, r));
    }
    // NaN passes unseen, and makes the sums NaN.
    const bool fits =
        z_max <= policy_limit && r_max <= reference_limit && d_max <= difference_limit && lowest >= -by.limit;
    // A branch that one lane takes costs the whole warp. So all lanes take it together, and move their origins to the
    // warp's maxima, above which their next chunks seldom rise.
    if (!__all_sync(kWholeWarp, fits || entries <= 0)) [[unlikely]] {
      const bool plain = entries > 0 && z_max <= by.limit && r_max <= by.limit && lowest >= -by.limit;
      const Real hole = minus_infinity<Real>();
      rebase(warp_maximum(plain ? z_max : hole), warp_maximum(plain ? r_max : hole), warp_maximum(plain ? d_max : hole),
             by);
      if (!plain) [[unlikely]] {
        if (entries > 0) add_carefully(policy, reference, entries, by);
        return;
      }
    } else if (entries <= 0) {
      return;
    }
    const Real z0 = sums.policy_max, r0 = sums.reference_max, d0 = sums.difference_max;
    const Real x0 = z0 - r0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const Real z = policy[i], r = reference[i], d = z - r;
      const Real log_z = multiply_add(z, by.scale, -z0), log_r = multiply_add(r, by.scale, -r0),
                 log_d = multiply_add(d, by.scale, -d0), x = multiply_add(d, by.scale, -x0);
      const Real w_z = fast_exp2(log_z), w_r = fast_exp2(log_r), w_d = fast_exp2(log_d);
      sums.policy_weight += w_z;
      sums.policy_log += w_z * log_z;
      sums.policy_log_ratio += w_z * x;
      sums.reference_weight += w_r;
      sums.reference_log += w_r * log_r;
      sums.reference_log_ratio += w_r * x;
      sums.difference_weight += w_d;
      sums.difference_log += w_d * log_d;
    }
  }

 private:
  // Entries that are infinite or NaN, or not there. `entries` of the chunk belong to the row.
  template <typename P, typename R, int kEntries>
  __device__ __forceinline__ void add_carefully(const Chunk<P, kEntries>& policy, const Chunk<R, kEntries>& reference,
                                                int entries, const Scaling<Real>& by) {
    const Real hole = minus_infinity<Real>();
    Real z_max = hole, r_max = hole, d_max = hole;
    bool invalid = false;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const Real z = effective_logit<Real>(policy[i], by.limit), r = effective_logit<Real>(reference[i], by.limit);
      if (!(z < -hole) || !(r < -hole)) {
        invalid = true;
        continue;
      }
      z_max = larger(z_max, z);
      r_max = larger(r_max, r);
      if (z > hole && r > hole) d_max = larger(d_max, z - r);
    }
    rebase(z_max, r_max, d_max, by);
    if (invalid) sums.policy_weight = -hole - -hole;
    const Real z0 = origin(sums.policy_max), r0 = origin(sums.reference_max), d0 = origin(sums.difference_max);
    const Real x0 = z0 - r0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const Real z = effective_logit<Real>(policy[i], by.limit), r = effective_logit<Real>(reference[i], by.limit);
      const bool z_inside = z > hole, r_inside = r > hole, d_inside = z_inside && r_inside;
      const Real d = d_inside ? z - r : Real(0), x = multiply_add(d, by.scale, -x0);
      if (i < entries && !d_inside)
        sums.flags |= kInfinite | (r_inside ? kPolicyHole : 0) | (z_inside ? kReferenceHole : 0);
      if (i < entries && !z_inside && !r_inside) sums.outside += 1;
      if (z_inside) {
        const Real log_z = multiply_add(z, by.scale, -z0), w_z = fast_exp2(log_z);
        sums.policy_weight += w_z;
        sums.policy_log += w_z * log_z;
        if (d_inside) sums.policy_log_ratio += w_z * x;
      }
      if (r_inside) {
        const Real log_r = multiply_add(r, by.scale, -r0), w_r = fast_exp2(log_r);
        sums.reference_weight += w_r;
        sums.reference_log += w_r * log_r;
        if (d_inside) sums.reference_log_ratio += w_r * x;
      }
      if (d_inside) {
        const Real log_d = multiply_add(d, by.scale, -d0), w_d = fast_exp2(log_d);
        sums.difference_weight += w_d;
        sums.difference_log += w_d * log_d;
      }
    }
  }
};

// The sum of the lanes' statistics, in every lane.
template <typename Real>
__device__ __forceinline__ RowStatistics<Real, Real> warp_merge(RowStatistics<Real, Real> sums) {
  sums.rebase(warp_maximum(sums.policy_max), warp_maximum(sums.reference_max), warp_maximum(sums.difference_max));
  sums.policy_weight = warp_sum(sums.policy_weight);
  sums.policy_log = warp_sum(sums.policy_log);
  sums.policy_log_ratio = warp_sum(sums.policy_log_ratio);
  sums.reference_weight = warp_sum(sums.reference_weight);
  sums.reference_log = warp_sum(sums.reference_log);
  sums.reference_log_ratio = warp_sum(sums.reference_log_ratio);
  sums.difference_weight = warp_sum(sums.difference_weight);
  sums.difference_log = warp_sum(sums.difference_log);
  sums.outside = warp_sum(sums.outside);
  sums.flags = warp_or(sums.flags);
  return sums;
}

// This thread's share of the `size` entries of a split. kAligned: its chunks lie on 16-byte boundaries on both sides.
template <typename P, typename R, bool kAligned, typename Real>
__device__ __forceinline__ void accumulate(const P* policy, const R* reference, int size, const Scaling<Real>& by,
                                           Accumulator<Real>& accumulator) {
  constexpr int kEntries = kChunk<P, R>;
  constexpr int kUnroll = kAligned ? 2 : 1;  // at least four loads in flight: an unaligned chunk takes two of each side
  constexpr int kStep = kForwardThreads * kEntries;
  const int policy_past = kAligned ? 0 : bytes_past_boundary(policy);
  const int reference_past = kAligned ? 0 : bytes_past_boundary(reference);
#pragma unroll 1
  for (int begin = 0; begin < size; begin += kUnroll * kStep) {
    const int at = begin + static_cast<int>(threadIdx.x) * kEntries;
    Chunk<P, kEntries> z[kUnroll];
    Chunk<R, kEntries> r[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      z[u] = load_chunk<P, kEntries, kAligned, true>(policy, at + u * kStep, size, policy_past);
      r[u] = load_chunk<R, kEntries, kAligned, true>(reference, at + u * kStep, size, reference_past);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) accumulator.add(z[u], r[u], size - at - u * kStep, by);
  }
}

// The statistics of one split, in every lane of the first warp.
template <typename P, typename R, typename Real>
__device__ __forceinline__ RowStatistics<Real, Real> split_statistics(const P* policy, const R* reference, int size,
                                                                      const Scaling<Real>& by) {
  Accumulator<Real> accumulator;
  if (bytes_past_boundary(policy) == 0 && bytes_past_boundary(reference) == 0) {
    accumulate<P, R, true>(policy, reference, size, by, accumulator);
  } else [[unlikely]] {
    accumulate<P, R, false>(policy, reference, size, by, accumulator);
  }

  constexpr int kWarps = kForwardThreads / kWarp;
  using Sums = RowStatistics<Real, Real>;
  alignas(Sums) __shared__ unsigned char memory[kWarps * sizeof(Sums)];  // shared memory runs no constructors
  Sums* of_warps = reinterpret_cast<Sums*>(memory);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const Sums sums = warp_merge(accumulator.sums);
  if (lane == 0) of_warps[warp] = sums;
  __syncthreads();
  if (warp != 0) return {};
  return warp_merge(lane < kWarps ? of_warps[lane] : Sums{});
}

template <typename Real>
__device__ __forceinline__ RowStatistics<Real, double> to_double(const RowStatistics<Real, Real>& sums) {
  RowStatistics<Real, double> result;
  result.policy_max = sums.policy_max;
  result.reference_max = sums.reference_max;
  result.difference_max = sums.difference_max;
  result.policy_weight = sums.policy_weight;
  result.policy_log = sums.policy_log;
  result.policy_log_ratio = sums.policy_log_ratio;
  result.reference_weight = sums.reference_weight;
  result.reference_log = sums.reference_log;
  result.reference_log_ratio = sums.reference_log_ratio;
  result.difference_weight = sums.difference_weight;
  result.difference_log = sums.difference_log;
  result.outside = sums.outside;
  result.flags = sums.flags;
  return result;
}

template <typename Real>
__device__ __forceinline__ void write_statistics(const ForwardArguments& a, int64_t row,
                                                 const TokenStatistics<Real>& s) {
  const Real values[kNumStatistics] = {s.policy_logprob,
                                       s.reference_logprob,
                                       s.token_did_entropy,
                                       s.token_did_concentration,
                                       s.token_did_log_partition,
                                       s.policy_entropy,
                                       s.reference_entropy,
                                       s.kl,
                                       s.reverse_kl};
#pragma unroll
  for (int i = 0; i < kNumStatistics; ++i) static_cast<Real*>(a.statistics[i])[row] = values[i];
}

// By one thread a row. A label out of range has log-probabilities NaN: raising would need a synchronisation.
template <typename P, typename R, typename Real>
__device__ __forceinline__ void finish_row(const ForwardArguments& a, int64_t row, const P* policy, const R* reference,
                                           const RowStatistics<Real, double>& sums, const Scaling<Real>& by) {
  const int64_t label = a.problem.labels[row];
  double at_policy = std::numeric_limits<double>::quiet_NaN(), at_reference = at_policy;
  if (label >= 0 && label < a.problem.vocabulary) {
    at_policy = effective_logit<Real>(load_entry(policy + label), by.limit) * double(by.scale);
    at_reference = effective_logit<Real>(load_entry(reference + label), by.limit) * double(by.scale);
  }
  RowNormalizers normalizers;
  write_statistics<Real>(a, row, sums.finish(a.problem.vocabulary, at_policy, at_reference, &normalizers));
  a.normalizers[row] = normalizers;
}

// One block a split: block row * splits + split. Its sums go to the workspace [rows, splits].
template <typename P, typename R>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<typename RealOf<P>::type>)
    forward_kernel(const ForwardArguments a, const Scaling<typename RealOf<P>::type> by, int splits) {
  using Real = typename RealOf<P>::type;
  const int64_t row = blockIdx.x / splits, split = blockIdx.x % splits;
  if (a.problem.labels[row] == a.problem.ignore_index) return;
  const int64_t begin = split * kForwardSplit, rest = a.problem.vocabulary - begin;
  const auto sums = split_statistics<P, R, Real>(row_of<const P>(a.problem.policy, row) + begin,
                                                 row_of<const R>(a.problem.reference, row) + begin,
                                                 rest < kForwardSplit ? static_cast<int>(rest) : kForwardSplit, by);
  if (threadIdx.x == 0) static_cast<RowStatistics<Real, Real>*>(a.workspace)[blockIdx.x] = sums;
}

// Merges the splits of each row, in their order, and finishes it. One thread a row.
template <typename P, typename R>
__global__ void __launch_bounds__(kWarp)
    finish_kernel(const ForwardArguments a, const Scaling<typename RealOf<P>::type> by, int splits) {
  using Real = typename RealOf<P>::type;
  const int64_t row = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  if (row >= a.problem.rows) return;
  if (a.problem.labels[row] == a.problem.ignore_index) {
    write_statistics<Real>(a, row, {});
    a.normalizers[row] = {};
    return;
  }
  const auto* partial = static_cast<const RowStatistics<Real, Real>*>(a.workspace) + row * splits;
  RowStatistics<Real, double> whole = to_double(partial[0]);
  for (int i = 1; i < splits; ++i) whole.merge(to_double(partial[i]));
  finish_row<P, R, Real>(a, row, row_of<const P>(a.problem.policy, row), row_of<const R>(a.problem.reference, row),
                         whole, by);
}

}  // namespace lit_did::cuda

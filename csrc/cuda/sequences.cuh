// The per-sequence reduction: sums and means of the token statistics over each sequence's labelled tokens.
//
// Reads      nine numbers and the label of every token once.
// Writes     ten numbers and a count a sequence.
// Threads    one block a sequence. Its tokens are dealt to kSequenceLanes lanes in turn. A lane adds what it gets, with
//            several loads under way at a time. Then its warp adds the lanes, and a thread a sum adds the warps. Sums
//            are in double.
// Bits       The order of every addition follows from the sequence's length alone: where sequences are many, a block
//            has fewer threads, which play one lane after another.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace lit_did::cuda {

constexpr int kSequenceLanes = 512;
// A block's threads. A multiprocessor holds few large blocks, so that they are for few sequences.
constexpr int kThreadsForFew = kSequenceLanes, kThreadsForMany = 128;
constexpr int kManySequences = 256;
// The statistics in their order, then the log-ratio and the number of tokens.
constexpr int kLogRatio = kNumStatistics, kCount = kNumStatistics + 1, kSequenceSums = kNumStatistics + 2;

// Adds every kSequenceLanes-th token from `first` on. kUnroll tokens' numbers are loaded at a time.
template <typename Real, int kUnroll>
__device__ __forceinline__ void add_tokens(const SequenceArguments& a, int64_t first, int64_t end,
                                           double (&sums)[kSequenceSums]) {
#pragma unroll 1
  for (; first < end; first += kUnroll * kSequenceLanes) {
    Real values[kUnroll][kNumStatistics];
    int64_t labels[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t token = first + u * kSequenceLanes;
      labels[u] = a.ignore_index;
      if (token < end) {
        labels[u] = a.labels[token];
#pragma unroll
        for (int i = 0; i < kNumStatistics; ++i) values[u][i] = static_cast<const Real*>(a.statistics[i])[token];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (labels[u] == a.ignore_index) continue;
#pragma unroll
      for (int i = 0; i < kNumStatistics; ++i) sums[i] += double(values[u][i]);
      sums[kLogRatio] += double(values[u][0]) - double(values[u][1]);
      sums[kCount] += 1;
    }
  }
}

template <typename Real, int kThreads>
__global__ void __launch_bounds__(kThreads) sequence_kernel(const SequenceArguments a) {
  constexpr int kUnroll = sizeof(Real) == 4 && kThreads == kThreadsForFew ? 4 : 2;
  const int64_t sequence = blockIdx.x;
  // The host does not read the offsets: what lies beyond the tokens is cut off.
  const auto clamped = [&](int64_t offset) { return offset < 0 ? 0 : offset > a.tokens ? a.tokens : offset; };
  const int64_t begin = a.cu_seqlens ? clamped(a.cu_seqlens[sequence]) : sequence * a.length;
  const int64_t end = a.cu_seqlens ? clamped(a.cu_seqlens[sequence + 1]) : begin + a.length;

  __shared__ double of_warps[kSequenceSums][kSequenceLanes / kWarp], totals[kSequenceSums];
  const int thread = static_cast<int>(threadIdx.x), lane_of_warp = thread % kWarp;
  int warps = 0;  // that have tokens
#pragma unroll 1
  for (int lanes = 0; lanes < kSequenceLanes && begin + lanes < end; lanes += kWarp, ++warps) {
    if (lanes % kThreads != thread - lane_of_warp) continue;
    double sums[kSequenceSums] = {};
    add_tokens<Real, kUnroll>(a, begin + lanes + lane_of_warp, end, sums);
    double eight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) eight[i] = sums[i];
    const double of_eight = warp_sums(eight);
    if (lane_of_warp % 4 == 0) of_warps[lane_of_warp / 4][warps] = of_eight;
#pragma unroll
    for (int i = 8; i < kSequenceSums; ++i) {
      const double sum = warp_sum(sums[i]);
      if (lane_of_warp == 0) of_warps[i][warps] = sum;
    }
  }
  __syncthreads();
  if (thread >= kWarp) return;
  if (thread < kSequenceSums) {
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += of_warps[thread][w];
    totals[thread] = sum;
  }
  __syncwarp();
  // A thread a number of SequenceStatistics, whose order is another; means from the fourth to the ninth.
  if (thread < kNumSequenceStatistics) {
    const int of = thread < 2 ? thread : thread == 2 ? kLogRatio : thread < 5 ? thread - 1 : thread < 9 ? thread : 4;
    const double divisor = thread >= 3 && thread < 9 && totals[kCount] > 0 ? totals[kCount] : 1;
    static_cast<Real*>(a.outputs[thread])[sequence] = Real(totals[of] / divisor);
  }
  if (thread == 0) a.num_tokens[sequence] = static_cast<int64_t>(totals[kCount]);
}

}  // namespace lit_did::cuda

// The per-sequence reduction: sums and means of the token statistics over each sequence's labelled tokens.
//
// Reads      nine numbers and the label of every token once.
// Writes     ten numbers and a count a sequence.
// Threads    one block a sequence; sums in double, added in an order that follows from the sequence's length alone.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace lit_did::cuda {

constexpr int kSequenceThreads = 128;

template <typename Real>
__global__ void __launch_bounds__(kSequenceThreads) sequence_kernel(const SequenceArguments a) {
  constexpr int kWarps = kSequenceThreads / kWarp;
  const int64_t sequence = blockIdx.x;
  // The host does not read the offsets: what lies beyond the tokens is cut off.
  const auto clamped = [&](int64_t offset) { return offset < 0 ? 0 : offset > a.tokens ? a.tokens : offset; };
  const int64_t begin = a.cu_seqlens ? clamped(a.cu_seqlens[sequence]) : sequence * a.length;
  const int64_t end = a.cu_seqlens ? clamped(a.cu_seqlens[sequence + 1]) : begin + a.length;

  double sums[kNumStatistics] = {}, log_ratio = 0, count = 0;
  for (int64_t token = begin + threadIdx.x; token < end; token += kSequenceThreads) {
    if (a.labels[token] == a.ignore_index) continue;
    double values[kNumStatistics];
#pragma unroll
    for (int i = 0; i < kNumStatistics; ++i) values[i] = static_cast<const Real*>(a.statistics[i])[token];
#pragma unroll
    for (int i = 0; i < kNumStatistics; ++i) sums[i] += values[i];
    log_ratio += values[0] - values[1];
    count += 1;
  }

  __shared__ double of_warps[kNumStatistics + 2][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int i = 0; i < kNumStatistics + 2; ++i) {
    const double sum = warp_sum(i < kNumStatistics ? sums[i] : i == kNumStatistics ? log_ratio : count);
    if (threadIdx.x % kWarp == 0) of_warps[i][warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const auto total = [&](int i) {
    double sum = of_warps[i][0];
    for (int w = 1; w < kWarps; ++w) sum += of_warps[i][w];
    return sum;
  };
  const double tokens = total(kNumStatistics + 1), divisor = tokens > 0 ? tokens : 1;
  const auto write = [&](int i, double value) { static_cast<Real*>(a.outputs[i])[sequence] = Real(value); };
  // From the order of TokenStatistics to that of SequenceStatistics.
  write(0, total(0));
  write(1, total(1));
  write(2, total(kNumStatistics));
  write(3, total(2) / divisor);
  write(4, total(3) / divisor);
  write(5, total(5) / divisor);
  write(6, total(6) / divisor);
  write(7, total(7) / divisor);
  write(8, total(8) / divisor);
  write(9, total(4));
  a.num_tokens[sequence] = static_cast<int64_t>(tokens);
}

}  // namespace lit_did::cuda

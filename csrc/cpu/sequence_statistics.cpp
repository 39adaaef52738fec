// sequence_reduction on the CPU.
//
// Computes   ten sums or means and a count a sequence, of nine statistics a token.
// Reads      labels and statistics once, tokens in their order; statistics of ignored tokens not at all.
// Threads    none: a token here costs nanoseconds, its two rows of logits before that microseconds.
#include "../sequence_statistics.h"

#include <algorithm>
#include <array>

namespace lit_did {
namespace {

void check_offsets(const Tensor& cu_seqlens, int64_t tokens) {
  const int64_t* offset = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t* end = offset + cu_seqlens.numel();
  need(offset[0] == 0 && end[-1] == tokens && std::is_sorted(offset, end),
       "`cu_seqlens` that rise from 0 to the number of tokens");
}

// `first(s)` is sequence s's first token and the end of the one before it.
template <typename Real, typename First>
void reduce(const TensorList& statistics, const Tensor& labels, int64_t ignore_index, int64_t num_sequences,
            const First& first, const TensorList& outputs, const Tensor& num_tokens) {
  std::array<const Real*, kNumTokenStatistics> at;
  for (int i = 0; i < kNumTokenStatistics; ++i) at[i] = statistics[i].const_data_ptr<Real>();
  const auto& [policy_logprob, reference_logprob, token_did_entropy, token_did_concentration, token_did_log_partition,
               policy_entropy, reference_entropy, kl, reverse_kl] = at;
  std::array<Real*, kNumSequenceStatistics> output;
  for (int i = 0; i < kNumSequenceStatistics; ++i) output[i] = outputs[i].mutable_data_ptr<Real>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  int64_t* counts = num_tokens.mutable_data_ptr<int64_t>();

  for (int64_t s = 0; s < num_sequences; ++s) {
    std::array<double, kNumSequenceStatistics> sum{};
    int64_t count = 0;
    for (int64_t t = first(s); t < first(s + 1); ++t) {
      if (label[t] == ignore_index) continue;
      const double policy = policy_logprob[t], reference = reference_logprob[t];
      const double terms[] = {policy,
                              reference,
                              policy - reference,
                              token_did_entropy[t],
                              token_did_concentration[t],
                              policy_entropy[t],
                              reference_entropy[t],
                              kl[t],
                              reverse_kl[t],
                              token_did_log_partition[t]};
      for (int i = 0; i < kNumSequenceStatistics; ++i) sum[i] += terms[i];
      ++count;
    }
    counts[s] = count;
    for (int i = 0; i < kNumSequenceStatistics; ++i) {
      const bool is_mean = i >= 3 && i <= 8;
      output[i][s] = static_cast<Real>(is_mean ? sum[i] / std::max<int64_t>(count, 1) : sum[i]);
    }
  }
}

}  // namespace

SequenceTensors sequence_reduction_cpu(const TensorList& statistics_, const Tensor& labels_,
                                       const std::optional<Tensor>& cu_seqlens_, int64_t ignore_index) {
  check_sequence_arguments(statistics_, labels_, cu_seqlens_);
  const Tensor labels = as_contiguous(labels_);
  TensorList statistics;
  for (const Tensor& statistic : statistics_) statistics.push_back(as_contiguous(statistic));

  const int64_t length = labels.sizes().back();
  std::optional<Tensor> cu_seqlens;
  if (cu_seqlens_) {
    cu_seqlens = as_contiguous(*cu_seqlens_);
    check_offsets(*cu_seqlens, length);
  }
  const int64_t* offset = cu_seqlens ? cu_seqlens->const_data_ptr<int64_t>() : nullptr;
  const auto first = [&](int64_t s) { return offset ? offset[s] : s * length; };

  const auto sizes = sequence_sizes(labels, cu_seqlens);
  const auto dtype = statistics[0].scalar_type();
  const Tensor num_tokens = empty(sizes, ScalarType::Long, labels);
  TensorList out;
  for (int i = 0; i < kNumSequenceStatistics; ++i) out.push_back(empty(sizes, dtype, labels));
  const auto run = dtype == ScalarType::Double ? reduce<double, decltype(first)> : reduce<float, decltype(first)>;
  run(statistics, labels, ignore_index, num_tokens.numel(), first, out, num_tokens);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], out[9], num_tokens};
}

}  // namespace lit_did

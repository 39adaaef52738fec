// What both forwards on the CPU return: nine statistics and the normalizers of every row.
#pragma once

#include "../token_statistics.h"

namespace lit_did {

struct Outputs {
  std::array<at::Tensor, kNumStatistics> statistics;
  at::Tensor normalizers;

  // Zeros, which is what ignored rows keep. `dtype`: float32 or float64.
  Outputs(at::IntArrayRef sizes, at::ScalarType dtype) {
    for (auto& tensor : statistics) tensor = at::zeros(sizes, dtype);
    auto normalizer_sizes = sizes.vec();
    normalizer_sizes.push_back(kNumNormalizers);
    normalizers = at::zeros(normalizer_sizes, at::kDouble);
  }

  TokenTensors tensors() const {
    const auto& s = statistics;
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], normalizers};
  }
};

// Writes rows of `Outputs` with statistics of dtype `Real`.
template <typename Real>
class RowWriter {
 public:
  explicit RowWriter(const Outputs& outputs)
      : normalizers_(reinterpret_cast<RowNormalizers*>(outputs.normalizers.data_ptr<double>())) {
    for (int i = 0; i < kNumStatistics; ++i) statistics_[i] = outputs.statistics[i].data_ptr<Real>();
  }

  template <typename Computed>
  void operator()(int64_t row, const TokenStatistics<Computed>& s, const RowNormalizers& normalizers) const {
    const Computed values[] = {s.policy_logprob,
                               s.reference_logprob,
                               s.token_did_entropy,
                               s.token_did_concentration,
                               s.token_did_log_partition,
                               s.policy_entropy,
                               s.reference_entropy,
                               s.kl,
                               s.reverse_kl};
    for (int i = 0; i < kNumStatistics; ++i) statistics_[i][row] = static_cast<Real>(values[i]);
    normalizers_[row] = normalizers;
  }

 private:
  std::array<Real*, kNumStatistics> statistics_;
  RowNormalizers* normalizers_;
};

}  // namespace lit_did

// What both forwards on the CPU return: nine statistics and the normalizers of every row.
#pragma once

#include <cstring>

#include "../token_statistics.h"

namespace lit_did {

inline Tensor zeros(Sizes sizes, ScalarType dtype, const Tensor& on_device_of) {
  const Tensor tensor = empty(sizes, dtype, on_device_of);
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
  return tensor;
}

struct Outputs {
  TensorList statistics;
  Tensor normalizers;

  // Zeros, which is what ignored rows keep. `dtype`: float32 or float64.
  Outputs(const Tensor& labels, ScalarType dtype)
      : normalizers(zeros(normalizer_sizes(labels.sizes()), ScalarType::Double, labels)) {
    for (int i = 0; i < kNumStatistics; ++i) statistics.push_back(zeros(labels.sizes(), dtype, labels));
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
      : normalizers_(reinterpret_cast<RowNormalizers*>(outputs.normalizers.mutable_data_ptr<double>())) {
    for (int i = 0; i < kNumStatistics; ++i) statistics_[i] = outputs.statistics[i].mutable_data_ptr();
  }

  template <typename Computed>
  void operator()(int64_t row, const TokenStatistics<Computed>& s, const RowNormalizers& normalizers) const {
    write_statistics<Real>(s, statistics_.data(), row);
    normalizers_[row] = normalizers;
  }

 private:
  std::array<void*, kNumStatistics> statistics_;
  RowNormalizers* normalizers_;
};

}  // namespace lit_did

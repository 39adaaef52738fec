// merge_token_partials_ and finish_token_partials on the CPU.
//
// Computes   what several slices of a vocabulary say together, in their order, and the statistics that follow.
// Reads      16 numbers a row and slice.
// Threads    share the rows.
#include "outputs.h"

namespace lit_did {
namespace {

// Calls `use(row, partials)` with what the slices [slices, rows, 16] of each row whose label counts say together.
template <typename Use>
void each_merged(const Tensor& partials, const Tensor& labels_, int64_t ignore_index, const Use& use) {
  check_slices(partials, labels_);
  const Tensor labels = as_contiguous(labels_);
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const auto* partial = reinterpret_cast<const RowPartials*>(partials.const_data_ptr<double>());
  const int64_t slices = partials.size(0), rows = labels.numel();
  constexpr int64_t kRowsAThread = 64;  // some microseconds
  torch::stable::parallel_for(0, rows, kRowsAThread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (label[row] == ignore_index) continue;
      RowPartials whole = partial[row];
      for (int64_t slice = 1; slice < slices; ++slice) whole = merged(whole, partial[slice * rows + row]);
      use(row, whole);
    }
  });
}

template <typename Real>
void finish(const Tensor& partials, const Tensor& labels, int64_t ignore_index, const Outputs& outputs) {
  const RowWriter<Real> write(outputs);
  each_merged(partials, labels, ignore_index, [&](int64_t row, const RowPartials& whole) {
    RowNormalizers normalizers;
    const auto statistics = whole.finish(&normalizers);
    write(row, statistics, normalizers);
  });
}

}  // namespace

void merge_token_partials_cpu(const Tensor& partials, const Tensor& labels, int64_t ignore_index) {
  auto* first = static_cast<RowPartials*>(partials.mutable_data_ptr());
  each_merged(partials, labels, ignore_index, [&](int64_t row, const RowPartials& whole) { first[row] = whole; });
}

TokenTensors finish_token_partials_cpu(const Tensor& partials, const Tensor& labels, int64_t ignore_index,
                                       bool float64) {
  const Outputs outputs(labels, float64 ? ScalarType::Double : ScalarType::Float);
  (float64 ? finish<double> : finish<float>)(partials, labels, ignore_index, outputs);
  return outputs.tensors();
}

}  // namespace lit_did

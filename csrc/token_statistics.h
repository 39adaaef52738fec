// The operators' shared checks and their implementations a device, behind the schemas in operators.cpp.
#pragma once

#include <array>
#include <optional>

#include "row_partials.h"
#include "tensors.h"

namespace lit_did {

// Nine statistics and the normalizers [..., 5] that the backward reads.
using TokenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// policy_logits, reference_logits [..., V], contiguous in V; labels [...] int64. `inplace_backward` is for autograd,
// which keeps it for the backward; the forward does the same either way.
TokenTensors token_statistics_cpu(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels,
                                  int64_t ignore_index, double temperature, bool inplace_backward);

// grads, statistics: nine tensors [...], an absent gradient for a statistic that was not used. Returns the
// gradients in the logits' dtypes; an empty tensor for a side that needs none.
std::tuple<Tensor, Tensor> token_statistics_backward_cpu(const OptionalTensorList& grads, const Tensor& policy_logits,
                                                         const Tensor& reference_logits, const Tensor& labels,
                                                         const TensorList& statistics, const Tensor& normalizers,
                                                         int64_t ignore_index, double temperature,
                                                         bool policy_needs_grad, bool reference_needs_grad);

// The same gradients, bit for bit, each written over its side's logits; a side that needs none is left alone. The
// logits may be a slice of the vocabulary that begins at `first_entry`, while labels count from the whole vocabulary's
// first. With a softcap c, a side's logits are c tanh(x / c), and the gradient is that in x.
void token_statistics_backward_inplace_cpu(const OptionalTensorList& grads, const Tensor& policy_logits,
                                           const Tensor& reference_logits, const Tensor& labels,
                                           const TensorList& statistics, const Tensor& normalizers,
                                           int64_t ignore_index, double temperature, bool policy_needs_grad,
                                           bool reference_needs_grad, int64_t first_entry,
                                           std::optional<double> policy_softcap,
                                           std::optional<double> reference_softcap);

// Writes RowPartials of slices of the vocabulary, of `slice_entries` each, which lie one after the other from
// `first_entry` on, to `partials` [slices, rows, 16] float64, but for ignored rows. Labels [rows] count from the whole
// vocabulary's first entry and may lie outside.
void token_partials_cpu(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels,
                        const Tensor& partials, int64_t slice_entries, int64_t first_entry, int64_t ignore_index,
                        double temperature);

// Merges the slices of `partials` [slices, rows, 16] into the first.
void merge_token_partials_cpu(const Tensor& partials, const Tensor& labels, int64_t ignore_index);

// The statistics of all slices together, float32 or float64; 0 for ignored rows.
TokenTensors finish_token_partials_cpu(const Tensor& partials, const Tensor& labels, int64_t ignore_index,
                                       bool float64);

// What the kernels take instead of softcaps: their reciprocals, 0 for none. Raises if one is not positive.
struct InverseSoftcaps {
  double policy = 0, reference = 0;

  InverseSoftcaps() = default;
  InverseSoftcaps(std::optional<double> policy_softcap, std::optional<double> reference_softcap);
};

// What both devices demand of their input. Raises where it does not fit.
void check_token_arguments(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels,
                           double temperature);

// `partials` of shape [slices, rows, 16] for labels [rows]: float64, contiguous but for the first dimension, and as
// many as it takes to cover the entries.
void check_partials(const Tensor& partials, const Tensor& labels, int64_t entries, int64_t slice_entries);

// The same, contiguous, of one slice or more.
void check_slices(const Tensor& partials, const Tensor& labels);

// What the backward reads besides the logits: contiguous; no gradient for a statistic that was not used.
struct BackwardTensors {
  OptionalTensorList grads;
  TensorList statistics;
  Tensor labels, normalizers;
};

// Raises where numbers or shapes do not fit.
BackwardTensors check_backward_arguments(const OptionalTensorList& grads, const Tensor& labels,
                                         const TensorList& statistics, const Tensor& normalizers);

// The dtype of the statistics: float64 for float64 logits, otherwise float32.
ScalarType statistics_dtype(const Tensor& logits);

// The shape of the normalizers of labels [...]: [..., 5].
std::vector<int64_t> normalizer_sizes(Sizes labels);

}  // namespace lit_did

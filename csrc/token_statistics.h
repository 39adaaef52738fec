// The operators' shared checks and their implementations a device, behind the schemas in bindings.cpp.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "row_partials.h"
#include "scalar_types.h"

namespace lit_did {

// Nine statistics and the normalizers [..., 5] that the backward reads.
using TokenTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                at::Tensor, at::Tensor, at::Tensor>;

// policy_logits, reference_logits [..., V], contiguous in V; labels [...] int64. `inplace_backward` is for autograd,
// which keeps it for the backward; the forward does the same either way.
TokenTensors token_statistics_cpu(const at::Tensor& policy_logits, const at::Tensor& reference_logits,
                                  const at::Tensor& labels, int64_t ignore_index, double temperature,
                                  bool inplace_backward);

// grads, statistics: nine tensors [...], an absent gradient for a statistic that was not used. Returns the
// gradients in the logits' dtypes; an empty tensor for a side that needs none.
std::tuple<at::Tensor, at::Tensor> token_statistics_backward_cpu(const c10::List<std::optional<at::Tensor>>& grads,
                                                                 const at::Tensor& policy_logits,
                                                                 const at::Tensor& reference_logits,
                                                                 const at::Tensor& labels, at::TensorList statistics,
                                                                 const at::Tensor& normalizers, int64_t ignore_index,
                                                                 double temperature, bool policy_needs_grad,
                                                                 bool reference_needs_grad);

// The same gradients, bit for bit, each written over its side's logits; a side that needs none is left alone. The
// logits may be a slice of the vocabulary that begins at `first_entry`, while labels count from the whole vocabulary's
// first.
void token_statistics_backward_inplace_cpu(const c10::List<std::optional<at::Tensor>>& grads,
                                           const at::Tensor& policy_logits, const at::Tensor& reference_logits,
                                           const at::Tensor& labels, at::TensorList statistics,
                                           const at::Tensor& normalizers, int64_t ignore_index, double temperature,
                                           bool policy_needs_grad, bool reference_needs_grad, int64_t first_entry);

// Writes RowPartials of slices of the vocabulary, of `slice_entries` each, which lie one after the other from
// `first_entry` on, to `partials` [slices, rows, 16] float64, but for ignored rows. Labels [rows] count from the whole
// vocabulary's first entry and may lie outside.
void token_partials_cpu(const at::Tensor& policy_logits, const at::Tensor& reference_logits, const at::Tensor& labels,
                        const at::Tensor& partials, int64_t slice_entries, int64_t first_entry, int64_t ignore_index,
                        double temperature);

// Merges the slices of `partials` [slices, rows, 16] into the first.
void merge_token_partials_cpu(const at::Tensor& partials, const at::Tensor& labels, int64_t ignore_index);

// The statistics of all slices together, float32 or float64; 0 for ignored rows.
TokenTensors finish_token_partials_cpu(const at::Tensor& partials, const at::Tensor& labels, int64_t ignore_index,
                                       bool float64);

// What both devices demand of their input. Raises ValueError with the argument's name.
void check_token_arguments(const at::Tensor& policy_logits, const at::Tensor& reference_logits,
                           const at::Tensor& labels, double temperature);

// `partials` of shape [slices, rows, 16] for labels [rows]: float64, contiguous but for the first dimension, and as
// many as it takes to cover the entries.
void check_partials(const at::Tensor& partials, const at::Tensor& labels, int64_t entries, int64_t slice_entries);

// The same, contiguous, of one slice or more.
void check_slices(const at::Tensor& partials, const at::Tensor& labels);

// What the backward reads besides the logits: contiguous; an undefined gradient for a statistic that was not used.
struct BackwardTensors {
  std::array<at::Tensor, kNumStatistics> grads, statistics;
  at::Tensor labels, normalizers;
};

// Raises ValueError with the argument's name where numbers or shapes do not fit.
BackwardTensors check_backward_arguments(const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& labels,
                                         at::TensorList statistics, const at::Tensor& normalizers);

// For the backward in place, before anything is written: each logit to be written must be the only one at its
// address, else ValueError. Bumps the written logits' versions, so that autograd refuses other uses of their values.
void claim_logits(const at::Tensor& policy_logits, const at::Tensor& reference_logits, bool write_policy,
                  bool write_reference);

// The dtype of checked logits, for the kernels.
ScalarKind kind_of(const at::Tensor& logits);

// The dtype of the statistics: float64 for float64 logits, otherwise float32.
at::ScalarType statistics_dtype(const at::Tensor& logits);

namespace cpu {
// Instruction-set levels in this build, lowest first, and the one in use (the best that the processor has, or a
// lower one that LIT_DID_SIMD names).
std::vector<std::string> simd_levels();
std::string simd_level();
}  // namespace cpu

}  // namespace lit_did

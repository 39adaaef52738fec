// The sums and means of token statistics over sequences: check, implementations a device; schema in bindings.cpp.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace lit_did {

constexpr int kNumTokenStatistics = 9;
constexpr int kNumSequenceStatistics = 10;  // and num_tokens

// The fields of SequenceStatistics in its order: ten in the token statistics' dtype, num_tokens int64.
using SequenceTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                   at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// statistics: nine tensors [..., T], float32 or float64, in TokenStatistics' order; labels [..., T] int64.
// cu_seqlens: [S + 1] int64, with statistics and labels [tokens]; without it the last dimension is one sequence.
// Sums in float64 over the tokens whose label is not ignore_index, in one fixed order: a sequence's bits depend on
// those tokens alone, on the CPU whatever the layout. log_ratio sums policy_logprob - reference_logprob token by token;
// entropies, concentrations and divergences are divided by num_tokens. A sequence without tokens is 0.
SequenceTensors sequence_reduction_cpu(at::TensorList statistics, const at::Tensor& labels,
                                       const std::optional<at::Tensor>& cu_seqlens, int64_t ignore_index);

// What both devices demand of shapes, dtypes and devices. Raises ValueError with the argument's name.
void check_sequence_arguments(at::TensorList statistics, const at::Tensor& labels,
                              const std::optional<at::Tensor>& cu_seqlens);

}  // namespace lit_did

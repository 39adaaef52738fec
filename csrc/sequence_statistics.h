// The sums and means of token statistics over sequences: check, implementations a device; schema in operators.cpp.
#pragma once

#include "tensors.h"

namespace lit_did {

constexpr int kNumTokenStatistics = 9;
constexpr int kNumSequenceStatistics = 10;  // and num_tokens

// The fields of SequenceStatistics in its order: ten in the token statistics' dtype, num_tokens int64.
using SequenceTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// statistics: nine tensors [..., T], float32 or float64, in TokenStatistics' order; labels [..., T] int64.
// cu_seqlens: [S + 1] int64, with statistics and labels [tokens]; without it the last dimension is one sequence.
// Sums in float64 over the tokens whose label is not ignore_index, in one fixed order: a sequence's bits depend on
// those tokens alone, on the CPU whatever the layout. log_ratio sums policy_logprob - reference_logprob token by token;
// entropies, concentrations and divergences are divided by num_tokens. A sequence without tokens is 0.
SequenceTensors sequence_reduction_cpu(const TensorList& statistics, const Tensor& labels,
                                       const std::optional<Tensor>& cu_seqlens, int64_t ignore_index);

// The shape of the results: [sequences], or [...] without `cu_seqlens`.
std::vector<int64_t> sequence_sizes(const Tensor& labels, const std::optional<Tensor>& cu_seqlens);

// What both devices demand of shapes, dtypes and devices. Raises where they do not fit.
void check_sequence_arguments(const TensorList& statistics, const Tensor& labels,
                              const std::optional<Tensor>& cu_seqlens);

}  // namespace lit_did

// What the CUDA kernels offer to the operators: plain structs of device pointers and functions that launch on a stream.
// No torch here; token_statistics.cpp and sequence_statistics.cpp make these arguments from tensors.
//
// Nothing here allocates, synchronises or reads device memory on the host, so that CUDA graphs can capture it.
#pragma once

#include <cstdint>

#include "../row_statistics.h"
#include "../scalar_types.h"

#if defined(LIT_DID_CUDA_EMULATION)
#include "emulation.h"  // see device.cuh
#else
#include <cuda_runtime_api.h>
#endif

namespace lit_did::cuda {

// Entries of a row that one block of the backward takes.
constexpr int kEntriesABlock = 32768;
// The forward's sums are cut here, wherever the row is cut into blocks. A multiple of what a warp takes in one turn.
constexpr int kPartEntries = 4096;
// Parts that a block of the forward takes, one after the other: enough to pay for its start and its end.
constexpr int kPartsABlock = 4;

constexpr int parts_of(int64_t vocabulary) { return static_cast<int>((vocabulary + kPartEntries - 1) / kPartEntries); }

// Where the rows of [..., V] logits lie: sizes and strides (in entries) of the leading dimensions, outermost first.
constexpr int kMaxLeadingDims = 8;
struct RowLayout {
  int dims;
  int64_t sizes[kMaxLeadingDims], strides[kMaxLeadingDims];
};

struct Logits {
  void* data;  // contiguous in V, aligned to an entry
  ScalarKind kind;
  RowLayout layout;
};

// The rows that a kernel works on.
struct Problem {
  Logits policy, reference;  // both float64 or neither
  const int64_t* labels;     // [rows]
  int64_t rows, vocabulary, ignore_index;
  double temperature;
  // Where the logits are a slice of the vocabulary, its first entry: labels count from the whole vocabulary's first.
  int64_t first_entry;
};

// The statistics [rows] in the order of lit_did.TokenStatistics: float, or double where the logits are.
struct ForwardArguments {
  Problem problem;
  void* statistics[kNumStatistics];
  RowNormalizers* normalizers;  // [rows]
  void* workspace;              // forward_workspace_bytes(problem), aligned to 8 bytes; null where that is 0
};

// Bytes that `forward` needs besides its outputs: 52 (float64: 104) for each part of every row; 0 where one block
// finishes a row.
int64_t forward_workspace_bytes(const Problem& problem);

cudaError_t forward(const ForwardArguments& arguments, cudaStream_t stream);

// Writes the gradient of every row: 0 where the label is ignored. The gradient may lie where its logits lie.
struct BackwardArguments {
  Problem problem;
  const void* grads[kNumStatistics];       // [rows]; null for a statistic that was not used
  const void* statistics[kNumStatistics];  // [rows], as `forward` left them
  const RowNormalizers* normalizers;       // [rows]
  Logits grad_policy, grad_reference;      // data null where that side needs none; kinds as those of the logits
  // 1 / c for logits c tanh(x / c) of a softcap c, whose gradient is to be that in x; 0 for none.
  double policy_inverse_softcap, reference_inverse_softcap;
};

cudaError_t backward(const BackwardArguments& arguments, cudaStream_t stream);

// Sums and means over each sequence's labelled tokens, in the order of lit_did.SequenceStatistics.
constexpr int kNumSequenceStatistics = 10;  // and the number of tokens
struct SequenceArguments {
  const void* statistics[kNumStatistics];  // [tokens]
  ScalarKind kind;                         // kFloat or kDouble: of `statistics` and `outputs`
  const int64_t* labels;                   // [tokens]
  const int64_t* cu_seqlens;               // [sequences + 1], or null: every sequence has `length` tokens
  int64_t sequences, length, tokens, ignore_index;
  void* outputs[kNumSequenceStatistics];  // [sequences]
  int64_t* num_tokens;                    // [sequences]
};

cudaError_t reduce_sequences(const SequenceArguments& arguments, cudaStream_t stream);

}  // namespace lit_did::cuda

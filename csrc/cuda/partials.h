// What csrc/cuda/partials.cu offers to the operators, as kernels.h does for the rest.
#pragma once

#include "../row_partials.h"
#include "kernels.h"

namespace lit_did::cuda {

// Of rows whose logits are slices of the vocabulary, one after the other from `problem.first_entry`.
struct PartialsArguments {
  Problem problem;
  RowPartials* partials;  // [slices, rows]; that of a row whose label is ignored is left alone
  int64_t stride;         // from the first row of a slice to the first row of the next
  int slice_entries;      // of each slice but the last, which may have fewer; kPartEntries or less
};

cudaError_t partials(const PartialsArguments& arguments, cudaStream_t stream);

// What several slices say.
struct SlicesArguments {
  RowPartials* partials;  // [slices, rows]
  const int64_t* labels;  // [rows]
  int64_t slices, rows, ignore_index;
};

// Merges all slices into the first.
cudaError_t merge(const SlicesArguments& arguments, cudaStream_t stream);

// Writes the statistics of all slices together, 0 for rows whose label is ignored.
struct FinishArguments {
  SlicesArguments slices;
  ScalarKind kind;                   // kFloat or kDouble: of `statistics`
  void* statistics[kNumStatistics];  // [rows]
  RowNormalizers* normalizers;       // [rows]
};

cudaError_t finish(const FinishArguments& arguments, cudaStream_t stream);

}  // namespace lit_did::cuda

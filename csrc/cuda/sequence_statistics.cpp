// sequence_reduction on CUDA: from tensors to the kernel's arguments. Compiled by the host's compiler.
#include "../sequence_statistics.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>

#include "kernels.h"

namespace lit_did {
namespace {

// The values of `cu_seqlens` are not checked, so as not to wait for the device: offsets beyond the tokens are cut off.
SequenceTensors sequence_reduction_cuda(at::TensorList statistics_, const at::Tensor& labels_,
                                        const std::optional<at::Tensor>& cu_seqlens_, int64_t ignore_index) {
  check_sequence_arguments(statistics_, labels_, cu_seqlens_);
  const c10::cuda::CUDAGuard guard(labels_.device());
  const at::Tensor labels = labels_.contiguous();
  const at::Tensor cu_seqlens = cu_seqlens_.has_value() ? cu_seqlens_->contiguous() : at::Tensor();
  const auto sizes = cu_seqlens.defined() ? std::vector<int64_t>{cu_seqlens.numel() - 1}
                                          : labels.sizes().slice(0, labels.dim() - 1).vec();
  const auto options = statistics_[0].options();
  const at::Tensor num_tokens = at::empty(sizes, options.dtype(at::kLong));

  static_assert(kNumSequenceStatistics == cuda::kNumSequenceStatistics && kNumTokenStatistics == kNumStatistics);
  cuda::SequenceArguments arguments{};
  std::array<at::Tensor, kNumTokenStatistics> statistics;
  for (int i = 0; i < kNumTokenStatistics; ++i) {
    statistics[i] = statistics_[i].contiguous();
    arguments.statistics[i] = statistics[i].const_data_ptr();
  }
  std::array<at::Tensor, kNumSequenceStatistics> out;
  for (int i = 0; i < kNumSequenceStatistics; ++i) {
    out[i] = at::empty(sizes, options);
    arguments.outputs[i] = out[i].mutable_data_ptr();
  }
  arguments.kind = options.dtype() == at::kDouble ? ScalarKind::kDouble : ScalarKind::kFloat;
  arguments.labels = labels.const_data_ptr<int64_t>();
  arguments.cu_seqlens = cu_seqlens.defined() ? cu_seqlens.const_data_ptr<int64_t>() : nullptr;
  arguments.sequences = num_tokens.numel();
  arguments.length = labels.size(-1);
  arguments.tokens = labels.numel();
  arguments.ignore_index = ignore_index;
  TORCH_CHECK_VALUE(arguments.sequences <= 0x7fffffff, "Expected at most 2147483647 sequences, but got ",
                    arguments.sequences, ".");
  arguments.num_tokens = num_tokens.mutable_data_ptr<int64_t>();
  C10_CUDA_CHECK(cuda::reduce_sequences(arguments, c10::cuda::getCurrentCUDAStream()));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], out[9], num_tokens};
}

}  // namespace
}  // namespace lit_did

TORCH_LIBRARY_IMPL(lit_did, CUDA, m) { m.impl("sequence_reduction", &lit_did::sequence_reduction_cuda); }

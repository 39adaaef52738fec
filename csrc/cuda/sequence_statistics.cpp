// sequence_reduction on CUDA: from tensors to the kernel's arguments. Compiled by the host's compiler.
#include "../sequence_statistics.h"

#include "kernels.h"
#include "stream.h"

namespace lit_did {
namespace {

// The values of `cu_seqlens` are not checked, so as not to wait for the device: offsets beyond the tokens are cut off.
SequenceTensors sequence_reduction_cuda(const TensorList& statistics_, const Tensor& labels_,
                                        const std::optional<Tensor>& cu_seqlens_, int64_t ignore_index) {
  check_sequence_arguments(statistics_, labels_, cu_seqlens_);
  const cuda::DeviceGuard guard(labels_.get_device_index());
  const Tensor labels = as_contiguous(labels_);
  std::optional<Tensor> cu_seqlens;
  if (cu_seqlens_) cu_seqlens = as_contiguous(*cu_seqlens_);
  const auto sizes = sequence_sizes(labels, cu_seqlens);
  const auto dtype = statistics_[0].scalar_type();
  const Tensor num_tokens = empty(sizes, ScalarType::Long, labels);

  static_assert(kNumSequenceStatistics == cuda::kNumSequenceStatistics && kNumTokenStatistics == kNumStatistics);
  cuda::SequenceArguments arguments{};
  TensorList statistics, out;
  for (int i = 0; i < kNumTokenStatistics; ++i) {
    statistics.push_back(as_contiguous(statistics_[i]));
    arguments.statistics[i] = statistics[i].const_data_ptr();
  }
  for (int i = 0; i < kNumSequenceStatistics; ++i) {
    out.push_back(empty(sizes, dtype, labels));
    arguments.outputs[i] = out[i].mutable_data_ptr();
  }
  arguments.kind = dtype == ScalarType::Double ? ScalarKind::kDouble : ScalarKind::kFloat;
  arguments.labels = labels.const_data_ptr<int64_t>();
  arguments.cu_seqlens = cu_seqlens ? cu_seqlens->const_data_ptr<int64_t>() : nullptr;
  arguments.sequences = num_tokens.numel();
  arguments.length = labels.sizes().back();
  arguments.tokens = labels.numel();
  arguments.ignore_index = ignore_index;
  need(arguments.sequences <= 0x7fffffff, "at most 2147483647 sequences");
  arguments.num_tokens = num_tokens.mutable_data_ptr<int64_t>();
  STD_CUDA_CHECK(cuda::reduce_sequences(arguments, cuda::current_stream(labels)));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], out[9], num_tokens};
}

}  // namespace
}  // namespace lit_did

STABLE_TORCH_LIBRARY_IMPL(lit_did, CUDA, m) {
  m.impl("sequence_reduction", lit_did::boxed<TORCH_BOX(&lit_did::sequence_reduction_cuda)>);
}

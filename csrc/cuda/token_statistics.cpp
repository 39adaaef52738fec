// token_statistics, its backwards and its partial statistics on CUDA: from tensors to the kernels' arguments. Compiled
// by the host's compiler.
//
// Launches on the current stream of the logits' device, never waits for it, and allocates nothing but the outputs (and
// copies of small inputs that are not contiguous), so that CUDA graphs can capture it.
#include "../token_statistics.h"

#include "partials.h"
#include "stream.h"

namespace lit_did {
namespace {

// Leading dimensions of size 1 are dropped, and those that lie in memory like one become one.
cuda::Logits logits_of(const Tensor& logits) {
  cuda::Logits result{const_cast<void*>(logits.const_data_ptr()), kind_of(logits), {}};
  cuda::RowLayout& layout = result.layout;
  for (int64_t i = 0; i + 1 < logits.dim(); ++i) {
    const int64_t size = logits.size(i), stride = logits.stride(i);
    if (size == 1) continue;
    if (layout.dims > 0 && layout.strides[layout.dims - 1] == size * stride) {
      layout.sizes[layout.dims - 1] *= size;
      layout.strides[layout.dims - 1] = stride;
      continue;
    }
    need(layout.dims < cuda::kMaxLeadingDims, "logits with at most 8 leading dimensions apart in memory");
    layout.sizes[layout.dims] = size;
    layout.strides[layout.dims++] = stride;
  }
  return result;
}

// `entries_a_block`: of a row, the most that a block of the kernel takes.
cuda::Problem problem_of(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels,
                         int64_t ignore_index, double temperature, int64_t first_entry, int64_t entries_a_block) {
  const int64_t blocks_a_row = (policy_logits.sizes().back() + entries_a_block - 1) / entries_a_block;
  need(labels.numel() <= 0x7fffffff / blocks_a_row, "fewer rows: they take more than 2147483647 blocks");
  return {logits_of(policy_logits),
          logits_of(reference_logits),
          labels.const_data_ptr<int64_t>(),
          labels.numel(),
          policy_logits.sizes().back(),
          ignore_index,
          temperature,
          first_entry};
}

TokenTensors token_statistics_cuda(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels_,
                                   int64_t ignore_index, double temperature, bool /*inplace_backward*/) {
  check_token_arguments(policy_logits, reference_logits, labels_, temperature);
  const cuda::DeviceGuard guard(policy_logits.get_device_index());
  const Tensor labels = as_contiguous(labels_);
  cuda::ForwardArguments arguments{};
  arguments.problem = problem_of(policy_logits, reference_logits, labels, ignore_index, temperature, 0,
                                 cuda::kPartsABlock * cuda::kPartEntries);
  TensorList out;
  for (int i = 0; i < kNumStatistics; ++i) {
    out.push_back(empty(labels.sizes(), statistics_dtype(policy_logits), labels));
    arguments.statistics[i] = out[i].mutable_data_ptr();
  }
  // The workspace follows the normalizers in their memory.
  const int64_t count = labels.numel() * kNumNormalizers;
  const int64_t workspace = (cuda::forward_workspace_bytes(arguments.problem) + 7) / 8;
  const Tensor memory = empty({count + workspace}, ScalarType::Double, labels);
  const Tensor normalizers = front_of(memory, normalizer_sizes(labels.sizes()));
  double* address = memory.mutable_data_ptr<double>();
  arguments.normalizers = reinterpret_cast<RowNormalizers*>(address);
  arguments.workspace = address + count;
  STD_CUDA_CHECK(cuda::forward(arguments, cuda::current_stream(labels)));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], normalizers};
}

// Null for a side that needs no gradient. A gradient may be its side's logits.
void write_gradients(const OptionalTensorList& grads, const Tensor& policy_logits, const Tensor& reference_logits,
                     const Tensor& labels, const TensorList& statistics, const Tensor& normalizers,
                     int64_t ignore_index, double temperature, int64_t first_entry, const InverseSoftcaps& softcaps,
                     const Tensor* grad_policy, const Tensor* grad_reference) {
  const BackwardTensors t = check_backward_arguments(grads, labels, statistics, normalizers);
  const auto dtype = statistics_dtype(policy_logits);
  const auto address = [&](const Tensor& tensor) {
    need(tensor.scalar_type() == dtype && same_device(tensor, labels),
         "`grads` and `statistics` of float32, with float64 logits float64, on one device");
    return tensor.const_data_ptr();
  };
  cuda::BackwardArguments arguments{};
  arguments.problem = problem_of(policy_logits, reference_logits, t.labels, ignore_index, temperature, first_entry,
                                 cuda::kEntriesABlock);
  for (int i = 0; i < kNumStatistics; ++i) {
    arguments.grads[i] = t.grads[i] ? address(*t.grads[i]) : nullptr;
    arguments.statistics[i] = address(t.statistics[i]);
  }
  need(same_device(t.normalizers, labels), "all tensors on one device");
  arguments.normalizers = reinterpret_cast<const RowNormalizers*>(t.normalizers.const_data_ptr<double>());
  if (grad_policy) arguments.grad_policy = logits_of(*grad_policy);
  if (grad_reference) arguments.grad_reference = logits_of(*grad_reference);
  arguments.policy_inverse_softcap = softcaps.policy;
  arguments.reference_inverse_softcap = softcaps.reference;
  STD_CUDA_CHECK(cuda::backward(arguments, cuda::current_stream(labels)));
}

std::tuple<Tensor, Tensor> token_statistics_backward_cuda(const OptionalTensorList& grads, const Tensor& policy_logits,
                                                          const Tensor& reference_logits, const Tensor& labels,
                                                          const TensorList& statistics, const Tensor& normalizers,
                                                          int64_t ignore_index, double temperature,
                                                          bool policy_needs_grad, bool reference_needs_grad) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  const cuda::DeviceGuard guard(policy_logits.get_device_index());
  const auto new_or_empty = [](const Tensor& logits, bool needed) {
    return needed ? empty(logits.sizes(), logits.scalar_type(), logits) : empty({0}, logits.scalar_type(), logits);
  };
  const Tensor grad_policy = new_or_empty(policy_logits, policy_needs_grad);
  const Tensor grad_reference = new_or_empty(reference_logits, reference_needs_grad);
  write_gradients(grads, policy_logits, reference_logits, labels, statistics, normalizers, ignore_index, temperature, 0,
                  {}, policy_needs_grad ? &grad_policy : nullptr, reference_needs_grad ? &grad_reference : nullptr);
  return {grad_policy, grad_reference};
}

void token_statistics_backward_inplace_cuda(const OptionalTensorList& grads, const Tensor& policy_logits,
                                            const Tensor& reference_logits, const Tensor& labels,
                                            const TensorList& statistics, const Tensor& normalizers,
                                            int64_t ignore_index, double temperature, bool policy_needs_grad,
                                            bool reference_needs_grad, int64_t first_entry,
                                            std::optional<double> policy_softcap,
                                            std::optional<double> reference_softcap) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  const cuda::DeviceGuard guard(policy_logits.get_device_index());
  if (policy_needs_grad) own_memory(policy_logits);
  if (reference_needs_grad) own_memory(reference_logits);
  write_gradients(grads, policy_logits, reference_logits, labels, statistics, normalizers, ignore_index, temperature,
                  first_entry, InverseSoftcaps(policy_softcap, reference_softcap),
                  policy_needs_grad ? &policy_logits : nullptr, reference_needs_grad ? &reference_logits : nullptr);
}

void token_partials_cuda(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels_,
                         const Tensor& partials, int64_t slice_entries, int64_t first_entry, int64_t ignore_index,
                         double temperature) {
  check_token_arguments(policy_logits, reference_logits, labels_, temperature);
  check_partials(partials, labels_, policy_logits.sizes().back(), slice_entries);
  need(slice_entries <= cuda::kPartEntries, "narrower slices on CUDA");
  const cuda::DeviceGuard guard(policy_logits.get_device_index());
  const Tensor labels = as_contiguous(labels_);
  cuda::PartialsArguments arguments{};
  arguments.problem =
      problem_of(policy_logits, reference_logits, labels, ignore_index, temperature, first_entry, slice_entries);
  arguments.partials = static_cast<RowPartials*>(partials.mutable_data_ptr());
  arguments.stride = partials.stride(0) / kNumPartials;
  arguments.slice_entries = static_cast<int>(slice_entries);
  STD_CUDA_CHECK(cuda::partials(arguments, cuda::current_stream(labels)));
}

// `labels`: contiguous.
cuda::SlicesArguments slices_of(const Tensor& partials, const Tensor& labels, int64_t ignore_index) {
  return {static_cast<RowPartials*>(partials.mutable_data_ptr()), labels.const_data_ptr<int64_t>(), partials.size(0),
          labels.numel(), ignore_index};
}

void merge_token_partials_cuda(const Tensor& partials, const Tensor& labels_, int64_t ignore_index) {
  check_slices(partials, labels_);
  const cuda::DeviceGuard guard(partials.get_device_index());
  const Tensor labels = as_contiguous(labels_);
  STD_CUDA_CHECK(cuda::merge(slices_of(partials, labels, ignore_index), cuda::current_stream(labels)));
}

TokenTensors finish_token_partials_cuda(const Tensor& partials, const Tensor& labels_, int64_t ignore_index,
                                        bool float64) {
  check_slices(partials, labels_);
  const cuda::DeviceGuard guard(partials.get_device_index());
  const Tensor labels = as_contiguous(labels_);
  cuda::FinishArguments arguments{};
  arguments.slices = slices_of(partials, labels, ignore_index);
  arguments.kind = float64 ? ScalarKind::kDouble : ScalarKind::kFloat;
  TensorList out;
  for (int i = 0; i < kNumStatistics; ++i) {
    out.push_back(empty(labels.sizes(), float64 ? ScalarType::Double : ScalarType::Float, labels));
    arguments.statistics[i] = out[i].mutable_data_ptr();
  }
  const Tensor normalizers = empty(normalizer_sizes(labels.sizes()), ScalarType::Double, labels);
  arguments.normalizers = static_cast<RowNormalizers*>(normalizers.mutable_data_ptr());
  STD_CUDA_CHECK(cuda::finish(arguments, cuda::current_stream(labels)));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], normalizers};
}

}  // namespace
}  // namespace lit_did

STABLE_TORCH_LIBRARY_IMPL(lit_did, CUDA, m) {
  m.impl("token_statistics", lit_did::boxed<TORCH_BOX(&lit_did::token_statistics_cuda)>);
  m.impl("token_statistics_backward", lit_did::boxed<TORCH_BOX(&lit_did::token_statistics_backward_cuda)>);
  m.impl("token_statistics_backward_", lit_did::boxed<TORCH_BOX(&lit_did::token_statistics_backward_inplace_cuda)>);
  m.impl("token_partials_", lit_did::boxed<TORCH_BOX(&lit_did::token_partials_cuda)>);
  m.impl("merge_token_partials_", lit_did::boxed<TORCH_BOX(&lit_did::merge_token_partials_cuda)>);
  m.impl("finish_token_partials", lit_did::boxed<TORCH_BOX(&lit_did::finish_token_partials_cuda)>);
}

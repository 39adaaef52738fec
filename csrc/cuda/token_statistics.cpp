// token_statistics, its backwards and its partial statistics on CUDA: from tensors to the kernels' arguments. Compiled
// by the host's compiler.
//
// Launches on the current stream of the logits' device, never waits for it, and allocates nothing but the outputs (and
// copies of small inputs that are not contiguous), so that CUDA graphs can capture it.
#include "../token_statistics.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "partials.h"

namespace lit_did {
namespace {

// Leading dimensions of size 1 are dropped, and those that lie in memory like one become one.
cuda::Logits logits_of(const char* name, const at::Tensor& logits) {
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
    TORCH_CHECK_VALUE(layout.dims < cuda::kMaxLeadingDims, "Expected `", name, "` to have at most ",
                      cuda::kMaxLeadingDims, " leading dimensions apart in memory, but got sizes ", logits.sizes(),
                      " and strides ", logits.strides(), ". Pass `", name, ".contiguous()`.");
    layout.sizes[layout.dims] = size;
    layout.strides[layout.dims++] = stride;
  }
  return result;
}

cuda::Problem problem_of(const at::Tensor& policy_logits, const at::Tensor& reference_logits, const at::Tensor& labels,
                         int64_t ignore_index, double temperature, int64_t first_entry = 0) {
  const int64_t blocks_a_row = (policy_logits.size(-1) + cuda::kEntriesABlock - 1) / cuda::kEntriesABlock;
  TORCH_CHECK_VALUE(labels.numel() <= 0x7fffffff / blocks_a_row, "Expected `labels` to have at most ",
                    0x7fffffff / blocks_a_row, " entries with a vocabulary of ", policy_logits.size(-1), ", but got ",
                    labels.numel(), ".");
  return {logits_of("policy_logits", policy_logits),
          logits_of("reference_logits", reference_logits),
          labels.const_data_ptr<int64_t>(),
          labels.numel(),
          policy_logits.size(-1),
          ignore_index,
          temperature,
          first_entry};
}

TokenTensors token_statistics_cuda(const at::Tensor& policy_logits, const at::Tensor& reference_logits,
                                   const at::Tensor& labels_, int64_t ignore_index, double temperature,
                                   bool /*inplace_backward*/) {
  check_token_arguments(policy_logits, reference_logits, labels_, temperature);
  const c10::cuda::CUDAGuard guard(policy_logits.device());
  const at::Tensor labels = labels_.contiguous();
  cuda::ForwardArguments arguments{};
  arguments.problem = problem_of(policy_logits, reference_logits, labels, ignore_index, temperature);
  const auto options = policy_logits.options().dtype(statistics_dtype(policy_logits));
  std::array<at::Tensor, kNumStatistics> out;
  for (int i = 0; i < kNumStatistics; ++i) {
    out[i] = at::empty(labels.sizes(), options);
    arguments.statistics[i] = out[i].mutable_data_ptr();
  }
  // The workspace follows the normalizers in their memory.
  const int64_t count = labels.numel() * kNumNormalizers;
  const int64_t workspace = (cuda::forward_workspace_bytes(arguments.problem) + 7) / 8;
  const at::Tensor memory = at::empty({count + workspace}, options.dtype(at::kDouble));
  auto sizes = labels.sizes().vec();
  sizes.push_back(kNumNormalizers);
  const at::Tensor normalizers = memory.narrow(0, 0, count).view(sizes);
  double* address = memory.mutable_data_ptr<double>();
  arguments.normalizers = reinterpret_cast<RowNormalizers*>(address);
  arguments.workspace = address + count;
  C10_CUDA_CHECK(cuda::forward(arguments, c10::cuda::getCurrentCUDAStream()));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], normalizers};
}

// An undefined tensor for a side that needs no gradient. A gradient may be its side's logits.
void write_gradients(const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& policy_logits,
                     const at::Tensor& reference_logits, const at::Tensor& labels, at::TensorList statistics,
                     const at::Tensor& normalizers, int64_t ignore_index, double temperature, int64_t first_entry,
                     const at::Tensor& grad_policy, const at::Tensor& grad_reference) {
  const BackwardTensors t = check_backward_arguments(grads, labels, statistics, normalizers);
  const auto real = statistics_dtype(policy_logits);
  const auto address = [&](const char* name, const at::Tensor& tensor) -> const void* {
    if (!tensor.defined()) return nullptr;
    TORCH_CHECK_TYPE(tensor.scalar_type() == real && tensor.device() == policy_logits.device(), "Expected `", name,
                     "` to be ", real, " on ", policy_logits.device(), ", but got ", tensor.scalar_type(), " on ",
                     tensor.device(), ".");
    return tensor.const_data_ptr();
  };
  cuda::BackwardArguments arguments{};
  arguments.problem = problem_of(policy_logits, reference_logits, t.labels, ignore_index, temperature, first_entry);
  for (int i = 0; i < kNumStatistics; ++i) {
    arguments.grads[i] = address("grads", t.grads[i]);
    arguments.statistics[i] = address("statistics", t.statistics[i]);
  }
  TORCH_CHECK_VALUE(t.normalizers.device() == policy_logits.device(), "Expected `normalizers` on ",
                    policy_logits.device(), ", but got ", t.normalizers.device(), ".");
  arguments.normalizers = reinterpret_cast<const RowNormalizers*>(t.normalizers.const_data_ptr<double>());
  if (grad_policy.defined()) arguments.grad_policy = logits_of("policy_logits", grad_policy);
  if (grad_reference.defined()) arguments.grad_reference = logits_of("reference_logits", grad_reference);
  C10_CUDA_CHECK(cuda::backward(arguments, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor> token_statistics_backward_cuda(const c10::List<std::optional<at::Tensor>>& grads,
                                                                  const at::Tensor& policy_logits,
                                                                  const at::Tensor& reference_logits,
                                                                  const at::Tensor& labels, at::TensorList statistics,
                                                                  const at::Tensor& normalizers, int64_t ignore_index,
                                                                  double temperature, bool policy_needs_grad,
                                                                  bool reference_needs_grad) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  const c10::cuda::CUDAGuard guard(policy_logits.device());
  const auto output = [](const at::Tensor& logits, bool needed) {
    return needed ? at::empty_like(logits, at::MemoryFormat::Contiguous) : at::Tensor();
  };
  const at::Tensor grad_policy = output(policy_logits, policy_needs_grad);
  const at::Tensor grad_reference = output(reference_logits, reference_needs_grad);
  write_gradients(grads, policy_logits, reference_logits, labels, statistics, normalizers, ignore_index, temperature, 0,
                  grad_policy, grad_reference);
  return {policy_needs_grad ? grad_policy : at::empty({0}, policy_logits.options()),
          reference_needs_grad ? grad_reference : at::empty({0}, reference_logits.options())};
}

void token_statistics_backward_inplace_cuda(const c10::List<std::optional<at::Tensor>>& grads,
                                            const at::Tensor& policy_logits, const at::Tensor& reference_logits,
                                            const at::Tensor& labels, at::TensorList statistics,
                                            const at::Tensor& normalizers, int64_t ignore_index, double temperature,
                                            bool policy_needs_grad, bool reference_needs_grad, int64_t first_entry) {
  check_token_arguments(policy_logits, reference_logits, labels, temperature);
  const c10::cuda::CUDAGuard guard(policy_logits.device());
  claim_logits(policy_logits, reference_logits, policy_needs_grad, reference_needs_grad);
  write_gradients(grads, policy_logits, reference_logits, labels, statistics, normalizers, ignore_index, temperature,
                  first_entry, policy_needs_grad ? policy_logits : at::Tensor(),
                  reference_needs_grad ? reference_logits : at::Tensor());
}

void token_partials_cuda(const at::Tensor& policy_logits, const at::Tensor& reference_logits, const at::Tensor& labels_,
                         const at::Tensor& partials, int64_t slice_entries, int64_t first_entry, int64_t ignore_index,
                         double temperature) {
  check_token_arguments(policy_logits, reference_logits, labels_, temperature);
  check_partials(partials, labels_, policy_logits.size(-1), slice_entries);
  TORCH_CHECK_VALUE(slice_entries <= cuda::kPartEntries, "torch.ops.lit_did needs slices of ", cuda::kPartEntries,
                    " entries or less on CUDA.");
  const c10::cuda::CUDAGuard guard(policy_logits.device());
  const at::Tensor labels = labels_.contiguous();
  cuda::PartialsArguments arguments{};
  arguments.problem = problem_of(policy_logits, reference_logits, labels, ignore_index, temperature, first_entry);
  arguments.partials = static_cast<RowPartials*>(partials.mutable_data_ptr());
  arguments.stride = partials.stride(0) / kNumPartials;
  arguments.slice_entries = static_cast<int>(slice_entries);
  C10_CUDA_CHECK(cuda::partials(arguments, c10::cuda::getCurrentCUDAStream()));
}

// `labels`: contiguous.
cuda::SlicesArguments slices_of(const at::Tensor& partials, const at::Tensor& labels, int64_t ignore_index) {
  return {static_cast<RowPartials*>(partials.mutable_data_ptr()), labels.const_data_ptr<int64_t>(), partials.size(0),
          labels.numel(), ignore_index};
}

void merge_token_partials_cuda(const at::Tensor& partials, const at::Tensor& labels_, int64_t ignore_index) {
  check_slices(partials, labels_);
  const c10::cuda::CUDAGuard guard(partials.device());
  const at::Tensor labels = labels_.contiguous();
  C10_CUDA_CHECK(cuda::merge(slices_of(partials, labels, ignore_index), c10::cuda::getCurrentCUDAStream()));
}

TokenTensors finish_token_partials_cuda(const at::Tensor& partials, const at::Tensor& labels_, int64_t ignore_index,
                                        bool float64) {
  check_slices(partials, labels_);
  const c10::cuda::CUDAGuard guard(partials.device());
  const at::Tensor labels = labels_.contiguous();
  cuda::FinishArguments arguments{};
  arguments.slices = slices_of(partials, labels, ignore_index);
  arguments.kind = float64 ? ScalarKind::kDouble : ScalarKind::kFloat;
  std::array<at::Tensor, kNumStatistics> out;
  for (int i = 0; i < kNumStatistics; ++i) {
    out[i] = at::empty(labels.sizes(), partials.options().dtype(float64 ? at::kDouble : at::kFloat));
    arguments.statistics[i] = out[i].mutable_data_ptr();
  }
  const at::Tensor normalizers = at::empty({labels.numel(), kNumNormalizers}, partials.options());
  arguments.normalizers = static_cast<RowNormalizers*>(normalizers.mutable_data_ptr());
  C10_CUDA_CHECK(cuda::finish(arguments, c10::cuda::getCurrentCUDAStream()));
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8], normalizers};
}

}  // namespace
}  // namespace lit_did

TORCH_LIBRARY_IMPL(lit_did, CUDA, m) {
  m.impl("token_statistics", &lit_did::token_statistics_cuda);
  m.impl("token_statistics_backward", &lit_did::token_statistics_backward_cuda);
  m.impl("token_statistics_backward_", &lit_did::token_statistics_backward_inplace_cuda);
  m.impl("token_partials_", &lit_did::token_partials_cuda);
  m.impl("merge_token_partials_", &lit_did::merge_token_partials_cuda);
  m.impl("finish_token_partials", &lit_did::finish_token_partials_cuda);
}

// What the operators demand of their input, on every device. The Python functions check first, with the same
// words; these guard calls through torch.ops.
#include <algorithm>
#include <cstdlib>
#include <utility>

#include "sequence_statistics.h"
#include "token_statistics.h"

namespace lit_did {
namespace {

// Whether every entry has an address of its own: each dimension steps beyond the reach of the finer ones. Strides
// that interleave dimensions in other ways count as overlapping.
bool is_injective(at::IntArrayRef sizes, at::IntArrayRef strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += (size - 1) * stride;
  }
  return true;
}

bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto range = [](const at::Tensor& tensor) {
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    int64_t last = 0;
    for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
    return std::pair(begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size()));
  };
  const auto [a_begin, a_end] = range(a);
  const auto [b_begin, b_end] = range(b);
  if (a_end <= b_begin || b_end <= a_begin) return false;
  if (a.scalar_type() != b.scalar_type() || a.strides() != b.strides()) return true;
  // Interleaved halves of one tensor: together they are a tensor with one dimension more.
  auto sizes = a.sizes().vec(), strides = a.strides().vec();
  sizes.push_back(2);
  strides.push_back(std::abs(a_begin - b_begin) / static_cast<int64_t>(a.element_size()));
  return !is_injective(sizes, strides);
}

}  // namespace

at::ScalarType statistics_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

ScalarKind kind_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return ScalarKind::kFloat;
    case at::kBFloat16:
      return ScalarKind::kBFloat16;
    case at::kHalf:
      return ScalarKind::kFloat16;
    default:
      return ScalarKind::kDouble;
  }
}

void check_token_arguments(const at::Tensor& policy_logits, const at::Tensor& reference_logits,
                           const at::Tensor& labels, double temperature) {
  TORCH_CHECK_VALUE(policy_logits.dim() >= 1 && policy_logits.size(-1) >= 1,
                    "Expected `policy_logits` to have shape [..., V] with V >= 1, but got ", policy_logits.sizes(),
                    ".");
  TORCH_CHECK_VALUE(reference_logits.sizes() == policy_logits.sizes(),
                    "Expected `reference_logits` to have the shape of `policy_logits`, ", policy_logits.sizes(),
                    ", but got ", reference_logits.sizes(), ".");
  TORCH_CHECK_VALUE(labels.sizes() == policy_logits.sizes().slice(0, policy_logits.dim() - 1),
                    "Expected `labels` to have shape ", policy_logits.sizes().slice(0, policy_logits.dim() - 1),
                    ", but got ", labels.sizes(), ".");
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "Expected `labels` to be int64, but got ", labels.scalar_type(),
                   ".");
  TORCH_CHECK_TYPE((policy_logits.scalar_type() == at::kDouble) == (reference_logits.scalar_type() == at::kDouble),
                   "Expected both logits or neither to be float64, but got ", policy_logits.scalar_type(), " and ",
                   reference_logits.scalar_type(), ".");
  for (const auto& logits : {policy_logits, reference_logits}) {
    const auto dtype = logits.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                     "Expected logits to be float32, bfloat16, float16 or float64, but got ", dtype, ".");
    TORCH_CHECK_VALUE(logits.numel() == 0 || logits.size(-1) == 1 || logits.stride(-1) == 1,
                      "Expected logits to be contiguous in the vocabulary, but got strides ", logits.strides(), ".");
  }
  TORCH_CHECK_VALUE(policy_logits.device() == reference_logits.device() && policy_logits.device() == labels.device(),
                    "Expected all tensors on one device, but got policy_logits on ", policy_logits.device(),
                    ", reference_logits on ", reference_logits.device(), " and labels on ", labels.device(), ".");
  TORCH_CHECK_VALUE(temperature >= 1e-30 && temperature <= 1e30,
                    "Expected `temperature` to be in [1e-30, 1e30], but got ", temperature, ".");
}

void claim_logits(const at::Tensor& policy_logits, const at::Tensor& reference_logits, bool write_policy,
                  bool write_reference) {
  const auto check = [](const char* name, const at::Tensor& logits, const char* other_name, const at::Tensor& other) {
    TORCH_CHECK_VALUE(is_injective(logits.sizes(), logits.strides()), "Expected `", name,
                      "` to have memory of its own for every row with `inplace_backward=True`, but got "
                      "rows that overlap: sizes ",
                      logits.sizes(), ", strides ", logits.strides(), ". Pass `", name, ".contiguous()`.");
    TORCH_CHECK_VALUE(!share_memory(logits, other), "Expected `", name,
                      "` to have memory of its own with `inplace_backward=True`, but it shares memory "
                      "with `",
                      other_name, "`. Pass `", name, ".clone()`.");
  };
  if (write_policy) check("policy_logits", policy_logits, "reference_logits", reference_logits);
  if (write_reference) check("reference_logits", reference_logits, "policy_logits", policy_logits);
  // Copies what is still shared with a lazy clone.
  if (write_policy) policy_logits.mutable_data_ptr();
  if (write_reference) reference_logits.mutable_data_ptr();
  if (write_policy) policy_logits.unsafeGetTensorImpl()->bump_version();
  if (write_reference) reference_logits.unsafeGetTensorImpl()->bump_version();
}

BackwardTensors check_backward_arguments(const c10::List<std::optional<at::Tensor>>& grads, const at::Tensor& labels,
                                         at::TensorList statistics, const at::Tensor& normalizers) {
  TORCH_CHECK_VALUE(grads.size() == kNumStatistics && statistics.size() == kNumStatistics, "Expected ", kNumStatistics,
                    " gradients and statistics, but got ", grads.size(), " and ", statistics.size(), ".");
  const auto check_sizes = [](const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "Expected `", name, "` to have shape ", sizes, ", but got ",
                      tensor.sizes(), ".");
  };
  BackwardTensors result{{}, {}, labels.contiguous(), normalizers.contiguous()};
  for (int i = 0; i < kNumStatistics; ++i) {
    const std::optional<at::Tensor> grad = grads.get(i);
    if (grad.has_value() && grad->defined()) {
      check_sizes("grads", *grad, labels.sizes());
      result.grads[i] = grad->contiguous();
    }
    check_sizes("statistics", statistics[i], labels.sizes());
    result.statistics[i] = statistics[i].contiguous();
  }
  auto normalizer_sizes = labels.sizes().vec();
  normalizer_sizes.push_back(kNumNormalizers);
  check_sizes("normalizers", normalizers, normalizer_sizes);
  return result;
}

void check_sequence_arguments(at::TensorList statistics, const at::Tensor& labels,
                              const std::optional<at::Tensor>& cu_seqlens) {
  TORCH_CHECK_VALUE(statistics.size() == kNumTokenStatistics, "Expected ", kNumTokenStatistics,
                    " `statistics`, but got ", statistics.size(), ".");
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "Expected `labels` to be int64, but got ", labels.scalar_type(),
                   ".");
  TORCH_CHECK_VALUE(labels.dim() >= 1, "Expected `labels` to have shape [..., T], but got ", labels.sizes(), ".");
  const auto dtype = statistics[0].scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "Expected `statistics` to be float32 or float64, but got ", dtype, ".");
  for (const at::Tensor& statistic : statistics) {
    TORCH_CHECK_TYPE(statistic.scalar_type() == dtype, "Expected `statistics` of one dtype, but got ", dtype, " and ",
                     statistic.scalar_type(), ".");
    TORCH_CHECK_VALUE(statistic.sizes() == labels.sizes(), "Expected `statistics` to have the shape of `labels`, ",
                      labels.sizes(), ", but got ", statistic.sizes(), ".");
    TORCH_CHECK_VALUE(statistic.device() == labels.device(), "Expected all tensors on one device, but got `labels` on ",
                      labels.device(), " and `statistics` on ", statistic.device(), ".");
  }
  if (!cu_seqlens.has_value()) return;
  TORCH_CHECK_VALUE(labels.dim() == 1, "Expected `labels` to have shape [tokens] with `cu_seqlens`, but got ",
                    labels.sizes(), ".");
  TORCH_CHECK_TYPE(cu_seqlens->scalar_type() == at::kLong, "Expected `cu_seqlens` to be int64, but got ",
                   cu_seqlens->scalar_type(), ".");
  TORCH_CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
                    "Expected `cu_seqlens` to have shape [sequences + 1], but got ", cu_seqlens->sizes(), ".");
  TORCH_CHECK_VALUE(cu_seqlens->device() == labels.device(), "Expected all tensors on one device, but got `labels` on ",
                    labels.device(), " and `cu_seqlens` on ", cu_seqlens->device(), ".");
}

}  // namespace lit_did

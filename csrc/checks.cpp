// What keeps the operators within their tensors' memory, on every device. The Python functions check first and explain
// what is wrong with which value. These checks are for direct calls through torch.ops.
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

void need(bool fits, const char* what) { TORCH_CHECK_VALUE(fits, "torch.ops.lit_did needs ", what, "."); }

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
  need(policy_logits.dim() >= 1 && policy_logits.size(-1) >= 1, "`policy_logits` of shape [..., V]");
  need(reference_logits.sizes() == policy_logits.sizes(), "`reference_logits` of the shape of `policy_logits`");
  need(labels.sizes() == policy_logits.sizes().slice(0, policy_logits.dim() - 1), "`labels` of shape [...]");
  need(labels.scalar_type() == at::kLong, "`labels` of int64");
  need((policy_logits.scalar_type() == at::kDouble) == (reference_logits.scalar_type() == at::kDouble),
       "both logits or neither of float64");
  for (const auto& logits : {policy_logits, reference_logits}) {
    const auto dtype = logits.scalar_type();
    need(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
         "logits of float32, bfloat16, float16 or float64");
    need(logits.numel() == 0 || logits.size(-1) == 1 || logits.stride(-1) == 1, "logits contiguous in the vocabulary");
    need(logits.device() == labels.device(), "all tensors on one device");
  }
  need(temperature >= 1e-30 && temperature <= 1e30, "`temperature` in [1e-30, 1e30]");
}

void check_partials(const at::Tensor& partials, const at::Tensor& labels, int64_t entries, int64_t slice_entries) {
  need(labels.dim() == 1 && labels.scalar_type() == at::kLong, "`labels` of shape [rows] and int64");
  need(partials.dim() == 3 && partials.size(1) == labels.size(0) && partials.size(2) == kNumPartials,
       "`partials` of shape [slices, rows, 16]");
  need(partials.scalar_type() == at::kDouble && partials.select(0, 0).is_contiguous(),
       "`partials` of float64, each slice contiguous");
  need(partials.stride(0) % kNumPartials == 0, "`partials` that are whole rows apart");
  need(partials.device() == labels.device(), "all tensors on one device");
  need(slice_entries > 0 && partials.size(0) == (entries - 1) / slice_entries + 1,
       "`partials` for every slice of `slice_entries`");
}

void check_slices(const at::Tensor& partials, const at::Tensor& labels) {
  check_partials(partials, labels, partials.size(0), 1);
  need(partials.is_contiguous(), "contiguous `partials`");
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
  need(grads.size() == kNumStatistics && statistics.size() == kNumStatistics, "nine `grads` and `statistics`");
  BackwardTensors result{{}, {}, labels.contiguous(), normalizers.contiguous()};
  for (int i = 0; i < kNumStatistics; ++i) {
    const std::optional<at::Tensor> grad = grads.get(i);
    if (grad.has_value() && grad->defined()) {
      need(grad->sizes() == labels.sizes(), "`grads` of the shape of `labels`");
      result.grads[i] = grad->contiguous();
    }
    need(statistics[i].sizes() == labels.sizes(), "`statistics` of the shape of `labels`");
    result.statistics[i] = statistics[i].contiguous();
  }
  auto normalizer_sizes = labels.sizes().vec();
  normalizer_sizes.push_back(kNumNormalizers);
  need(normalizers.sizes() == normalizer_sizes, "`normalizers` of shape [..., 5]");
  return result;
}

void check_sequence_arguments(at::TensorList statistics, const at::Tensor& labels,
                              const std::optional<at::Tensor>& cu_seqlens) {
  need(statistics.size() == kNumTokenStatistics, "nine `statistics`");
  need(labels.scalar_type() == at::kLong, "`labels` of int64");
  need(labels.dim() >= 1, "`labels` of shape [..., T]");
  const auto dtype = statistics[0].scalar_type();
  need(dtype == at::kFloat || dtype == at::kDouble, "`statistics` of float32 or float64");
  for (const at::Tensor& statistic : statistics) {
    need(statistic.scalar_type() == dtype, "`statistics` of one dtype");
    need(statistic.sizes() == labels.sizes(), "`statistics` of the shape of `labels`");
    need(statistic.device() == labels.device(), "all tensors on one device");
  }
  if (!cu_seqlens.has_value()) return;
  need(labels.dim() == 1, "`labels` of shape [tokens] with `cu_seqlens`");
  need(cu_seqlens->scalar_type() == at::kLong, "`cu_seqlens` of int64");
  need(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "`cu_seqlens` of shape [sequences + 1]");
  need(cu_seqlens->device() == labels.device(), "all tensors on one device");
}

}  // namespace lit_did

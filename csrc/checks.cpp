// What keeps the operators within their tensors' memory, on every device. The Python functions check first and explain
// what is wrong with which value. These checks are for direct calls through torch.ops.
#include "sequence_statistics.h"
#include "token_statistics.h"

namespace lit_did {

ScalarType statistics_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> normalizer_sizes(Sizes labels) {
  auto sizes = labels.vec();
  sizes.push_back(kNumNormalizers);
  return sizes;
}

std::vector<int64_t> sequence_sizes(const Tensor& labels, const std::optional<Tensor>& cu_seqlens) {
  if (cu_seqlens) return {cu_seqlens->numel() - 1};
  return labels.sizes().slice(0, labels.dim() - 1).vec();
}

InverseSoftcaps::InverseSoftcaps(std::optional<double> policy_softcap, std::optional<double> reference_softcap) {
  for (const auto& softcap : {policy_softcap, reference_softcap})
    need(!softcap || (*softcap > 0 && 1 / *softcap > 0), "softcaps that are positive and finite");
  if (policy_softcap) policy = 1 / *policy_softcap;
  if (reference_softcap) reference = 1 / *reference_softcap;
}

void check_token_arguments(const Tensor& policy_logits, const Tensor& reference_logits, const Tensor& labels,
                           double temperature) {
  const Sizes sizes = policy_logits.sizes();
  need(sizes.size() >= 1 && sizes.back() >= 1, "`policy_logits` of shape [..., V]");
  need(reference_logits.sizes().equals(sizes), "`reference_logits` of the shape of `policy_logits`");
  need(labels.sizes().equals(sizes.slice(0, sizes.size() - 1)), "`labels` of shape [...]");
  need(labels.scalar_type() == ScalarType::Long, "`labels` of int64");
  need((policy_logits.scalar_type() == ScalarType::Double) == (reference_logits.scalar_type() == ScalarType::Double),
       "both logits or neither of float64");
  for (const Tensor* logits : {&policy_logits, &reference_logits}) {
    const auto dtype = logits->scalar_type();
    need(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
             dtype == ScalarType::Double,
         "logits of float32, bfloat16, float16 or float64");
    need(logits->strides().back() == 1 || sizes.back() == 1 || logits->numel() == 0,
         "logits contiguous in the vocabulary");
    need(same_device(*logits, labels), "all tensors on one device");
  }
  need(temperature >= 1e-30 && temperature <= 1e30, "`temperature` in [1e-30, 1e30]");
}

void check_partials(const Tensor& partials, const Tensor& labels, int64_t entries, int64_t slice_entries) {
  need(labels.dim() == 1 && labels.scalar_type() == ScalarType::Long, "`labels` of shape [rows] and int64");
  need(partials.dim() == 3 && partials.size(1) == labels.size(0) && partials.size(2) == kNumPartials,
       "`partials` of shape [slices, rows, 16]");
  need(partials.scalar_type() == ScalarType::Double && partials.stride(2) == 1 &&
           (partials.stride(1) == kNumPartials || labels.size(0) <= 1),
       "`partials` of float64, each slice contiguous");
  need(partials.stride(0) % kNumPartials == 0, "`partials` that are whole rows apart");
  need(same_device(partials, labels), "all tensors on one device");
  need(slice_entries > 0 && partials.size(0) == (entries - 1) / slice_entries + 1,
       "`partials` for every slice of `slice_entries`");
}

void check_slices(const Tensor& partials, const Tensor& labels) {
  check_partials(partials, labels, partials.size(0), 1);
  need(partials.is_contiguous(), "contiguous `partials`");
}

BackwardTensors check_backward_arguments(const OptionalTensorList& grads, const Tensor& labels,
                                         const TensorList& statistics, const Tensor& normalizers) {
  need(grads.size() == kNumStatistics && statistics.size() == kNumStatistics, "nine `grads` and `statistics`");
  BackwardTensors result{{}, {}, as_contiguous(labels), as_contiguous(normalizers)};
  for (const auto& grad : grads) {
    const bool used = grad.has_value() && grad->defined();
    if (used) need(grad->sizes().equals(labels.sizes()), "`grads` of the shape of `labels`");
    result.grads.push_back(used ? std::optional(as_contiguous(*grad)) : std::nullopt);
  }
  for (const Tensor& statistic : statistics) {
    need(statistic.sizes().equals(labels.sizes()), "`statistics` of the shape of `labels`");
    result.statistics.push_back(as_contiguous(statistic));
  }
  need(normalizers.sizes().equals(normalizer_sizes(labels.sizes())), "`normalizers` of shape [..., 5]");
  return result;
}

void check_sequence_arguments(const TensorList& statistics, const Tensor& labels,
                              const std::optional<Tensor>& cu_seqlens) {
  need(statistics.size() == kNumTokenStatistics, "nine `statistics`");
  need(labels.scalar_type() == ScalarType::Long, "`labels` of int64");
  need(labels.dim() >= 1, "`labels` of shape [..., T]");
  const auto dtype = statistics[0].scalar_type();
  need(dtype == ScalarType::Float || dtype == ScalarType::Double, "`statistics` of float32 or float64");
  for (const Tensor& statistic : statistics) {
    need(statistic.scalar_type() == dtype, "`statistics` of one dtype");
    need(statistic.sizes().equals(labels.sizes()), "`statistics` of the shape of `labels`");
    need(same_device(statistic, labels), "all tensors on one device");
  }
  if (!cu_seqlens.has_value()) return;
  need(labels.dim() == 1, "`labels` of shape [tokens] with `cu_seqlens`");
  need(cu_seqlens->scalar_type() == ScalarType::Long, "`cu_seqlens` of int64");
  need(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "`cu_seqlens` of shape [sequences + 1]");
  need(same_device(*cu_seqlens, labels), "all tensors on one device");
}

}  // namespace lit_did

// What the operators demand of their input, on every device. The Python functions check first, with the same
// words; these guard calls through torch.ops.
#include "token_statistics.h"

namespace lit_did {

at::ScalarType statistics_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
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
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature),
                    "Expected `temperature` to be a finite number above 0, but got ", temperature, ".");
}

}  // namespace lit_did

// The operators' schemas and their CPU implementations. Loading the library registers them; those on CUDA are in
// csrc/cuda/*.cpp, a library of its own. Autograd and fake kernels are in lit_did/ops/fused.py.
#include "sequence_statistics.h"
#include "token_statistics.h"

STABLE_TORCH_LIBRARY(lit_did, m) {
  m.def(
      "token_statistics(Tensor policy_logits, Tensor reference_logits, Tensor labels, int ignore_index, "
      "float temperature, bool inplace_backward=False) -> (Tensor policy_logprob, Tensor reference_logprob, Tensor "
      "token_did_entropy, Tensor token_did_concentration, Tensor token_did_log_partition, Tensor policy_entropy, "
      "Tensor reference_entropy, Tensor kl, Tensor reverse_kl, "
      "Tensor normalizers)");
  m.def(
      "token_statistics_backward(Tensor?[] grads, Tensor policy_logits, Tensor reference_logits, Tensor labels, "
      "Tensor[] statistics, Tensor normalizers, int ignore_index, float temperature, bool policy_needs_grad, "
      "bool reference_needs_grad) -> (Tensor, Tensor)");
  m.def(
      "token_statistics_backward_(Tensor?[] grads, Tensor(a!) policy_logits, Tensor(b!) reference_logits, "
      "Tensor labels, Tensor[] statistics, Tensor normalizers, int ignore_index, float temperature, "
      "bool policy_needs_grad, bool reference_needs_grad, int first_entry=0, float? policy_softcap=None, "
      "float? reference_softcap=None) -> ()");
  m.def(
      "token_partials_(Tensor policy_logits, Tensor reference_logits, Tensor labels, Tensor(a!) partials, "
      "int slice_entries, int first_entry, int ignore_index, float temperature) -> ()");
  m.def("merge_token_partials_(Tensor(a!) partials, Tensor labels, int ignore_index) -> ()");
  m.def(
      "finish_token_partials(Tensor partials, Tensor labels, int ignore_index, bool float64) -> "
      "(Tensor policy_logprob, Tensor reference_logprob, Tensor token_did_entropy, Tensor token_did_concentration, "
      "Tensor token_did_log_partition, Tensor policy_entropy, Tensor reference_entropy, Tensor kl, Tensor reverse_kl, "
      "Tensor normalizers)");
  m.def(
      "sequence_reduction(Tensor[] statistics, Tensor labels, Tensor? cu_seqlens, int ignore_index) -> "
      "(Tensor policy_logprob, Tensor reference_logprob, Tensor log_ratio, Tensor token_did_entropy, "
      "Tensor token_did_concentration, Tensor policy_entropy, Tensor reference_entropy, Tensor kl, Tensor reverse_kl, "
      "Tensor token_did_log_partition, "
      "Tensor num_tokens)");
}

STABLE_TORCH_LIBRARY_IMPL(lit_did, CPU, m) {
  m.impl("token_statistics", lit_did::boxed<TORCH_BOX(&lit_did::token_statistics_cpu)>);
  m.impl("token_statistics_backward", lit_did::boxed<TORCH_BOX(&lit_did::token_statistics_backward_cpu)>);
  m.impl("token_statistics_backward_", lit_did::boxed<TORCH_BOX(&lit_did::token_statistics_backward_inplace_cpu)>);
  m.impl("token_partials_", lit_did::boxed<TORCH_BOX(&lit_did::token_partials_cpu)>);
  m.impl("merge_token_partials_", lit_did::boxed<TORCH_BOX(&lit_did::merge_token_partials_cpu)>);
  m.impl("finish_token_partials", lit_did::boxed<TORCH_BOX(&lit_did::finish_token_partials_cpu)>);
  m.impl("sequence_reduction", lit_did::boxed<TORCH_BOX(&lit_did::sequence_reduction_cpu)>);
}

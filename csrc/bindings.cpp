// The operators' schemas and their CPU implementations, and the pybind11 module lit_did._C, which says what
// was built. Loading the module runs the registrations, those of csrc/cuda included; autograd and fake kernels are in
// lit_did/ops/fused.py.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <sstream>

#include "sequence_statistics.h"
#include "token_statistics.h"

TORCH_LIBRARY(lit_did, m) {
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
      "bool policy_needs_grad, bool reference_needs_grad, int first_entry=0) -> ()");
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

TORCH_LIBRARY_IMPL(lit_did, CPU, m) {
  m.impl("token_statistics", &lit_did::token_statistics_cpu);
  m.impl("token_statistics_backward", &lit_did::token_statistics_backward_cpu);
  m.impl("token_statistics_backward_", &lit_did::token_statistics_backward_inplace_cpu);
  m.impl("token_partials_", &lit_did::token_partials_cpu);
  m.impl("merge_token_partials_", &lit_did::merge_token_partials_cpu);
  m.impl("finish_token_partials", &lit_did::finish_token_partials_cpu);
  m.impl("sequence_reduction", &lit_did::sequence_reduction_cpu);
}

namespace {

// Compile definitions of a build with CUDA: its version, and its architectures separated by spaces.
pybind11::object cuda_version() {
#ifdef LIT_DID_CUDA_VERSION
  return pybind11::str(LIT_DID_CUDA_VERSION);
#else
  return pybind11::none();
#endif
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> architectures;
#ifdef LIT_DID_CUDA_ARCHITECTURES
  std::istringstream words(LIT_DID_CUDA_ARCHITECTURES);
  for (std::string word; words >> word;) architectures.push_back(word);
#endif
  return architectures;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of the extension holds; importing it registers torch.ops.lit_did.";
  m.attr("torch_version") = LIT_DID_TORCH_VERSION;
  m.attr("cuda_version") = cuda_version();
  m.attr("cuda_architectures") = cuda_architectures();
#if defined(INTRA_OP_PARALLEL)
  m.attr("parallel") = true;  // CPU operators use torch's threads
#else
  m.attr("parallel") = false;
#endif
  m.attr("simd_levels") = lit_did::cpu::simd_levels();
  m.def("simd_level", &lit_did::cpu::simd_level, "The instruction-set level in use on this processor.");
}

// The operators' schemas and their CPU implementations, and the pybind11 module lit_did._C, which tells what
// was built. Loading the module runs the registrations; autograd and fake kernels are in lit_did/ops/fused.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include "token_statistics.h"

TORCH_LIBRARY(lit_did, m) {
  m.def(
      "token_statistics(Tensor policy_logits, Tensor reference_logits, Tensor labels, int ignore_index, "
      "float temperature) -> (Tensor policy_logprob, Tensor reference_logprob, Tensor did_entropy, "
      "Tensor did_log_partition, Tensor policy_entropy, Tensor reference_entropy, Tensor kl, Tensor reverse_kl, "
      "Tensor normalizers)");
  m.def(
      "token_statistics_backward(Tensor?[] grads, Tensor policy_logits, Tensor reference_logits, Tensor labels, "
      "Tensor[] statistics, Tensor normalizers, int ignore_index, float temperature, bool policy_needs_grad, "
      "bool reference_needs_grad) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lit_did, CPU, m) {
  m.impl("token_statistics", &lit_did::token_statistics_cpu);
  m.impl("token_statistics_backward", &lit_did::token_statistics_backward_cpu);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of the extension holds; importing it registers torch.ops.lit_did.";
  m.attr("torch_version") = LIT_DID_TORCH_VERSION;
  m.attr("cuda_version") = pybind11::none();
  m.attr("cuda_architectures") = pybind11::list();
  m.attr("simd_levels") = lit_did::cpu::simd_levels();
  m.def("simd_level", &lit_did::cpu::simd_level, "The instruction-set level in use on this processor.");
}

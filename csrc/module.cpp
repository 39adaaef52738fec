// The pybind11 module lit_did._C: what was built. It needs no torch, so that lit_did/ops/extension.py can ask it before
// it loads the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/levels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build holds. The operators are in libraries of their own, in lit_did/lib.";
  m.attr("oldest_torch") = LIT_DID_OLDEST_TORCH;  // that the libraries run with
  m.attr("simd_levels") = lit_did::cpu::simd_levels();
  m.def("simd_level", &lit_did::cpu::simd_level,
        "The instruction-set level in use: the best that this processor has, or a lower one that LIT_DID_SIMD names.");
}

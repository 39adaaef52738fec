// The instruction-set levels: those in this build, those of this processor, the one in use. No torch here: the module
// lit_did._C has a copy too.
#pragma once

#include <string>
#include <vector>

namespace lit_did::cpu {

// Every level in this build, lowest first, whether or not this processor has it.
std::vector<std::string> simd_levels();

// The highest level that this processor has, or the one named by the environment variable LIT_DID_SIMD, read once.
// Raises std::invalid_argument where this processor has no such level.
const std::string& simd_level();

}  // namespace lit_did::cpu

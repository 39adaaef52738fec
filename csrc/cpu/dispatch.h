// Chooses the row kernels for this processor, once.
#pragma once

#include <string>
#include <vector>

#include "rows.h"

namespace lit_did::cpu {

// Tables in this build that this processor can run, lowest level first.
std::vector<const RowKernels*> usable_rows();

// The table in use: the highest usable level, or the one named by the environment variable LIT_DID_SIMD.
const RowKernels& rows();

// Every level in this build, whether or not this processor has it.
std::vector<std::string> simd_levels();

}  // namespace lit_did::cpu

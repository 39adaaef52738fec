// The row kernels of the instruction-set level in use, chosen once.
#pragma once

#include "rows.h"

namespace lit_did::cpu {

const RowKernels& rows();

}  // namespace lit_did::cpu

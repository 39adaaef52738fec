// The row kernels for the compiler's default instruction set (SSE2 on x86-64, NEON on arm64).
#include "rows_impl.h"

LIT_DID_ROW_TABLE(baseline_rows)

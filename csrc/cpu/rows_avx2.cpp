// The row kernels for -mavx2 -mfma -mf16c.
#include "rows_impl.h"

LIT_DID_ROW_TABLE(avx2_rows)

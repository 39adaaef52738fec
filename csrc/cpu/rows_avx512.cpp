// The row kernels for -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c.
#include "rows_impl.h"

LIT_DID_ROW_TABLE(avx512_rows)

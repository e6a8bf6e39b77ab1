// Up to 8 and up to 16 rows; the warps are also in qlora_kit/ops/nf4_linear/gemv.py.
#include "nf4_linear/gemv/backward.cuh"

GEMV_BACKWARD(nf4_gemv_transposed_8, BFloat16, 1, 10)
GEMV_BACKWARD(nf4_gemv_transposed_16, BFloat16, 2, 8)

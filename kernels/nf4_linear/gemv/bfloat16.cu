// Up to 8 and up to 16 rows; the warps are also in qlora_kit/ops/nf4_linear/gemv.py.
#include "nf4_linear/gemv/forward.cuh"

GEMV_FORWARD(nf4_gemv_8, BFloat16, 1, 11)
GEMV_FORWARD(nf4_gemv_16, BFloat16, 2, 7)

// 128 rows x 128 columns a block; the counts are also in qlora_kit/ops/nf4_linear/ahead.py.
#include "nf4_linear/hopper/ahead/product.cuh"

NF4_AHEAD(BFloat16, 128, 6)

// 128 rows x 256 columns a block; the counts are also in qlora_kit/ops/nf4_linear/ahead.py.
#include "nf4_linear/hopper/ahead/product.cuh"

NF4_AHEAD(BFloat16, 256, 4)

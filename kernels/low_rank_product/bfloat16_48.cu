// The kernels of low_rank_product.cuh for one dtype and rank: a model compiles no others.
#include "low_rank_product/low_rank_product.cuh"

LOW_RANK_PRODUCT(bfloat16, BFloat16, 48, 128, 64, 4)
LOW_RANK_PRODUCT(bfloat16, BFloat16, 48, 64, 64, 5)
LOW_RANK_PRODUCT(bfloat16, BFloat16, 48, 32, 128, 4)
LOW_RANK_PRODUCT_ADD(bfloat16, BFloat16, 48)

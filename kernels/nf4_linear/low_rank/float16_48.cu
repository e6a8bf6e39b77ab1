// The kernels of product.cuh for one dtype and rank: a model compiles no others.
#include "nf4_linear/low_rank/product.cuh"

LOW_RANK_PRODUCT(float16, Float16, 48, 128, 64, 4)
LOW_RANK_PRODUCT(float16, Float16, 48, 64, 128, 3)
LOW_RANK_PRODUCT_ADD(float16, Float16, 48)

// The kernels of low_rank_gradients.cuh for one dtype and rank: a model compiles no others.
#include "low_rank_gradients/low_rank_gradients.cuh"

LOW_RANK_GRADIENTS(bfloat16, BFloat16, 64, 64, 8, 4, 1)
LOW_RANK_GRADIENTS(bfloat16, BFloat16, 64, 64, 4, 3, 2)
LOW_RANK_GRADIENTS_ADD(bfloat16, BFloat16)

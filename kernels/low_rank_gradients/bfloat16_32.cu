// The kernels of low_rank_gradients.cuh for one dtype and rank: a model compiles no others.
#include "low_rank_gradients/low_rank_gradients.cuh"

LOW_RANK_GRADIENTS(bfloat16, BFloat16, 32, 128, 8, 3, 1)
LOW_RANK_GRADIENTS(bfloat16, BFloat16, 32, 64, 4, 4, 2)
LOW_RANK_GRADIENTS_ADD(bfloat16, BFloat16)

// The kernels of low_rank_gradients.cuh for one dtype and rank: a model compiles no others.
#include "low_rank_gradients/low_rank_gradients.cuh"

LOW_RANK_GRADIENTS(float16, Float16, 16, 128, 8, 4, 1)
LOW_RANK_GRADIENTS(float16, Float16, 16, 64, 8, 4, 2)
LOW_RANK_GRADIENTS(float16, Float16, 16, 64, 16, 4, 1)
LOW_RANK_GRADIENTS_ADD(float16, Float16)

// The kernels of cross_entropy.cuh for one dtype: a model uses one, and compiles no other.
#include "cross_entropy/cross_entropy.cuh"

CROSS_ENTROPY_ALL(float32, Float32)

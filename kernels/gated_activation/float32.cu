// The kernels of gated_activation.cuh for one dtype: a model uses one, and compiles no other.
#include "gated_activation/gated_activation.cuh"

GATED_ACTIVATION_ALL(float32, Float32)

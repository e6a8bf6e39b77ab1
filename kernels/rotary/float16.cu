// The kernels of rotary.cuh for one dtype: a model uses one, and compiles no other.
#include "rotary/rotary.cuh"

ROTARY_ALL(float16, Float16)

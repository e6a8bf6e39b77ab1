// The kernels of rms_norm.cuh for one dtype: a model uses one, and compiles no other.
#include "rms_norm/rms_norm.cuh"

RMS_NORM_ALL(bfloat16, BFloat16)

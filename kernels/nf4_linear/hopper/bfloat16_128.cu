// The fused product for 128 tokens a block; the counts are also in ops/nf4_linear/hopper.py.
#include "nf4_linear/hopper/fused.cuh"

NF4_FUSED(BFloat16, 128, 6, 2, 2)

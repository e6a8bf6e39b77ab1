// The fused product for 8 tokens a block; the counts are also in ops/nf4_linear/hopper.py.
#include "nf4_linear/hopper/fused.cuh"

NF4_FUSED(BFloat16, 8, 12, 4, 2)

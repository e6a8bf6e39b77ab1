// The fused product for 32 tokens a block; the counts are also in ops/nf4_linear/hopper.py.
#include "nf4_linear/hopper/fused.cuh"

NF4_FUSED(Float16, 32, 10, 4, 2)

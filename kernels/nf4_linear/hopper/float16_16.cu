// The fused product for 16 tokens a block; the counts are also in ops/nf4_linear/hopper.py.
#include "nf4_linear/hopper/fused.cuh"

NF4_FUSED(Float16, 16, 12, 4, 2)

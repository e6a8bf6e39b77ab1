// 16 tokens x 256 columns a block; the counts are also in qlora_kit/ops/nf4_linear/hopper.py.
#include "nf4_linear/hopper/fused.cuh"

NF4_FUSED(Float16, 16, 11, 4, 2)

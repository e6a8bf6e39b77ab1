// out = factor of its row x scale, for every block of an NF4 weight whose rows are whole blocks.
// Shapes    absmax (blocks) u8 or f32, nested (blocks / 256, rounded up), factors (rows), out
//           (blocks) f32; a row has `per_row` blocks
// Requires  sm_80+, fewer than 2^31 blocks; checked in qlora_kit/ops/nf4_scales/cuda.py
// Tile      one scale per thread and turn
// Numerics  the scale as the format has it (f32 product and sum), then one f32 product: the
//           reference's bits
// Truth     qlora_kit/ops/nf4_scales/reference.py
#include "common/convert.cuh"
#include "common/nf4.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    nf4_scales(const void* absmax, const float* nested, const float* offset, const float* factors,
               float* out, long long blocks, long long per_row) {
    __shared__ float map[256];
    const NF4Scales scales{absmax, nested, offset, 0};
    const float mean = scales.mean();
    map[threadIdx.x] = DYNAMIC_MAP_VALUES[threadIdx.x];
    __syncthreads();
    const u32 count = static_cast<u32>(blocks), width = static_cast<u32>(per_row);
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS)
        out[i] = __fmul_rn(scales.decode(scales.load_block(i), mean, map),
                           __ldg(factors + i / width));
}

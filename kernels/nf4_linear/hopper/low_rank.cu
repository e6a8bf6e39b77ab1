// The low-rank factor's own product: small = scale * activations F, begun early so that the fused
// product that follows can start beside it.
// Shapes    activations (M,C) | factor (r,C), or transposed (C,r) | small (M,r)
// Requires  sm_90a, C % 8 == 0, 16-byte alignment; checked in qlora_kit/ops/nf4_linear/hopper.py
// Tile      16 tokens x 16 ranks per cluster, whose warps share the contraction, 32 a step each. A
//           thread takes 8 neighbours of a row on both sides: the same permutation of the sum's
//           order for both operands of mma.
// Numerics  f32 accumulate, fixed order, one rounding after the scale: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
#include "common/convert.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"

constexpr int SMALL = 16;  // tokens and ranks per block of the low-rank product
constexpr int SMALL_WARPS = 8;

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void low_rank_product(const u16* x, const u16* factor, u16* small,
                                                 int m, int contraction, int rank, float scale) {
    __shared__ float sums[SMALL_WARPS + 1][SMALL][SMALL + 4];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const u32 block = cluster_rank(), blocks = cluster_size();
    const int token = blockIdx.x / blocks * SMALL, first = blockIdx.y * SMALL;
    launch_next_kernel();
    float c[2][4] = {};
    const int stride = 32 * SMALL_WARPS * blocks;
#pragma unroll 2
    for (int k = 32 * (warp + SMALL_WARPS * block) + 8 * q; k < contraction; k += stride) {
        uint4 a[2], b[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long row = token + g + 8 * h;
            a[h] = row < m ? __ldg(reinterpret_cast<const uint4*>(x + row * contraction + k))
                           : uint4{0, 0, 0, 0};
            const long long r = first + g + 8 * h;
            if (!TRANSPOSED) {
                b[h] = r < rank ? __ldg(reinterpret_cast<const uint4*>(factor + r * contraction + k))
                                : uint4{0, 0, 0, 0};
            } else {
                u32 column[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    column[i] = r < rank ? __ldg(factor + (k + i) * static_cast<long long>(rank) + r)
                                         : u16(0);
                b[h] = {column[0] | column[1] << 16, column[2] | column[3] << 16,
                        column[4] | column[5] << 16, column[6] | column[7] << 16};
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Mma::run<T>(c[h], {a[0].x, a[1].x, a[0].y, a[1].y}, b[h].x, b[h].y);
            Mma::run<T>(c[h], {a[0].z, a[1].z, a[0].w, a[1].w}, b[h].z, b[h].w);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][g + 8 * (i / 2)][8 * h + 2 * q + i % 2] = c[h][i];
    __syncthreads();
    const int row = threadIdx.x / SMALL, column = threadIdx.x % SMALL;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < SMALL_WARPS; ++w) sum += sums[w][row][column];
    float& own = sums[SMALL_WARPS][row][column];
    own = sum;
    sync_cluster();
    if (block == 0) {
        for (u32 r = 1; r < blocks; ++r) sum += read_peer_one(shared_address(&own), r);
        if (token + row < m && first + column < rank)
            small[static_cast<long long>(token + row) * rank + first + column] =
                static_cast<u16>(T::pack(sum * scale, 0.f));
    }
    sync_cluster();  // nobody leaves while its sums are being read
}

#define LOW_RANK(NAME, T, TRANSPOSED)                                                             \
    extern "C" __global__ void __launch_bounds__(32 * SMALL_WARPS)                                \
        NAME(const u16* x, const u16* factor, u16* small, long long m, long long contraction,     \
             long long rank, float scale) {                                                       \
        low_rank_product<T, TRANSPOSED>(x, factor, small, static_cast<int>(m),                    \
                                        static_cast<int>(contraction), static_cast<int>(rank),    \
                                        scale);                                                   \
    }

LOW_RANK(nf4_low_rank_bfloat16, BFloat16, false)
LOW_RANK(nf4_low_rank_transposed_bfloat16, BFloat16, true)
LOW_RANK(nf4_low_rank_float16, Float16, false)
LOW_RANK(nf4_low_rank_transposed_float16, Float16, true)

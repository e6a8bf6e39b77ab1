// The low-rank factor's own product: small = scale * activations F, begun early so that the fused
// product that follows can start beside it.
// Shapes    activations (M,C) | factor (r,C), or transposed (C,r) | small (M,r) | words that are set
//           to zero, counters of the kernel that follows
// Begins    while the kernel before it ends, for which it waits; so nothing is read through the path
//           for what stays the same as long as a kernel runs (ld.global.nc)
// Requires  sm_90a, C % 8 == 0, 16-byte alignment; checked in qlora_kit/ops/nf4_linear/hopper.py
// Tile      32 tokens x 16 ranks per cluster, whose warps share the contraction, 32 a step each. A
//           thread takes 8 neighbours of a row on both sides: the same permutation of the sum's
//           order for both operands of mma.
// Numerics  f32 accumulate, fixed order, one rounding after the scale: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
#include "common/convert.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"

constexpr int TOKENS = 32;
constexpr int RANKS = 16;
constexpr int WARPS = 8;
constexpr u32 MOST_BLOCKS = 8;  // of a cluster

// A thread's eight neighbours of the contraction, from row r of F's transpose.
template <bool TRANSPOSED>
__device__ __forceinline__ uint4 read_factor(const u16* factor, int contraction, int rank, int r,
                                             int k) {
    if (r >= rank) return {0, 0, 0, 0};
    if (!TRANSPOSED)
        return *reinterpret_cast<const uint4*>(factor + static_cast<long long>(r) * contraction + k);
    const u16* from = factor + static_cast<long long>(k) * rank + r;
    u32 v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = from[static_cast<long long>(i) * rank];
    return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void low_rank_product(const u16* x, const u16* factor, u16* small,
                                                 u32* zeros, int words, int m, int contraction,
                                                 int rank, float scale) {
    __shared__ float sums[WARPS][TOKENS][RANKS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const u32 block = cluster_rank(), blocks = cluster_size();
    const int token = blockIdx.x / blocks * TOKENS, first = blockIdx.y * RANKS;
    wait_for_previous_kernel();
    launch_next_kernel();  // which may rely on all that came before this one
    if (blockIdx.x + blockIdx.y == 0)
        for (int i = threadIdx.x; i < words; i += 32 * WARPS) zeros[i] = 0;
    float c[TOKENS / 16][2][4] = {};
    const int stride = 32 * WARPS * blocks;
#pragma unroll 2
    for (int base = 32 * (warp + WARPS * block); base < contraction; base += stride) {
        const int k = base + 8 * q;  // past the end for some lanes: they multiply zeros
        const bool inside = k < contraction;
        uint4 a[TOKENS / 8], b[2];
#pragma unroll
        for (int i = 0; i < TOKENS / 8; ++i) {
            const long long row = token + g + 8 * i;
            a[i] = inside && row < m
                       ? *reinterpret_cast<const uint4*>(x + row * contraction + k)
                       : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            b[h] = read_factor<TRANSPOSED>(factor, contraction, inside ? rank : 0,
                                           first + g + 8 * h, k);
#pragma unroll
        for (int tile = 0; tile < TOKENS / 16; ++tile)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint4 low = a[2 * tile], high = a[2 * tile + 1];
                Mma::run<T>(c[tile][h], {low.x, high.x, low.y, high.y}, b[h].x, b[h].y);
                Mma::run<T>(c[tile][h], {low.z, high.z, low.w, high.w}, b[h].z, b[h].w);
            }
    }
#pragma unroll
    for (int tile = 0; tile < TOKENS / 16; ++tile)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                sums[warp][16 * tile + 8 * (i / 2) + g][8 * h + 2 * q + i % 2] = c[tile][h][i];
    __syncthreads();
    // Two neighbours each; the block's sum replaces its first warp's.
    const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 2;
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        sum.x += sums[w][row][column];
        sum.y += sums[w][row][column + 1];
    }
    float* own = &sums[0][row][column];
    own[0] = sum.x;
    own[1] = sum.y;
    sync_cluster();
    if (block == 0) {
        float2 peer[MOST_BLOCKS];
#pragma unroll
        for (u32 r = 1; r < MOST_BLOCKS; ++r)  // all are on their way before one is added
            if (r < blocks) peer[r] = read_peer_pair(shared_address(own), r);
#pragma unroll
        for (u32 r = 1; r < MOST_BLOCKS; ++r)
            if (r < blocks) sum = {sum.x + peer[r].x, sum.y + peer[r].y};
        u16* to = small + static_cast<long long>(token + row) * rank + first + column;
        if (token + row < m && first + column < rank)
            *reinterpret_cast<u32*>(to) = T::pack(sum.x * scale, sum.y * scale);
    }
    meet_cluster();  // nobody leaves while its sums are being read
}

#define LOW_RANK(NAME, T, TRANSPOSED)                                                       \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                \
        NAME(const u16* x, const u16* factor, u16* small, u32* zeros, long long words,      \
             long long m, long long contraction, long long rank, float scale) {             \
        low_rank_product<T, TRANSPOSED>(x, factor, small, zeros, static_cast<int>(words),   \
                                        static_cast<int>(m), static_cast<int>(contraction), \
                                        static_cast<int>(rank), scale);                     \
    }

// Counters alone; the kernel that follows begins at once and waits before it counts.
extern "C" __global__ void __launch_bounds__(32 * WARPS) nf4_zeros(u32* zeros, long long words) {
    wait_for_previous_kernel();
    launch_next_kernel();
    for (int i = threadIdx.x; i < words; i += 32 * WARPS) zeros[i] = 0;
}

LOW_RANK(nf4_low_rank_bfloat16, BFloat16, false)
LOW_RANK(nf4_low_rank_transposed_bfloat16, BFloat16, true)
LOW_RANK(nf4_low_rank_float16, Float16, false)
LOW_RANK(nf4_low_rank_transposed_float16, Float16, true)

// The low-rank factor's own product: small = scale * activations F, begun early so that the fused
// product that follows can start beside it.
// Shapes    activations (M,C) | factor (r,C), or transposed (C,r) | small (M,r) | words that are
//           set to zero, counters of the kernel that follows
// Begins    while the kernel before it ends, for which it waits
// Requires  sm_90a, C % 8 == 0, 16-byte alignment; checked in qlora_kit/ops/nf4_linear/hopper.py
// Tile      32 tokens x 16 ranks per cluster, whose warps share the contraction: small.cuh
// Numerics  f32 accumulate, fixed order, one rounding after the scale: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
#include "nf4_linear/hopper/small.cuh"

constexpr int TOKENS = 32;
constexpr int WARPS = 8;
constexpr u32 MOST_BLOCKS = 8;  // of a cluster

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void low_rank_product(const u16* x, const u16* factor, u16* small,
                                                 u32* zeros, int words, int m, int contraction,
                                                 int rank, float scale) {
    __shared__ float sums[WARPS * TOKENS * RANKS];
    const int warp = threadIdx.x / 32;
    const u32 block = cluster_rank(), blocks = cluster_size();
    const int token = blockIdx.x / blocks * TOKENS, first = blockIdx.y * RANKS;
    wait_for_previous_kernel();
    launch_next_kernel();  // which may rely on all that came before this one
    if (blockIdx.x + blockIdx.y == 0)
        for (int i = threadIdx.x; i < words; i += 32 * WARPS) zeros[i] = 0;
    SmallTile<T, TRANSPOSED, TOKENS> part;
    part.template accumulate<2>(x, factor, m, contraction, rank, token, first,
                                warp + WARPS * block, WARPS * blocks);
    part.store(sums + warp * TOKENS * RANKS);
    __syncthreads();
    // Two neighbours each; the block's sum replaces its first warp's.
    const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 2;
    float2 sum = sum_of_warps<WARPS, TOKENS>(sums, threadIdx.x);
    float* own = sums + 2 * threadIdx.x;
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

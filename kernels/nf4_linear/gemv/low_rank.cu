// The low-rank factor's own product for few rows, small = scale * activations F, by blocks so small
// that they run beside the blocks of forward.cuh and backward.cuh, which begin meanwhile.
// Shapes    activations (m,C), m <= 16 | factor (r,C), or transposed (C,r) | small (m,r)
// Requires  sm_80+, C % 8 == 0, r % 8 == 0, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/gemv.py
// Tile      16 tokens x 16 ranks per cluster, whose warps share the contraction, 32 a step each.
//           Tokens are the 16-row operand of mma.m16n8k16, ranks the 8-column one. F (r,C): a
//           lane takes 8 neighbours of a row on both sides. F (C,r): a lane reads four neighbours
//           of a row, and movmatrix turns pairs of ranks into pairs of the contraction.
// Numerics  f32 accumulate, fixed order, one rounding after the scale: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
#include "nf4_linear/gemv/parts.cuh"

constexpr int WARPS = 4;
constexpr int TOKENS = 16, RANKS = 16;

__device__ __forceinline__ u32 transposed(u32 rows) {
    u32 columns;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
    return columns;
}

struct Operands {
    uint4 x[2];  // tokens g and g+8
    uint4 f[2];  // ranks g and g+8, or four lines of the transposed factor
};

// Elements k..k+31 of the contraction: lane 4g+q takes 8q..8q+7.
__device__ __forceinline__ Operands load(const u16* x, const u16* factor, int m, int contraction,
                                         int rank, int first, int k, int g, int q) {
    Operands o;
    const int at = k + 8 * q;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int token = g + 8 * h, r = first + g + 8 * h;
        const u16* from = x + static_cast<long long>(token) * contraction + at;
        const u16* line = factor + static_cast<long long>(r) * contraction + at;
        const bool inside = at < contraction;
        o.x[h] = inside && token < m ? __ldg(reinterpret_cast<const uint4*>(from))
                                     : uint4{0, 0, 0, 0};
        o.f[h] = inside && r < rank ? __ldg(reinterpret_cast<const uint4*>(line))
                                    : uint4{0, 0, 0, 0};
    }
    return o;
}

// The same elements in another order: lane 4g+q takes 16h + 2q, +1, +8, +9 of x, and of the factor
// ranks first+4q..first+4q+3 in the lines 16h + g and 16h + 8 + g.
__device__ __forceinline__ Operands load_transposed(const u16* x, const u16* factor, int m,
                                                    int contraction, int rank, int first, int k,
                                                    int g, int q) {
    u32 v[2][4];
    uint2 f[4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = g + 8 * h, at = k + 8 * i + 2 * q;
            const u16* from = x + static_cast<long long>(token) * contraction + at;
            v[h][i] = token < m && at < contraction ? __ldg(reinterpret_cast<const u32*>(from)) : 0;
        }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int line = k + 8 * i + g, r = first + 4 * q;
        const u16* from = factor + static_cast<long long>(line) * rank + r;
        f[i] = line < contraction && r < rank ? __ldg(reinterpret_cast<const uint2*>(from))
                                              : uint2{0, 0};
    }
    return {{{v[0][0], v[0][1], v[0][2], v[0][3]}, {v[1][0], v[1][1], v[1][2], v[1][3]}},
            {{f[0].x, f[1].x, f[2].x, f[3].x}, {f[0].y, f[1].y, f[2].y, f[3].y}}};
}

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void multiply(float (&c)[2][4], const Operands& o) {
    const uint4 low = o.x[0], high = o.x[1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint4 f = o.f[h];
        if (TRANSPOSED)
            f = {transposed(f.x), transposed(f.y), transposed(f.z), transposed(f.w)};
        Mma::run<T>(c[h], {low.x, high.x, low.y, high.y}, f.x, f.y);
        Mma::run<T>(c[h], {low.z, high.z, low.w, high.w}, f.z, f.w);
    }
}

template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void low_rank_product(const u16* x, const u16* factor, u16* small,
                                                 int m, int contraction, int rank, float scale) {
    __shared__ float sums[WARPS][TOKENS][RANKS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const int block = own_rank(), blocks = peers(), first = blockIdx.y * RANKS;
    wait_for_previous();
    let_next_start();  // whoever starts now knows that all before this kernel has ended
    float c[2][4] = {};
    const int stride = 32 * WARPS * blocks;
#pragma unroll 2
    for (int k = 32 * (warp + WARPS * block); k < contraction; k += stride) {
        const Operands o =
            TRANSPOSED ? load_transposed(x, factor, m, contraction, rank, first, k, g, q)
                       : load(x, factor, m, contraction, rank, first, k, g, q);
        multiply<T, TRANSPOSED>(c, o);
    }
    // Column j of half h is rank 8h + j, or, from four neighbours a lane, 4 (j / 2) + 2h + j % 2.
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[warp][8 * (i / 2) + g][TRANSPOSED ? 4 * q + 2 * h + i % 2 : 8 * h + 2 * q + i % 2] =
                c[h][i];
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
    if (blocks > 1) meet_peers();
    if (block == 0) {
        for (int r = 1; r < blocks; ++r) {
            sum.x += peer_value(own, r);
            sum.y += peer_value(own + 1, r);
        }
        u16* to = small + static_cast<long long>(row) * rank + first + column;
        if (row < m && first + column < rank)
            *reinterpret_cast<u32*>(to) = T::pack(sum.x * scale, sum.y * scale);
    }
    if (blocks > 1) meet_peers();  // nobody leaves while its sums are being read
}

#define LOW_RANK(NAME, T, TRANSPOSED)                                                             \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, 8)                                   \
        NAME(const u16* x, const u16* factor, u16* small, long long m, long long contraction,     \
             long long rank, float scale) {                                                       \
        low_rank_product<T, TRANSPOSED>(x, factor, small, static_cast<int>(m),                    \
                                        static_cast<int>(contraction), static_cast<int>(rank),    \
                                        scale);                                                   \
    }

LOW_RANK(nf4_gemv_low_rank_bfloat16, BFloat16, false)
LOW_RANK(nf4_gemv_low_rank_transposed_bfloat16, BFloat16, true)
LOW_RANK(nf4_gemv_low_rank_float16, Float16, false)
LOW_RANK(nf4_gemv_low_rank_transposed_float16, Float16, true)

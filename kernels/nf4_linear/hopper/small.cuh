// The low-rank factor's own product, small = scale * activations F: of a tile of tokens and 16
// ranks, by all warps of a block. Made by a kernel of its own (low_rank.cu), or by the first
// clusters of the fused product, for whose last steps it is there in time.
// Shapes    activations (M,C) | factor (r,C), or transposed (C,r) | small (M,r)
// Requires  C % 8 == 0, r % 8 == 0, 16-byte alignment
// How       tokens are the 16-row operand of mma.m16n8k16, ranks the 8-column one, 32 of the
//           contraction a step. A lane takes 8 neighbours of a row of activations, the same
//           permutation of the sum's order for both operands. F (r,C): the same of its rows.
//           F (C,r): a lane reads four neighbours of a row, and movmatrix turns pairs of ranks into
//           pairs of the contraction.
// Loads     plain ones: what is read may have been written by the kernel that ends while this one
//           begins, and ld.global.nc is for what stays the same as long as a kernel runs
// Numerics  f32 accumulate, fixed order, one rounding after the scale: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
#pragma once
#include "common/counters.cuh"
#include "common/mma.cuh"
#include "nf4_linear/hopper/shape.cuh"

constexpr int RANKS = 16;      // of a tile
constexpr int MOST_PARTS = 8;  // of all tiles, where blocks share them

// What the first clusters of a launch make, and where those who need it learn that it is there.
struct Small {
    const u16* x;       // activations
    const u16* factor;  // null: another kernel makes it
    u16* out;
    float* partial;  // sums of parts: MOST_PARTS tiles of them
    // Tiles that are there, readers who have seen it, and of each tile its parts that are there:
    // zero before and after a launch.
    u32* words;
    float scale;
    u32 makers;  // clusters
};

__device__ __forceinline__ u32 transposed(u32 rows) {
    u32 columns;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
    return columns;
}

// Which of the 16 ranks element i of column pair q of half h is.
template <bool TRANSPOSED>
__device__ __forceinline__ int rank_of(int h, int q, int i) {
    return TRANSPOSED ? 4 * q + 2 * h + i : 8 * h + 2 * q + i;
}

template <typename T, bool TRANSPOSED, int TOKENS>
struct SmallTile {
    static constexpr int ROWS = TOKENS / 8;  // of a lane
    float c[TOKENS / 16][2][4];

    // Of 32 of the contraction.
    struct Operands {
        uint4 a[ROWS], b[2];
    };
    // Steps begin, begin + stride, ... of 32 of the contraction, so many on their way at once; past
    // the end they are zeros.
    template <int AHEAD>
    __device__ __forceinline__ void accumulate(const u16* x, const u16* factor, int m,
                                               int contraction, int rank, int token, int first,
                                               int begin, int stride) {
        const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        const int line = TRANSPOSED ? 8 * (g / 2) + g % 2 : 8 * q;
        const int r = first + (TRANSPOSED ? 4 * q : g);
        const u16* a = x + static_cast<long long>(token + g) * contraction + 8 * q;
        const u16* b = factor + (TRANSPOSED ? static_cast<long long>(line) * rank + r
                                            : static_cast<long long>(r) * contraction + line);
        const int rows = m - token - g, ranks = rank - r;  // left from this lane's first on
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) c[i / 8][i / 4 % 2][i % 4] = 0.f;
#pragma unroll 1
        for (int k = 32 * begin; k < contraction; k += 32 * stride * AHEAD) {
            Operands o[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = k + 32 * stride * i;
                load_a(o[i], a, contraction, at + 8 * q < contraction ? rows : 0, at);
                if (TRANSPOSED)
                    load_lines(o[i], b, rank, ranks > 0 ? contraction - line : 0, at);
                else
                    load_rows(o[i], b, contraction, at + line < contraction ? ranks : 0, at);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) multiply(o[i]);
        }
    }
    static __device__ __forceinline__ void load_a(Operands& o, const u16* from, int contraction,
                                                  int rows, int at) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            o.a[i] = 8 * i < rows
                         ? *reinterpret_cast<const uint4*>(from + at + 8ll * i * contraction)
                         : uint4{0, 0, 0, 0};
    }
    static __device__ __forceinline__ void load_rows(Operands& o, const u16* from, int contraction,
                                                     int ranks, int at) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
            o.b[h] = 8 * h < ranks
                         ? *reinterpret_cast<const uint4*>(from + at + 8ll * h * contraction)
                         : uint4{0, 0, 0, 0};
    }
    // Lines 2i and 2i+1 of eights.
    static __device__ __forceinline__ void load_lines(Operands& o, const u16* from, int rank,
                                                      int lines, int at) {
        uint2 f[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            f[i] = at + 2 * i < lines ? *reinterpret_cast<const uint2*>(
                                            from + static_cast<long long>(at + 2 * i) * rank)
                                      : uint2{0, 0};
        o.b[0] = {f[0].x, f[1].x, f[2].x, f[3].x};
        o.b[1] = {f[0].y, f[1].y, f[2].y, f[3].y};
    }
    __device__ __forceinline__ void multiply(const Operands& o) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint4 b = o.b[h];
            if (TRANSPOSED)
                b = {transposed(b.x), transposed(b.y), transposed(b.z), transposed(b.w)};
#pragma unroll
            for (int i = 0; i < TOKENS / 16; ++i) {
                const uint4 low = o.a[2 * i], high = o.a[2 * i + 1];
                Mma::run<T>(c[i][h], {low.x, high.x, low.y, high.y}, b.x, b.y);
                Mma::run<T>(c[i][h], {low.z, high.z, low.w, high.w}, b.z, b.w);
            }
        }
    }

    // This warp's sums, as [token][rank].
    __device__ __forceinline__ void store(float* sums) const {
        const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
#pragma unroll
        for (int tile = 0; tile < TOKENS / 16; ++tile)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    *reinterpret_cast<float2*>(sums + (16 * tile + 8 * i + g) * RANKS +
                                               rank_of<TRANSPOSED>(h, q, 0)) = {
                        c[tile][h][2 * i], c[tile][h][2 * i + 1]};
    }
};

// The sum of a tile's pair of neighbours over all warps.
template <int WARPS, int TOKENS>
__device__ __forceinline__ float2 sum_of_warps(const float* sums, int pair) {
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        const float2 add = *reinterpret_cast<const float2*>(sums + w * TOKENS * RANKS + 2 * pair);
        sum = {sum.x + add.x, sum.y + add.y};
    }
    return sum;
}

template <int TOKENS>
__device__ __forceinline__ int small_tiles(const Problem& p) {
    return (p.m + TOKENS - 1) / TOKENS * ((p.rank + RANKS - 1) / RANKS);
}

// By all threads of the first clusters' blocks. With fewer tiles than blocks, some share a tile's
// contraction: the last of them to leave its sums adds up all, in the order of the contraction.
// `sums` has room for all warps', and then for one word.
template <typename T, bool TRANSPOSED, typename S>
__device__ __forceinline__ void make_small(const Small& small, const Problem& p, float* sums) {
    constexpr int TOKENS = S::SMALL_TOKENS, WARPS = S::THREADS / 32 + 4;
    static_assert(TOKENS * RANKS / 2 <= 32 * WARPS, "a pair of sums for each thread");
    static_assert(WARPS * TOKENS * RANKS * 4 + 4 <= TABLE_BYTES, "no room");
    const int warp = threadIdx.x / 32, contraction = TRANSPOSED ? p.n : p.k;
    const int across = (p.rank + RANKS - 1) / RANKS, tiles = small_tiles<TOKENS>(p);
    const int blocks = small.makers * cluster_size();
    const int parts = max(1, min(blocks, MOST_PARTS) / tiles);
    u32* last = reinterpret_cast<u32*>(sums + WARPS * TOKENS * RANKS);
    wait_for_previous_kernel();
#pragma unroll 1
    for (int item = blockIdx.x; item < tiles * parts; item += blocks) {
        const int tile = item / parts, part = item % parts;
        const int token = tile / across * TOKENS, first = tile % across * RANKS;
        SmallTile<T, TRANSPOSED, TOKENS> product;
        product.template accumulate<S::SMALL_AHEAD>(small.x, small.factor, p.m, contraction, p.rank,
                                                    token, first, warp + WARPS * part,
                                                    WARPS * parts);
        product.store(sums + warp * TOKENS * RANKS);
        __syncthreads();
        const bool mine = threadIdx.x < TOKENS * RANKS / 2;
        float2 sum = {0.f, 0.f};
        if (mine) sum = sum_of_warps<WARPS, TOKENS>(sums, threadIdx.x);
        if (parts > 1) {
            float2* partial = reinterpret_cast<float2*>(small.partial) +
                              tile * parts * TOKENS * RANKS / 2 + threadIdx.x;
            if (mine) __stcg(partial + part * TOKENS * RANKS / 2, sum);
            __syncthreads();
            u32* arrived = small.words + 2 + tile;
            if (threadIdx.x == 0) {
                *last = add_in_order(arrived) == parts - 1;
                if (*last) *arrived = 0;
            }
            __syncthreads();
            if (!*last) continue;
            sum = {0.f, 0.f};
            for (int i = 0; i < parts && mine; ++i) {
                const float2 add = __ldcg(partial + i * TOKENS * RANKS / 2);
                sum = {sum.x + add.x, sum.y + add.y};
            }
        }
        const int row = token + threadIdx.x / (RANKS / 2);
        const int column = first + threadIdx.x % (RANKS / 2) * 2;
        if (mine && row < p.m && column < p.rank) {
            *reinterpret_cast<u32*>(small.out + static_cast<long long>(row) * p.rank + column) =
                T::pack(sum.x * small.scale, sum.y * small.scale);
            fence_global_copies();
        }
        __syncthreads();
        if (threadIdx.x == 0) add_one_released(small.words);
    }
}

// Until all of `small` is there and the copy engine may read it; by one thread of each of so many
// readers. Blocks get their room in the order of their numbers, so whoever waits here has
// seen the makers begin. The last reader sets the words back to zero.
template <int TOKENS>
__device__ __forceinline__ void wait_for_small(const Small& small, const Problem& p, u32 readers) {
    if (small.factor == nullptr) {
        wait_for_previous_kernel();  // which made it
        return;
    }
    const u32 tiles = small_tiles<TOKENS>(p);
    while (read_acquired(small.words) < tiles) continue;
    fence_global_copies();
    if (add_in_order(small.words + 1) == readers - 1) small.words[0] = small.words[1] = 0;
}

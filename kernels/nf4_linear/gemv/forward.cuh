// Y = X W^T + XA B^T + bias for few rows of X: W goes from global memory straight into fragments.
// Shapes    x (m,K) | packed (N*K/2) u8 | small (m,r) | factor (N,r) | out (m,N); m <= 8 or 16
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_80+, K % 64 == 0, N % 8 == 0, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/gemv.py
// Tile      16 rows of W x 128 of the contraction per warp and step; two such tiles with the same
//           columns share the fragments of X. Warps of a block, and blocks of a cluster, share the
//           contraction; a block goes over its rows of W in passes of two tiles.
// Fragments W is the 16-row operand of mma.m16n8k16, X the 8-column one. The order of the
//           contraction is free: lane 4g+q takes 32 neighbours q of each 128 on both sides, which
//           are 16 bytes of W in each of its rows g and g+8. No byte is read twice, none goes
//           through shared memory.
// Decode    one look-up per byte, 256 pairs of f32 once per lane: 2.5 instructions and 1/32 of a
//           shared-memory wavefront per weight. A step of 16 x 128 takes 64 wavefronts of look-ups,
//           8 of W, 1 to 8 of X, 3 for the map of 8-bit scales, 2 to hand scales round, 3 to load
//           them
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      swapped operands for skinny products: FLUTE, arXiv:2407.10960; Machete (vLLM)
#pragma once
#include "nf4_linear/gemv/small.cuh"

constexpr int MOST_TILES = 2;  // of a pass

template <typename T, int TOKEN_TILES, int WARPS>
struct Forward {
    static constexpr int THREADS = 32 * WARPS, TOKENS = 8 * TOKEN_TILES, TILES = MOST_TILES;
    static constexpr int PITCH = 16 * MOST_TILES + 4;
    static constexpr int SHARED = TABLE_BYTES + WARPS * TOKENS * PITCH * 4 + MAP_BYTES;

    struct Tile {
        uint4 w[2];               // rows g and g+8
        NF4Scales::Stored scale;  // of row g or g+8 (odd q) in block q / 2 of the two
    };

    const Problem& p;
    const u8* table;
    const float* map;
    float* sums;
    const int lane, warp, g, q;
    float mean;
    float c[TILES][TOKEN_TILES][4];
    // What a step multiplies, and what is on its way for the next one. One copy of all there is
    // waits for all that was asked for: a warp has too few scoreboards to wait for tiles one by
    // one, and would wait for those asked for last.
    struct Stage {
        Tile tiles[TILES];
        u32 x[TOKEN_TILES][16];
    };
    Stage now, next;

    __device__ __forceinline__ Forward(const Problem& problem, u8* memory)
        : p(problem),
          table(memory),
          map(reinterpret_cast<float*>(memory + SHARED - MAP_BYTES)),
          sums(reinterpret_cast<float*>(memory + TABLE_BYTES)),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          g(lane / 4),
          q(lane % 4) {}

    // Where this lane reads of a chunk's first eight rows. Lanes past the last column read what
    // others do: it meets zeros.
    struct Place {
        const u8* bytes;
        u32 block;
    };
    __device__ __forceinline__ Place place(int chunk) const {
        const int piece = 128 * chunk + 32 * q < p.k ? q : q - 2;
        return {p.packed + static_cast<long long>(g) * (p.k / 2) + 64 * chunk + 16 * piece,
                static_cast<u32>(g * (p.k / 64) + 2 * chunk + piece / 2)};
    }
    // In eights of rows; those past the end are the last one again.
    __device__ __forceinline__ void load(Tile& to, int tile, const Place& at) const {
        const u32 last = p.n / 8 - 1, first = 2 * tile, second = min(first + 1, last);
        const u32 octet_bytes = 4 * p.k;
        to.w[0] = stream16(at.bytes + static_cast<u64>(first) * octet_bytes);
        to.w[1] = stream16(at.bytes + static_cast<u64>(second) * octet_bytes);
        to.scale = stream_scale(p.scales, at.block + (q & 1 ? second : first) * (p.k / 8));
    }

    __device__ __forceinline__ void load_x(u32 (&x)[TOKEN_TILES][16], int chunk) const {
        const int column = 128 * chunk + 32 * q;
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            const int token = 8 * tile + g;
            const bool present = token < p.m && column < p.k;
            const uint4* from =
                reinterpret_cast<const uint4*>(p.x + static_cast<long long>(token) * p.k + column);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                *reinterpret_cast<uint4*>(&x[tile][4 * i]) = present ? from[i] : uint4{0, 0, 0, 0};
        }
    }

    __device__ __forceinline__ void load(Stage& to, int first, int count, int chunk) const {
        if (count <= 0) return;
        const Place at = place(chunk);
#pragma unroll
        for (int t = 0; t < TILES; ++t)
            if (t < count) load(to.tiles[t], first + t, at);
        load_x(to.x, chunk);
    }

    __device__ __forceinline__ void multiply(float (&sum)[TOKEN_TILES][4], const Tile& tile,
                                             const u32 (&x)[TOKEN_TILES][16]) const {
        const u32 all = 0xffffffffu, lane_offset = 8 * lane;
        const float mine = p.scales.decode(tile.scale, mean, map);
        const float scale[2] = {__shfl_sync(all, mine, lane & ~1),
                                __shfl_sync(all, mine, lane | 1)};
#pragma unroll
        for (int j = 0; j < 8; ++j) {  // four weights of each row per product
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 w = tile.w[i & 1];
                const u32 word = j / 2 == 0 ? w.x : j / 2 == 1 ? w.y : j / 2 == 2 ? w.z : w.w;
                const float2 v = look_up(table, word, 2 * (j & 1) + i / 2, lane_offset);
                a[i] = T::pack(__fmul_rn(v.x, scale[i & 1]), __fmul_rn(v.y, scale[i & 1]));
            }
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t)
                Mma::run<T>(sum[t], a, x[t][2 * j], x[t][2 * j + 1]);
        }
    }

    // This warp's sums as [warp][token][row].
    __device__ __forceinline__ void store() {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = 8 * t + 2 * q + i;
                if (token >= p.m) continue;
                float* to = sums + (warp * TOKENS + token) * PITCH + g;
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    to[16 * tile] = c[tile][t][i];
                    to[16 * tile + 8] = c[tile][t][2 + i];
                }
            }
    }

    // Adds the warps' sums of a pass, then those of the cluster; this block's share of the result.
    __device__ __forceinline__ void write(int first, int count, int rank, int ranks) {
        const int rows = 16 * count;
        if (ranks > 1) {
            for (int i = threadIdx.x; i < rows * p.m; i += THREADS) {
                float* own = sums + i / rows * PITCH + i % rows;
                float sum = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += own[w * TOKENS * PITCH];
                *own = sum;
            }
            meet_peers();
        }
        for (int i = threadIdx.x; i < rows * p.m; i += THREADS) {
            const int token = i / rows, row = 16 * first + i % rows;
            if (row >= p.n || (ranks > 1 && i / 32 % ranks != rank)) continue;
            const float* own = sums + token * PITCH + i % rows;
            float sum = 0.f;
            if (ranks > 1) {
                for (int r = 0; r < ranks; ++r) sum += peer_value(own, r);
            } else {
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += own[w * TOKENS * PITCH];
            }
            if (p.small != nullptr)
                sum += low_rank_dot<T>(p.small + token * p.rank,
                                       p.factor + static_cast<long long>(row) * p.rank, p.rank);
            if (p.bias != nullptr) sum += T::read(p.bias[row]);
            p.out[static_cast<long long>(token) * p.n + row] = static_cast<u16>(T::pack(sum, 0.f));
        }
    }

    // The low-rank factor's rows of this block, on their way to L2 while W is multiplied.
    __device__ __forceinline__ void prefetch_factor(int first, int last) const {
        if (p.small == nullptr) return;
        const u8* from = reinterpret_cast<const u8*>(p.factor + 16ll * first * p.rank);
        const int bytes = (min(16 * last, p.n) - 16 * first) * p.rank * 2;
        for (int i = 128 * threadIdx.x; i < bytes; i += 128 * THREADS) prefetch_l2(from + i);
    }

    __device__ __forceinline__ void run(u8* memory, const Small& small) {
        const int ranks = peers(), rank = own_rank();
        const int group = blockIdx.x / ranks, groups = gridDim.x / ranks;
        const int all = (p.n + 15) / 16, chunks = (p.k + 127) / 128;
        int first = static_cast<int>(static_cast<long long>(all) * group / groups);
        const int last = static_cast<int>(static_cast<long long>(all) * (group + 1) / groups);
        const int begin = chunks * rank / ranks + warp, end = chunks * (rank + 1) / ranks;
        int passes = (last - first + TILES - 1) / TILES;
        int count = passes > 0 ? (last - first + passes - 1) / passes : 0;
        // While the last blocks of the kernel ahead end.
        fill_tables<THREADS>(memory, memory + SHARED - MAP_BYTES, threadIdx.x);
        wait_for_previous();
        if (begin < end) load(next, first, count, begin);
        mean = p.scales.mean();
        prefetch_factor(first, last);
        meet<THREADS>();
        bool waiting = small.factor != nullptr;

#pragma unroll 1
        for (; passes > 0; --passes) {
            const int left = last - first - count;
            const int next_count = passes > 1 ? (left + passes - 2) / (passes - 1) : 0;
#pragma unroll
            for (int i = 0; i < TILES * TOKEN_TILES * 4; ++i)
                c[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4] = 0.f;
#pragma unroll 1
            for (int chunk = begin; chunk < end; chunk += WARPS) {
                now = next;
                __syncwarp();
                const bool more = chunk + WARPS < end;
                load(next, more ? first : first + count, more ? count : next_count,
                     more ? chunk + WARPS : begin);
#pragma unroll
                for (int t = 0; t < TILES; ++t)
                    if (t < count) multiply(c[t], now.tiles[t], now.x);
            }
            store();
            if (waiting && warp == 0) wait_for_small<T>(small, p.x, p.m, p.k, p.rank);
            meet<THREADS>();
            if (waiting && threadIdx.x == THREADS - 1) leave_small(small);
            waiting = false;
            write(first, count, rank, ranks);
            if (passes > 1) meet<THREADS>();
            first += count;
            count = next_count;
        }
        if (ranks > 1) leave_peers();  // nobody leaves while its sums are being read
    }
};

template <typename T, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void forward(const Problem& p, const Small& small) {
    extern __shared__ __align__(128) u8 memory[];
    let_next_start();
    if (threadIdx.x >= 32 * WARPS) {
        wait_for_previous();
        make_small<T>(small, p.x, p.m, p.k, p.rank);
        return;
    }
    Forward<T, TOKEN_TILES, WARPS>(p, memory).run(memory, small);
}

#define GEMV_FORWARD(NAME, T, TOKEN_TILES, WARPS)                                                 \
    extern "C" __global__ void __maxnreg__(REGISTERS<WARPS>)                                      \
        NAME(const u16* x, const u8* packed, const void* absmax, const float* nested,             \
             const float* offset, const u16* bias, u16* low, const u16* factor, u16* out,         \
             const u16* other, float* partial, u32* state, long long m, long long n, long long k, \
             long long rank, long long makers, float scale) {                                     \
        const Problem p{x,                                                                        \
                        packed,                                                                   \
                        NF4Scales{absmax, nested, offset, 6},                                     \
                        bias,                                                                     \
                        low,                                                                      \
                        factor,                                                                   \
                        out,                                                                      \
                        static_cast<int>(m),                                                      \
                        static_cast<int>(n),                                                      \
                        static_cast<int>(k),                                                      \
                        static_cast<int>(rank)};                                                  \
        forward<T, TOKEN_TILES, WARPS>(                                                           \
            p, Small{other, partial, low, state, scale, static_cast<int>(makers)});               \
    }

// dX = dY W + dYB A for few rows of dY: the transposed product of forward.cuh.
// Shapes    x, which is dY (m,N) | packed (N*K/2) u8 | small (m,r) | factor (r,K) | out (m,K)
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_80+, K % 64 == 0, N % 8 == 0, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/gemv.py
// Tile      16 rows of W x 128 of its columns per warp and step, as eight fragments whose 16 rows
//           are columns of W. Warps of a block take one, two or four neighbouring 128 columns and
//           share the rows of W; so do blocks of a cluster.
// Fragments a byte holds two neighbours along K: rows g and g+8 of a fragment. Lane 4g+q takes, of
//           the contraction's 16, rows 4q..4q+3 of W, and of each the 8 bytes g of 64: byte b is
//           fragment b's. So a lane's loads are its fragments, as in forward.cuh.
// Decode    as in forward.cuh; scales vary along the contraction, so each weight is scaled before
//           it is rounded, which costs nothing more. A step of 16 x 128 needs 32 scales: one a lane
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
#pragma once
#include "nf4_linear/gemv/small.cuh"

template <typename T, int TOKEN_TILES, int WARPS>
struct Backward {
    static constexpr int THREADS = 32 * WARPS, TOKENS = 8 * TOKEN_TILES, AHEAD = 2;
    static constexpr int COLUMNS = 128, PITCH = COLUMNS + 4;
    static constexpr int SUM_BYTES = WARPS * TOKENS * PITCH * 4;
    static constexpr int SHARED =
        (SUM_BYTES > TABLE_BYTES ? SUM_BYTES : TABLE_BYTES) + MAP_BYTES;

    struct Step {
        uint2 w[4];               // rows 4q..4q+3
        NF4Scales::Stored scale;  // of row lane / 2, block lane % 2
        uint2 x[TOKEN_TILES];     // token g, elements 4q..4q+3
    };

    const Problem& p;
    const u8* table;
    const float* map;
    float* sums;  // once the table has done its work
    const int lane, warp, g, q;
    float mean;
    float c[8][TOKEN_TILES][4];
    Step now[AHEAD], next[AHEAD];  // copied at once, as in forward.cuh

    __device__ __forceinline__ Backward(const Problem& problem, u8* memory)
        : p(problem),
          table(memory),
          map(reinterpret_cast<float*>(memory + SHARED - MAP_BYTES)),
          sums(reinterpret_cast<float*>(memory)),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          g(lane / 4),
          q(lane % 4) {}

    // Where this lane reads in the first step of its columns. Lanes past the last column or row read
    // what others do: it meets zeros, or is not written.
    struct Place {
        const u8* bytes;
        u32 block;
    };
    __device__ __forceinline__ Place place(int first) const {
        const int column = first + 16 * g, block = first / 64 + lane % 2;
        const int row = 4 * q < p.n ? 4 * q : 0, line = lane / 2 < p.n ? lane / 2 : 0;
        const u8* bytes = p.packed + static_cast<long long>(row) * (p.k / 2);
        return {bytes + (column < p.k ? column / 2 : 0),
                static_cast<u32>(line * (p.k / 64) + (block < p.k / 64 ? block : 0))};
    }
    // Rows past the last one, half of the last step's, are those of the first step.
    __device__ __forceinline__ void load(Step& to, int step, const Place& at) const {
        const int row = 16 * step + 4 * q;
        const u32 here = row < p.n ? step : 0, line = 16 * step + lane / 2 < p.n ? step : 0;
        const u8* from = at.bytes + static_cast<u64>(here) * static_cast<u32>(8 * p.k);
#pragma unroll
        for (int i = 0; i < 4; ++i) to.w[i] = stream8(from + i * static_cast<u64>(p.k / 2));
        to.scale = stream_scale(p.scales, at.block + line * (p.k / 4));
#pragma unroll
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            const int token = 8 * tile + g;
            const u16* values = p.x + static_cast<long long>(token) * p.n + row;
            const bool present = token < p.m && row < p.n;
            to.x[tile] = present ? __ldg(reinterpret_cast<const uint2*>(values)) : uint2{0, 0};
        }
    }

    __device__ __forceinline__ void multiply(const Step& step) {
        const u32 all = 0xffffffffu, lane_offset = 8 * lane;
        const float mine = p.scales.decode(step.scale, mean, map);
        float scale[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) scale[i] = __shfl_sync(all, mine, 8 * q + 2 * i + g / 4);
#pragma unroll
        for (int b = 0; b < 8; ++b) {
            u32 a[4];
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const uint2 even = step.w[2 * part], odd = step.w[2 * part + 1];
                const float2 v = look_up(table, b < 4 ? even.x : even.y, b % 4, lane_offset);
                const float2 w = look_up(table, b < 4 ? odd.x : odd.y, b % 4, lane_offset);
                const float s = scale[2 * part], t = scale[2 * part + 1];
                a[2 * part] = T::pack(__fmul_rn(v.x, s), __fmul_rn(w.x, t));
                a[2 * part + 1] = T::pack(__fmul_rn(v.y, s), __fmul_rn(w.y, t));
            }
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t)
                Mma::run<T>(c[b][t], a, step.x[t].x, step.x[t].y);
        }
    }

    // This warp's sums as [warp][token][16 b + 2 g + nibble]: no bank is met twice.
    __device__ __forceinline__ void store() {
#pragma unroll
        for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = 8 * t + 2 * q + i;
                if (token >= p.m) continue;
                float* to = sums + (warp * TOKENS + token) * PITCH + 2 * g;
#pragma unroll
                for (int b = 0; b < 8; ++b)
                    *reinterpret_cast<float2*>(to + 16 * b) = {c[b][t][i], c[b][t][2 + i]};
            }
    }

    __device__ __forceinline__ float2 low_rank(int token, int column) const {
        float2 sum = {0.f, 0.f};
        const u16* low = p.small + token * p.rank;
#pragma unroll 8
        for (int r = 0; r < p.rank; ++r) {
            const float v = T::read(read_fresh(low + r));
            const u32 pair = __ldg(reinterpret_cast<const u32*>(
                p.factor + static_cast<long long>(r) * p.k + column));
            sum.x += v * T::read(static_cast<u16>(pair));
            sum.y += v * T::read(static_cast<u16>(pair >> 16));
        }
        return sum;
    }

    // Two neighbours of a token each: the warps' sums, then the cluster's; this block's share.
    __device__ __forceinline__ void write(int first, int groups, int rank, int ranks) {
        const int pairs = groups * p.m * (COLUMNS / 2);
        if (ranks > 1) {
            for (int i = threadIdx.x; i < pairs; i += THREADS) {
                float2* own = own_pair(i, groups);
                *own = warps_sum(own, groups);
            }
            meet_peers();
        }
        for (int i = threadIdx.x; i < pairs; i += THREADS) {
            if (ranks > 1 && i / 32 % ranks != rank) continue;
            const int pair = i % (COLUMNS / 2), token = i / (COLUMNS / 2) % p.m;
            const int column = first + i / (COLUMNS / 2 * p.m) * COLUMNS + 16 * (pair % 8) +
                               2 * (pair / 8);
            if (column >= p.k) continue;
            const float2* own = own_pair(i, groups);
            float2 sum = {0.f, 0.f};
            if (ranks > 1) {
                for (int r = 0; r < ranks; ++r) {
                    sum.x += peer_value(&own->x, r);
                    sum.y += peer_value(&own->y, r);
                }
            } else {
                sum = warps_sum(own, groups);
            }
            if (p.small != nullptr) {
                const float2 add = low_rank(token, column);
                sum.x += add.x;
                sum.y += add.y;
            }
            *reinterpret_cast<u32*>(p.out + static_cast<long long>(token) * p.k + column) =
                T::pack(sum.x, sum.y);
        }
    }
    // Where warp `group`, the first with these columns, has a pair's sums.
    __device__ __forceinline__ float2* own_pair(int i, int groups) const {
        const int pair = i % (COLUMNS / 2), token = i / (COLUMNS / 2) % p.m;
        const int group = i / (COLUMNS / 2 * p.m);
        return reinterpret_cast<float2*>(sums + (group * TOKENS + token) * PITCH) + pair;
    }
    __device__ __forceinline__ float2 warps_sum(const float2* own, int groups) const {
        float2 sum = {0.f, 0.f};
#pragma unroll 4
        for (int w = 0; w < WARPS; w += groups) {
            const float2 add = own[w * (TOKENS * PITCH / 2)];
            sum.x += add.x;
            sum.y += add.y;
        }
        return sum;
    }

    __device__ __forceinline__ void prefetch_factor(int first, int columns) const {
        if (p.small == nullptr) return;
        const int lines = columns / 64;
        for (int i = threadIdx.x; i < p.rank * lines; i += THREADS) {
            const int column = first + i % lines * 64;
            if (column < p.k) prefetch_l2(p.factor + static_cast<long long>(i / lines) * p.k + column);
        }
    }

    __device__ __forceinline__ void run(u8* memory, int groups, const Small& small) {
        const int ranks = peers(), rank = own_rank();
        const int block_first = blockIdx.x / ranks * groups * COLUMNS;
        const int first = block_first + warp % groups * COLUMNS;
        const int all = (p.n + 15) / 16, stride = WARPS / groups;
        const int begin = static_cast<int>(static_cast<long long>(all) * rank / ranks);
        const int end = static_cast<int>(static_cast<long long>(all) * (rank + 1) / ranks);
        int step = begin + warp / groups;
        const Place at = place(first);
        // While the last blocks of the kernel ahead end.
        fill_tables<THREADS>(memory, memory + SHARED - MAP_BYTES, threadIdx.x);
        wait_for_previous();
#pragma unroll
        for (int d = 0; d < AHEAD; ++d)
            if (step + d * stride < end) load(next[d], step + d * stride, at);
        mean = p.scales.mean();
        prefetch_factor(block_first, groups * COLUMNS);
#pragma unroll
        for (int i = 0; i < 8 * TOKEN_TILES * 4; ++i)
            c[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4] = 0.f;
        meet<THREADS>();

#pragma unroll 1
        for (; step < end; step += AHEAD * stride) {
#pragma unroll
            for (int d = 0; d < AHEAD; ++d) now[d] = next[d];
            __syncwarp();
#pragma unroll
            for (int d = 0; d < AHEAD; ++d) {
                const int after = step + (AHEAD + d) * stride;
                if (after < end) load(next[d], after, at);
            }
#pragma unroll
            for (int d = 0; d < AHEAD; ++d)
                if (step + d * stride < end) multiply(now[d]);
        }
        meet<THREADS>();  // the table has done its work
        store();
        if (small.factor != nullptr && warp == 0)
            wait_for_small<T, true>(small, p.x, p.m, p.n, p.rank);
        meet<THREADS>();
        if (small.factor != nullptr && threadIdx.x == THREADS - 1) leave_small(small);
        write(block_first, groups, rank, ranks);
        if (ranks > 1) leave_peers();  // nobody leaves while its sums are being read
    }
};

template <typename T, int TOKEN_TILES, int WARPS>
__device__ __forceinline__ void backward(const Problem& p, const Small& small, int groups) {
    extern __shared__ __align__(128) u8 memory[];
    let_next_start();
    if (threadIdx.x >= 32 * WARPS) {
        wait_for_previous();
        make_small<T, true>(small, p.x, p.m, p.n, p.rank);
        return;
    }
    Backward<T, TOKEN_TILES, WARPS>(p, memory).run(memory, groups, small);
}

#define GEMV_BACKWARD(NAME, T, TOKEN_TILES, WARPS)                                                \
    extern "C" __global__ void __maxnreg__(REGISTERS<WARPS>)                                      \
        NAME(const u16* x, const u8* packed, const void* absmax, const float* nested,             \
             const float* offset, u16* low, const u16* factor, u16* out, const u16* other,        \
             float* partial, u32* state, long long m, long long n, long long k, long long rank,   \
             long long makers, float scale, long long groups) {                                   \
        const Problem p{x,                                                                        \
                        packed,                                                                   \
                        NF4Scales{absmax, nested, offset, 6},                                     \
                        nullptr,                                                                  \
                        low,                                                                      \
                        factor,                                                                   \
                        out,                                                                      \
                        static_cast<int>(m),                                                      \
                        static_cast<int>(n),                                                      \
                        static_cast<int>(k),                                                      \
                        static_cast<int>(rank)};                                                  \
        backward<T, TOKEN_TILES, WARPS>(                                                          \
            p, Small{other, partial, low, state, scale, static_cast<int>(makers)},                \
            static_cast<int>(groups));                                                            \
    }

// Y = X dequant(W)^T + XA B^T + bias, and dX = dY dequant(W) + dYB A, in one pass over the output;
// W stays in 4 bits in global and shared memory, in either orientation.
// Shapes    forward:  x (m,depth) | packed (rows*depth/2) u8 | low (m,rank) | adapter (rows,rank)
//           backward: x (m,depth) | packed (depth*rows/2) u8 | low (m,rank) | adapter (rank,rows)
//           out (m,rows); row-major. Forward: depth = K, rows = N; backward: depth = N, rows = K
// Format    qlora_kit/quant/nf4.py and double_quant.py
// Requires  sm_80+, K % 64 == 0, N % 64 == 0, block size 64, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/portable.py
// Tile      128 rows x 32, 64 or 128 tokens x 64; 4 warps of 32 rows, so that each weight is
//           decoded once per block; 28 to 64 KiB of stages, 4 KiB of tables; 2 (128 tokens) or 3
//           blocks per processor
// Cost      of a step of 128 tokens: 512 products (1024 cycles of an A100's tensor cores), 4 x 650
//           instructions; shared memory serves 512 wavefronts of tokens, 256 of look-ups and 192
//           of copies and codes. Counted in the code for sm_80
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate. Several blocks may share
//           the depth: f32 partial sums, added in a fixed order by a second kernel: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      swapped operands, weights decoded into fragments: FLUTE, arXiv:2407.10960; Marlin,
//           arXiv:2408.11743
//
// Which weight is which row and column of a fragment is ours to choose, on both operands alike:
// - Lane 4g+q takes the contraction's elements 8q..8q+7 of each 32 as four pairs, for two products
//   of 16. So one 16-byte load feeds both with tokens, and forward one word of W has its 8 weights.
// - Lane 4g+q takes the four rows 4g..4g+3 of a warp's 32: rows g and g+8 of two fragments. So
//   it writes 8 adjacent bytes per token, and backward the nibbles of two adjacent bytes, which a
//   transposing ldmatrix moves as one 16-bit element, are its four rows.
#include "common/convert.cuh"
#include "common/mma.cuh"
#include "common/nf4.cuh"

constexpr int THREADS = 128;
constexpr int ROWS = 128;
constexpr int STEP = 64;  // of the contraction
constexpr int TOKEN_BYTES = STEP * 2;
constexpr int WEIGHT_BYTES = ROWS * STEP / 2;

// Two blocks of 128 tokens or three of fewer, with their tables, fill a processor's 164 KiB of
// shared memory, or its 100 KiB. portable.py passes the same numbers.
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 || __CUDA_ARCH__ == 1030
constexpr int FEW_TOKENS_BYTES = 44 * 1024, MANY_TOKENS_BYTES = 64 * 1024;
#else
constexpr int FEW_TOKENS_BYTES = 28 * 1024, MANY_TOKENS_BYTES = 44 * 1024;
#endif

struct Problem {
    const u16* x;
    const u8* packed;
    NF4Scales scales;
    const u16* bias;     // null: none
    const u16* low;      // the tokens' side of the low-rank product
    const u16* adapter;  // the rows' side
    u16* out;
    float* partial;  // (splits,m,rows); null: `out` is written, with the bias
    long long m, rows, depth;
    int rank;
    int steps;  // per split
};

// Where a token's 16-byte piece lies in a stage: no conflicts when a row is written, nor when
// lanes q read pieces q of token 2i and 2i+1.
__device__ __forceinline__ int token_at(int token, int piece) {
    return token * TOKEN_BYTES + ((piece ^ ((token & 1) << 2)) << 4);
}

// Where 16 bytes of W lie behind them. Forward: half `piece` of row `line`, grouped as one
// ldmatrix.x4 reads them. Backward: the 32 weights of warp `piece` in line `line`.
template <bool TRANSPOSED>
__device__ __forceinline__ int weight_at(int line, int piece) {
    if constexpr (TRANSPOSED) return line * 64 + ((piece ^ ((line >> 3) & 3)) << 4);
    const int warp = line >> 5, g = (line >> 2) & 7, tile = (line >> 1) & 1, p = line & 1;
    return warp * 1024 + tile * 512 + piece * 256 + p * 128 +
           ((g ^ (tile * 4 + p * 2 + piece)) << 4);
}

// Copies steps of both operands to shared memory.
template <bool TRANSPOSED, int TOKENS>
struct Stages {
    static constexpr int BYTES = TOKENS * TOKEN_BYTES + WEIGHT_BYTES;
    static constexpr int COUNT = (TOKENS < 128 ? FEW_TOKENS_BYTES : MANY_TOKENS_BYTES) / BYTES;
    static constexpr int TOKEN_LOADS = TOKENS * TOKEN_BYTES / 16 / THREADS;
    static_assert(COUNT >= 2, "one stage is read while another is written");

    const u16* x;
    const u8* packed;
    long long x_stride, packed_stride, packed_step;
    u32 x_to, packed_to;
    int tokens;  // present of those this thread loads
    bool present[2];

    __device__ __forceinline__ Stages(const Problem& problem, u32 shared, long long token,
                                      long long row, int t) {
        const int first = t >> 3, piece = t & 7;
        x = problem.x + (token + first) * problem.depth + piece * 8;
        x_stride = 16 * problem.depth;
        x_to = shared + token_at(first, piece);
        const long long left = problem.m - token - first;
        tokens = left <= 0 ? 0 : left > TOKENS ? TOKEN_LOADS : static_cast<int>((left + 15) >> 4);

        const int line = TRANSPOSED ? t >> 2 : t >> 1, part = TRANSPOSED ? t & 3 : t & 1;
        packed_to = shared + TOKENS * TOKEN_BYTES + weight_at<TRANSPOSED>(line, part);
        if constexpr (TRANSPOSED) {
            packed = problem.packed + line * (problem.rows / 2) + row / 2 + part * 16;
            packed_stride = 16 * problem.rows;
            packed_step = 32 * problem.rows;
            present[0] = present[1] = row + part * 32 < problem.rows;
        } else {
            packed = problem.packed + (row + line) * (problem.depth / 2) + part * 16;
            packed_stride = 32 * problem.depth;
            packed_step = 32;
            present[0] = row + line < problem.rows;
            present[1] = row + line + 64 < problem.rows;
        }
    }

    __device__ __forceinline__ void load(int slot, int step) const {
        const u32 to = slot * BYTES;
        const u16* from = x + static_cast<long long>(step) * STEP;
#pragma unroll
        for (int i = 0; i < TOKEN_LOADS; ++i)
            copy_async(x_to + to + i * 16 * TOKEN_BYTES, from + i * x_stride, i < tokens);
        const u8* weights = packed + step * packed_step;
#pragma unroll
        for (int i = 0; i < 2; ++i)
            copy_async(packed_to + to + i * 2048, weights + i * packed_stride, present[i]);
    }
};

// The block's 128 scales of a step, one per thread, read three steps ahead: forward one per row,
// backward one per line and 64 rows.
template <bool TRANSPOSED>
struct ScaleQueue {
    NF4Scales scales;
    NF4Scales::Stored next[2];
    long long block, stride;
    float mean;
    bool present;

    __device__ __forceinline__ ScaleQueue(const Problem& problem, long long row, int t)
        : scales(problem.scales), mean(problem.scales.mean()) {
        if constexpr (TRANSPOSED) {
            block = (t & 63) * (problem.rows / 64) + row / 64 + (t >> 6);
            stride = problem.rows;
            present = row + (t & 64) < problem.rows;
        } else {
            block = (row + t) * (problem.depth / 64);
            stride = 1;
            present = row + t < problem.rows;
        }
    }

    __device__ __forceinline__ NF4Scales::Stored load(int step, int last) const {
        if (!present || step >= last) return {0.f, 0};
        return scales.load((block + step * stride) * 64);
    }

    __device__ __forceinline__ float decode(NF4Scales::Stored stored, const float* map) const {
        return scales.decode(stored, mean, map);
    }
};

// Eight values of a row from `column` on, a multiple of 8; zeros past its end.
__device__ __forceinline__ uint4 eight(const u16* row, int column, int columns, bool present) {
    u32 pairs[4] = {};
    if (columns % 8 == 0) {
        if (present && column < columns) return *reinterpret_cast<const uint4*>(row + column);
    } else if (present) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < columns)
                pairs[i / 2] |= static_cast<u32>(row[column + i]) << (16 * (i & 1));
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// A warp's 32 rows by 32 of the contraction, as fragments of two products for two tiles.
struct Fragments {
    u32 a[2][2][4];

    // Pair i (of four) of row 2 * tile + p (of four).
    __device__ __forceinline__ u32& pair(int tile, int p, int i) {
        return a[tile][i >> 1][2 * (i & 1) + p];
    }

    template <typename T, bool TRANSPOSED>
    __device__ __forceinline__ void decode(const u32 (&words)[2][4], const float* scale, int half,
                                           const NF4Table& table, int lane) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int row = 0; row < 4; ++row) {
                const int tile = row >> 1, p = row & 1;
                const u32 word = TRANSPOSED ? words[half][i] : words[tile][2 * half + p];
                const int low = TRANSPOSED ? row : 2 * i, high = TRANSPOSED ? row + 4 : 2 * i + 1;
                const float low_scale = scale[TRANSPOSED ? 2 * i : row];
                const float high_scale = scale[TRANSPOSED ? 2 * i + 1 : row];
                pair(tile, p, i) = T::pack(__fmul_rn(table.at(word, low, lane), low_scale),
                                           __fmul_rn(table.at(word, high, lane), high_scale));
            }
        }
    }

    // The adapter's rows row..row+3, columns column..column+7.
    template <bool TRANSPOSED>
    __device__ __forceinline__ void load(const Problem& problem, long long row, int column) {
        const bool present = row < problem.rows;
        if constexpr (TRANSPOSED) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint2 line[2] = {};
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int at = column + 2 * i + h;
                    const u16* from = problem.adapter + at * problem.rows + row;
                    if (present && at < problem.rank)
                        line[h] = *reinterpret_cast<const uint2*>(from);
                }
                pair(0, 0, i) = __byte_perm(line[0].x, line[1].x, 0x5410);
                pair(0, 1, i) = __byte_perm(line[0].x, line[1].x, 0x7632);
                pair(1, 0, i) = __byte_perm(line[0].y, line[1].y, 0x5410);
                pair(1, 1, i) = __byte_perm(line[0].y, line[1].y, 0x7632);
            }
        } else {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const u16* from = problem.adapter + (row + r) * problem.rank;
                const uint4 pairs = eight(from, column, problem.rank, present);
                pair(r >> 1, r & 1, 0) = pairs.x;
                pair(r >> 1, r & 1, 1) = pairs.y;
                pair(r >> 1, r & 1, 2) = pairs.z;
                pair(r >> 1, r & 1, 3) = pairs.w;
            }
        }
    }

    // Multiplies with 8 tokens after 8 tokens. `tokens` points to this lane's piece of the first.
    template <typename T, int TOKENS>
    __device__ __forceinline__ void multiply(float (&c)[2][TOKENS / 8][4],
                                             const u8* tokens) const {
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            const uint4 b = *reinterpret_cast<const uint4*>(tokens + j * 8 * TOKEN_BYTES);
            Mma::run<T>(c[0][j], a[0][0], b.x, b.y);
            Mma::run<T>(c[1][j], a[1][0], b.x, b.y);
            Mma::run<T>(c[0][j], a[0][1], b.z, b.w);
            Mma::run<T>(c[1][j], a[1][1], b.z, b.w);
        }
    }
};

// c += adapter low^T, with the tokens' side in a stage that is not in use. Both sides are zero
// past the rank, so nothing but zeros meets there.
template <typename T, bool TRANSPOSED, int TOKENS>
__device__ __forceinline__ void low_rank(float (&c)[2][TOKENS / 8][4], const Problem& problem,
                                         u8* stage, long long token, long long row, int t) {
    const int lane = t & 31, g = lane >> 2, q = lane & 3;
    for (int first = 0; first < problem.rank; first += STEP) {
        if (first > 0) __syncthreads();  // the tokens before have been read
#pragma unroll 1
        for (int i = t; i < TOKENS * 8; i += THREADS) {
            const long long at = token + (i >> 3);
            const u16* from = problem.low + at * problem.rank;
            *reinterpret_cast<uint4*>(stage + token_at(i >> 3, i & 7)) =
                eight(from, first + (i & 7) * 8, problem.rank, at < problem.m);
        }
        __syncthreads();
#pragma unroll 1
        for (int half = 0; half < 2 && first + half * 32 < problem.rank; ++half) {
            Fragments fragments;
            fragments.load<TRANSPOSED>(problem, row, first + half * 32 + q * 8);
            fragments.multiply<T, TOKENS>(c, stage + token_at(g, half * 4 + q));
        }
    }
}

// Lane 4g+q writes rows row..row+3 of the tokens 2q and 2q+1 of each eight.
template <typename T, int TOKENS>
__device__ __forceinline__ void write(const float (&c)[2][TOKENS / 8][4], const Problem& problem,
                                      long long token, long long row, int q) {
    if (row >= problem.rows) return;
    float bias[4] = {};
    if (problem.partial == nullptr && problem.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) bias[i] = T::read(problem.bias[row + i]);
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const long long at = token + j * 8 + 2 * q + e;
            if (at >= problem.m) continue;
            const float4 sum = {c[0][j][e] + bias[0], c[0][j][2 + e] + bias[1],
                                c[1][j][e] + bias[2], c[1][j][2 + e] + bias[3]};
            if (problem.partial != nullptr) {
                float* to = problem.partial + (blockIdx.z * problem.m + at) * problem.rows + row;
                *reinterpret_cast<float4*>(to) = sum;
            } else {
                const uint2 packed = {T::pack(sum.x, sum.y), T::pack(sum.z, sum.w)};
                *reinterpret_cast<uint2*>(problem.out + at * problem.rows + row) = packed;
            }
        }
    }
}

// Grid: blocks of tokens, which share their weights, first; then blocks of rows; then splits.
template <typename T, bool TRANSPOSED, int TOKENS>
__device__ __forceinline__ void multiply(const Problem& problem) {
    extern __shared__ __align__(128) u8 stages[];
    __shared__ NF4Table table;
    __shared__ float map[256];
    __shared__ __align__(16) float scale[2][ROWS];
    using Copies = Stages<TRANSPOSED, TOKENS>;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5, g = lane >> 2, q = lane & 3;
    const long long token = static_cast<long long>(blockIdx.x) * TOKENS;
    const long long row = static_cast<long long>(blockIdx.y) * ROWS;
    const int total = static_cast<int>(problem.depth / STEP);
    const int first = blockIdx.z * problem.steps;
    const int last = first + problem.steps < total ? first + problem.steps : total;

    const Copies copies(problem, to_shared(stages), token, row, t);
#pragma unroll
    for (int s = 0; s < Copies::COUNT - 1; ++s) {
        if (first + s < last) copies.load(s, first + s);
        copy_commit();
    }
    ScaleQueue<TRANSPOSED> queue(problem, row, t);
    const NF4Scales::Stored now = queue.load(first, last);
    queue.next[0] = queue.load(first + 1, last);
    queue.next[1] = queue.load(first + 2, last);
    table.fill(t, THREADS);
    map[t] = DYNAMIC_MAP_VALUES[t];
    map[t + THREADS] = DYNAMIC_MAP_VALUES[t + THREADS];
    float c[2][TOKENS / 8][4] = {};
    if (problem.rank > 0 && blockIdx.z == 0) {
        u8* stage = stages + (Copies::COUNT - 1) * Copies::BYTES;
        low_rank<T, TRANSPOSED, TOKENS>(c, problem, stage, token, row + warp * 32 + g * 4, t);
    }
    __syncthreads();  // the map is complete
    scale[first & 1][t] = queue.decode(now, map);

    // Lane l of an ldmatrix names row l % 8 of matrix l / 8; see weight_at.
    const int weights =
        TRANSPOSED ? weight_at<true>((lane & 6) * 4 + (lane >> 3) * 2 + (lane & 1), warp)
                   : weight_at<false>(warp * 32 + (lane & 7) * 4 + ((lane >> 3) & 1), lane >> 4);
    int slot = 0;
#pragma unroll 1
    for (int step = first; step < last; ++step) {
        copy_wait<Copies::COUNT - 2>();
        __syncthreads();  // this step has arrived, the one before has been read by all
        const u8* stage = stages + slot * Copies::BYTES;
        const u32 packed = to_shared(stage) + TOKENS * TOKEN_BYTES;
        u32 words[2][4];
        load_matrices<TRANSPOSED>(words[0], packed + weights);
        load_matrices<TRANSPOSED>(words[1],
                                  packed + (TRANSPOSED ? weights + 2048 : (weights ^ 64) + 512));

        const int ahead = step + Copies::COUNT - 1;
        if (ahead < last) copies.load(slot == 0 ? Copies::COUNT - 1 : slot - 1, ahead);
        copy_commit();
        scale[(step + 1) & 1][t] = queue.decode(queue.next[0], map);
        queue.next[0] = queue.next[1];
        queue.next[1] = queue.load(step + 3, last);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float near[8];  // the scales of 4 rows, or of 8 lines
            const float* from = TRANSPOSED ? scale[step & 1] + (warp >> 1) * 64 + half * 32 + q * 8
                                           : scale[step & 1] + warp * 32 + g * 4;
#pragma unroll
            for (int i = 0; i < (TRANSPOSED ? 8 : 4); i += 4)
                *reinterpret_cast<float4*>(near + i) = *reinterpret_cast<const float4*>(from + i);
            Fragments fragments;
            fragments.decode<T, TRANSPOSED>(words, near, half, table, lane);
            fragments.multiply<T, TOKENS>(c, stage + token_at(g, half * 4 + q));
        }
        slot = slot == Copies::COUNT - 1 ? 0 : slot + 1;
    }
    write<T, TOKENS>(c, problem, token, row + warp * 32 + g * 4, q);
}

// out = the splits' partial sums, the first to the last, and the bias; four columns per thread.
template <typename T>
__device__ __forceinline__ void add_splits(const float* partial, const u16* bias, u16* out,
                                           long long m, long long rows, int splits) {
    const long long i = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * 4;
    if (i >= m * rows) return;
    float4 sum = *reinterpret_cast<const float4*>(partial + i);
    for (int split = 1; split < splits; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(partial + split * m * rows + i);
        sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
    }
    if (bias != nullptr) {
        const u16* from = bias + i % rows;
        sum = {sum.x + T::read(from[0]), sum.y + T::read(from[1]), sum.z + T::read(from[2]),
               sum.w + T::read(from[3])};
    }
    *reinterpret_cast<uint2*>(out + i) = {T::pack(sum.x, sum.y), T::pack(sum.z, sum.w)};
}

#define PORTABLE(NAME, T, TRANSPOSED, TOKENS, BLOCKS)                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                  \
        NAME(const u16* x, const u8* packed, const void* absmax, const float* nested,              \
             const float* offset, const u16* bias, const u16* low, const u16* adapter, u16* out,   \
             float* partial, long long m, long long rows, long long depth, long long rank,         \
             long long steps) {                                                                    \
        multiply<T, TRANSPOSED, TOKENS>({x, packed, {absmax, nested, offset, 6}, bias, low,        \
                                         adapter, out, partial, m, rows, depth,                    \
                                         static_cast<int>(rank), static_cast<int>(steps)});        \
    }

#define PORTABLE_ALL(DTYPE, T)                                                                     \
    PORTABLE(nf4_portable_##DTYPE##_32, T, false, 32, 3)                                           \
    PORTABLE(nf4_portable_##DTYPE##_64, T, false, 64, 3)                                           \
    PORTABLE(nf4_portable_##DTYPE##_128, T, false, 128, 2)                                         \
    PORTABLE(nf4_portable_transposed_##DTYPE##_32, T, true, 32, 3)                                 \
    PORTABLE(nf4_portable_transposed_##DTYPE##_64, T, true, 64, 3)                                 \
    PORTABLE(nf4_portable_transposed_##DTYPE##_128, T, true, 128, 2)                               \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        nf4_portable_add_##DTYPE(const float* partial, const u16* bias, u16* out, long long m,     \
                                 long long rows, long long splits) {                               \
        add_splits<T>(partial, bias, out, m, rows, static_cast<int>(splits));                      \
    }

PORTABLE_ALL(bfloat16, BFloat16)
PORTABLE_ALL(float16, Float16)

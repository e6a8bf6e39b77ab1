// out = scale X F: LoRA's small product of many rows, at the rate at which memory gives X.
// Shapes    X (m,k), F (k,r), out (m,r) in one dtype of bf16/fp16, any distance between rows. F is
//           stored as its transpose (r,k), a forward's A, or as it is (`turned`), a backward's B.
//           `both` (m,k+r), if not null, becomes X with the result behind it: X is read once
// Requires  sm_80+; k, r and all distances multiples of 8, 16-byte addresses, r <= RANK. Checked in
//           qlora_kit/ops/nf4_linear/low_rank.py
// Tile      TOKENS rows x RANK per team of blocks that share the contraction: COLUMNS of it a
//           stage, STAGES on their way. A warp takes 32 rows, so that F is read from shared
//           memory once for them; warps of the same rows share a stage's columns
// Cost      per byte of X, r / TOKENS bytes of F come from the L2 cache, so that many ranks need
//           tall tiles; blocks for the whole chip then come from cutting the contraction
// Numerics  f32 sums, added up over warps and then blocks in a fixed order, one rounding after the
//           scale: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
//
// A team is a cluster: it adds its sums up through its shared memory (sm_90 and later). Or it
// leaves them in `sums` (blocks of a team, m, RANK), and a second kernel adds them up.
#include "common/hopper.cuh"
#include "common/mma.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int TALL = 2;  // times 16 rows, of a warp

struct Operands {
    const u16* x;
    const u16* f;
    u16* out;
    u16* both;    // null, or where X and the result go side by side
    float* sums;  // null where a team is a cluster, or of one
    int m, k, r;
    long long x_stride, f_stride, out_stride, both_stride;
    int team;  // blocks that share a contraction
    float scale;
    u32* zeros;  // words that are set to zero, counters of the kernel that follows
    int words;
};

// Four ranks of a row's sums, rounded once.
template <typename T>
__device__ __forceinline__ void write_four(const Operands& of, int row, int rank, float4 sum) {
    const uint2 four = {T::pack(sum.x * of.scale, sum.y * of.scale),
                        T::pack(sum.z * of.scale, sum.w * of.scale)};
    *reinterpret_cast<uint2*>(of.out + row * of.out_stride + rank) = four;
    if (of.both != nullptr)
        *reinterpret_cast<uint2*>(of.both + row * of.both_stride + of.k + rank) = four;
}

// Where a 16-byte piece lies in a matrix of rows of PIECES: eight neighbouring rows of one column,
// which an ldmatrix reads, lie in different banks.
template <int PIECES>
__device__ __forceinline__ int piece_at(int row, int piece) {
    if constexpr ((PIECES & (PIECES - 1)) != 0) return (row * (PIECES | 1) + piece) * 16;
    constexpr int PER_LINE = PIECES < 8 ? 8 / PIECES : 1, MASK = PIECES < 8 ? PIECES - 1 : 7;
    return (row * PIECES + (piece ^ ((row / PER_LINE) & MASK))) * 16;
}

template <typename T, bool TURNED, int RANK, int TOKENS, int COLUMNS, int STAGES>
struct Block {
    static constexpr int BANDS = TOKENS / (16 * TALL);  // of rows
    static constexpr int SHARERS = WARPS / BANDS;       // warps of a band
    static constexpr int PIECES = COLUMNS / 8, RANK_PIECES = RANK / 8;
    static constexpr int AT_ONCE = THREADS / PIECES;  // rows of X that a copy of all threads brings
    static constexpr int X_BYTES = TOKENS * COLUMNS * 2;
    static constexpr int F_LINE = RANK_PIECES & (RANK_PIECES - 1) ? RANK_PIECES | 1 : RANK_PIECES;
    static constexpr int STAGE_BYTES = X_BYTES + COLUMNS * (TURNED ? F_LINE : RANK_PIECES) * 16;
    static_assert(TOKENS % AT_ONCE == 0 && COLUMNS / 16 % SHARERS == 0, "whole turns");
    static_assert(SHARERS * TOKENS * RANK * 4 <= STAGES * STAGE_BYTES, "sums fit where X was");

    const Operands& of;
    u8* shared;
    int t, lane, warp;
    int token;        // the first
    int begin, end;   // of the contraction
    const u16* from;  // this thread's piece of X in the next stage
    float c[TALL][RANK / 8][4];

    __device__ __forceinline__ void load(int column, int slot) {
        const u32 to = to_shared(shared) + slot * STAGE_BYTES;
        const int piece = t % PIECES, row = t / PIECES;
        const bool inside = column + piece * 8 < end;
#pragma unroll
        for (int i = 0; i < TOKENS; i += AT_ONCE)
            copy_async(to + piece_at<PIECES>(row + i, piece), from + i * of.x_stride,
                       inside && token + row + i < of.m);
        from += COLUMNS;
        constexpr int COPIES = RANK_PIECES * COLUMNS;
#pragma unroll
        for (int first = 0; first < COPIES; first += THREADS) {
            const int i = first + t;
            if (COPIES % THREADS && i >= COPIES) break;
            if constexpr (TURNED) {
                const int line = i / RANK_PIECES, part = i % RANK_PIECES;
                copy_async(to + X_BYTES + piece_at<RANK_PIECES>(line, part),
                           of.f + (column + line) * of.f_stride + part * 8,
                           column + line < end && part * 8 < of.r);
            } else {
                const int line = i / PIECES, part = i % PIECES;
                copy_async(to + X_BYTES + piece_at<PIECES>(line, part),
                           of.f + line * of.f_stride + column + part * 8,
                           column + part * 8 < end && line < of.r);
            }
        }
    }

    // A stage of X to `both`: each thread the pieces it brought.
    __device__ __forceinline__ void pass_on(int column, int slot) const {
        const int piece = t % PIECES, row = t / PIECES;
        if (of.both == nullptr || column + piece * 8 >= end) return;
        u16* to = of.both + (token + row) * of.both_stride + column + piece * 8;
#pragma unroll
        for (int i = 0; i < TOKENS; i += AT_ONCE) {
            const u8* at = shared + slot * STAGE_BYTES + piece_at<PIECES>(row + i, piece);
            if (token + row + i < of.m)
                *reinterpret_cast<uint4*>(to + i * of.both_stride) =
                    *reinterpret_cast<const uint4*>(at);
        }
    }

    // This warp's part of a stage.
    __device__ __forceinline__ void multiply(int slot) {
        const int line = lane & 15, half = lane >> 4;
        const u32 x = to_shared(shared) + slot * STAGE_BYTES, f = x + X_BYTES;
        const int row = warp % BANDS * 16 * TALL + line;
#pragma unroll
        for (int step = 0; step < COLUMNS / 16 / SHARERS; ++step) {
            const int k = step * SHARERS + warp / BANDS;  // 16 of the contraction
            u32 a[TALL][4];
#pragma unroll
            for (int i = 0; i < TALL; ++i)
                load_matrices<false>(a[i], x + piece_at<PIECES>(row + 16 * i, 2 * k + half));
#pragma unroll
            for (int n = 0; n < RANK / 16; ++n) {
                u32 b[4];
                if constexpr (TURNED)
                    load_matrices<true>(b, f + piece_at<RANK_PIECES>(16 * k + line, 2 * n + half));
                else
                    load_matrices<false>(b, f + piece_at<PIECES>(16 * n + line, 2 * k + half));
#pragma unroll
                for (int i = 0; i < TALL; ++i) {
                    Mma::run<T>(c[i][2 * n], a[i], b[0], TURNED ? b[1] : b[2]);
                    Mma::run<T>(c[i][2 * n + 1], a[i], TURNED ? b[2] : b[1], b[3]);
                }
            }
        }
    }

    __device__ __forceinline__ float* sum_of(int sharer, int row) const {
        return reinterpret_cast<float*>(shared) + (sharer * TOKENS + row) * RANK;
    }

    // The warps' sums, and then those of sharers in the place of the first one's.
    __device__ __forceinline__ void add_warps() {
        const int g = lane >> 2, q = lane & 3;
#pragma unroll
        for (int i = 0; i < 2 * TALL; ++i) {
            const int tall = i / 2, h = i % 2;
            float* row = sum_of(warp / BANDS, warp % BANDS * 16 * TALL + 8 * i + g);
#pragma unroll
            for (int n = 0; n < RANK / 8; ++n)
                *reinterpret_cast<float2*>(row + 8 * n + 2 * q) = {c[tall][n][2 * h],
                                                                   c[tall][n][2 * h + 1]};
        }
        __syncthreads();
        if constexpr (SHARERS == 1) return;
#pragma unroll 1
        for (int i = t * 4; i < TOKENS * RANK; i += THREADS * 4) {
            float4 sum = *reinterpret_cast<float4*>(sum_of(0, 0) + i);
#pragma unroll
            for (int s = 1; s < SHARERS; ++s) {
                const float4 more = *reinterpret_cast<float4*>(sum_of(s, 0) + i);
                sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
            }
            *reinterpret_cast<float4*>(sum_of(0, 0) + i) = sum;
        }
        __syncthreads();
    }

    __device__ __forceinline__ void write(int row, int rank, float4 sum) const {
        if (token + row < of.m && rank < of.r) write_four<T>(of, token + row, rank, sum);
    }

    // Adds the team's sums up, each block a part of them, or leaves them to the second kernel.
    __device__ __forceinline__ void finish(int member) const {
        if (of.sums != nullptr) {
            float* to = of.sums + (static_cast<long long>(member) * of.m + token) * RANK;
            const int most = of.m - token < TOKENS ? (of.m - token) * RANK : TOKENS * RANK;
#pragma unroll 1
            for (int i = t * 4; i < most; i += THREADS * 4)
                *reinterpret_cast<float4*>(to + i) = *reinterpret_cast<float4*>(sum_of(0, 0) + i);
            return;
        }
        if (of.team == 1) {
#pragma unroll 1
            for (int i = t * 4; i < TOKENS * RANK; i += THREADS * 4)
                write(i / RANK, i % RANK, *reinterpret_cast<float4*>(sum_of(0, 0) + i));
            return;
        }
#if __CUDA_ARCH__ >= 900
        sync_cluster();
#pragma unroll 1
        for (int i = (member * THREADS + t) * 4; i < TOKENS * RANK; i += of.team * THREADS * 4) {
            const u32 at = shared_address(sum_of(0, 0) + i);
            float4 sum = read_peer(at, 0);
            for (int other = 1; other < of.team; ++other) {
                const float4 more = read_peer(at, other);
                sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
            }
            write(i / RANK, i % RANK, sum);
        }
        meet_cluster();  // nobody leaves while its sums are being read
#endif
    }

    __device__ __forceinline__ void run() {
        const int member = blockIdx.x % of.team;
#if __CUDA_ARCH__ >= 900
        wait_for_previous_kernel();
#endif
        token = blockIdx.x / of.team * TOKENS;
        const int stages = (of.k + COLUMNS - 1) / COLUMNS;
        begin = stages * member / of.team * COLUMNS;
        end = stages * (member + 1) / of.team * COLUMNS;
        const int count = (end - begin) / COLUMNS;
        if (end > of.k) end = of.k;
        from = of.x + (token + t / PIECES) * of.x_stride + begin + t % PIECES * 8;
#pragma unroll
        for (int i = 0; i < TALL; ++i)
#pragma unroll
            for (int n = 0; n < RANK / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) c[i][n][e] = 0.f;
        if (blockIdx.x == 0)
            for (int i = threadIdx.x; i < of.words; i += THREADS) of.zeros[i] = 0;
        int ahead = 0, slot_ahead = 0;
        const auto load_next = [&] {
            if (ahead < count) load(begin + ahead * COLUMNS, slot_ahead);
            copy_commit();
            ++ahead;
            slot_ahead = slot_ahead == STAGES - 1 ? 0 : slot_ahead + 1;
        };
#pragma unroll 1
        for (int s = 0; s < STAGES - 1; ++s) load_next();
        int slot = 0;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            copy_wait<STAGES - 2>();
            __syncthreads();  // this stage has arrived, the one before has been read by all
            load_next();
            multiply(slot);
            pass_on(begin + i * COLUMNS, slot);
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
#if __CUDA_ARCH__ >= 900
        launch_next_kernel();
#endif
        copy_wait<0>();
        __syncthreads();
        add_warps();
        finish(member);
    }
};

// out = scale * the members' sums, from the first to the last; four ranks of a row per thread.
template <typename T>
__device__ __forceinline__ void add_sums(const Operands& of, int rank) {
    const u32 fours = of.r / 4, i = blockIdx.x * THREADS + threadIdx.x, row = i / fours;
    const int first = i % fours * 4;
    if (row >= of.m) return;
#if __CUDA_ARCH__ >= 900
    wait_for_previous_kernel();
#endif
    const long long step = static_cast<long long>(of.m) * rank;
    const float* from = of.sums + static_cast<long long>(row) * rank + first;
    float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 4
    for (int member = 1; member < of.team; ++member) {
        const float4 more = *reinterpret_cast<const float4*>(from + member * step);
        sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
    }
    write_four<T>(of, row, first, sum);
}

// Blocks that a processor's registers are to hold.
template <int RANK>
constexpr int TOGETHER = RANK <= 16 ? 4 : 2;

// Arguments in the order of qlora_kit/ops/nf4_linear/low_rank.py.
#define PRODUCT_ARGUMENTS                                                                        \
    const u16 *x, const u16 *f, u16 *out, u16 *both, float *sums, long long m, long long k,      \
        long long r, long long x_stride, long long f_stride, long long out_stride,               \
        long long both_stride, long long team, float scale, u32 *zeros, long long words
#define PRODUCT_OPERANDS                                                              \
    {x,        f,        out,        both,        sums,                               \
     static_cast<int>(m), static_cast<int>(k), static_cast<int>(r),                   \
     x_stride, f_stride, out_stride, both_stride, static_cast<int>(team), scale,      \
     zeros, static_cast<int>(words)}

#define LOW_RANK_PRODUCT_ONE(NAME, T, TURNED, RANK, TOKENS, COLUMNS, STAGES)                       \
    extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER<RANK>)                          \
        NAME(PRODUCT_ARGUMENTS) {                                                                  \
        extern __shared__ __align__(128) u8 low_rank_product_shared[];                             \
        const Operands of = PRODUCT_OPERANDS;                                                      \
        const int t = threadIdx.x;                                                                 \
        Block<T, TURNED, RANK, TOKENS, COLUMNS, STAGES> block{of, low_rank_product_shared, t,      \
                                                              t & 31, t >> 5};                     \
        block.run();                                                                               \
    }

// A shape of block, both ways of storing F.
#define LOW_RANK_PRODUCT(NAME, T, RANK, TOKENS, COLUMNS, STAGES)                                   \
    LOW_RANK_PRODUCT_ONE(low_rank_product_##NAME##_##RANK##_##TOKENS, T, false, RANK, TOKENS,      \
                         COLUMNS, STAGES)                                                          \
    LOW_RANK_PRODUCT_ONE(low_rank_product_turned_##NAME##_##RANK##_##TOKENS, T, true, RANK,        \
                         TOKENS, COLUMNS, STAGES)

#define LOW_RANK_PRODUCT_ADD(NAME, T, RANK)                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                          \
        low_rank_product_##NAME##_##RANK##_add(PRODUCT_ARGUMENTS) {                                \
        const Operands of = PRODUCT_OPERANDS;                                                      \
        add_sums<T>(of, RANK);                                                                     \
    }

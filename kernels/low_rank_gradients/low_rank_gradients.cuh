// dYB = dY B and dB = dY^T XA in one pass over dY: LoRA's backward for the gradient of a linear.
// Shapes    dY (m,n), B (n,r), XA (m,r), dYB (m,r) in one dtype of bf16/fp16, dB (n,most) f32.
//           B is block-diagonal: part p has columns [n0,n1) of dY, ranks [r0,r1), zeros elsewhere
// Requires  sm_80+; 16-byte addresses and rows; column and rank ends of parts multiples of 8, ranks
//           of a part up to RANK. Checked in qlora_kit/ops/low_rank_gradients/cuda.py
// Tile      16 rows x WARPS * COLUMNS columns of one part: a strip. Each warp holds dB of its part
//           of the strip in registers while its block walks down; sums of dYB meet in shared memory
// Cost      of rank 16, 1024 columns: 4 products per 512 bytes of dY; per byte of it, shared memory
//           moves 4.5: written once, read as it is and transposed, B as often, sums of dYB
// Numerics  f32 sums of products, added up by a second kernel in a fixed order: repeatable; one
//           rounding of dYB
// Truth     qlora_kit/ops/low_rank_gradients/reference.py
//
// The work is one line of tiles, strip after strip, of which each block gets an equal share by
// cost: blocks need not fit the shape. Partial sums:
//   by_row     (strips,m,RANK)                 dYB of each strip; a tile has one block, so no more
//   by_column  (blocks+strips,WIDEST,RANK)     dB of the rows block b saw of strip s, at b + s
#include "low_rank_gradients/copies.cuh"

constexpr int ROWS = 16;   // of a tile
constexpr int GRAIN = 64;  // strips are as many columns wide, but for a part's last
constexpr int ADDING_THREADS = 256;
constexpr int MOST_PARTS = 4;

struct Strip {
    int index;   // among all
    int column;  // the first
    int width;
    int rank;  // the first
    int ranks;
};

// How parts are cut into strips, and strips into tiles. cuda.py computes the same.
struct Layout {
    int column_ends[MOST_PARTS], rank_ends[MOST_PARTS];
    int widest;  // columns of a strip
    int tiles;   // of a strip
    int share;   // the cost of the tiles that a block starts

    struct Part {
        int column, columns, rank, ranks;
        int strips;  // none without ranks
        int width;   // of each strip but the last
        int cost;    // of a tile
    };

    __device__ __forceinline__ Part part(int p) const {
        Part found;
        found.column = p ? column_ends[p - 1] : 0;
        found.rank = p ? rank_ends[p - 1] : 0;
        found.columns = column_ends[p] - found.column;
        found.ranks = rank_ends[p] - found.rank;
        found.strips = found.ranks ? (found.columns + widest - 1) / widest : 0;
        const int even = found.strips ? (found.columns + found.strips - 1) / found.strips : 0;
        found.width = (even + GRAIN - 1) / GRAIN * GRAIN;
        found.cost = found.width / GRAIN + 2;
        return found;
    }

    __device__ __forceinline__ Strip strip(int index) const {
        int before = 0;
#pragma unroll
        for (int p = 0; p < MOST_PARTS; ++p) {
            const Part of = part(p);
            if (index < before + of.strips) {
                const int from = (index - before) * of.width;
                const int left = of.columns - from;
                return {index, of.column + from, left < of.width ? left : of.width, of.rank,
                        of.ranks};
            }
            before += of.strips;
        }
        return {index, 0, 0, 0, 0};  // the end
    }

    // The first tile that starts at a cost or beyond it, counted from the first strip's first.
    __device__ __forceinline__ int tile_at(int cost) const {
        int before = 0;
#pragma unroll
        for (int p = 0; p < MOST_PARTS; ++p) {
            const Part of = part(p);
            const int count = of.strips * tiles;
            if (cost < count * of.cost) return before + (cost + of.cost - 1) / of.cost;
            cost -= count * of.cost;
            before += count;
        }
        return before;
    }
};

// Where a 16-byte piece lies in a matrix of rows of PIECES: eight neighbouring rows of one column,
// which an ldmatrix reads, lie in different banks.
template <int PIECES>
__device__ __forceinline__ int piece_at(int row, int piece) {
    constexpr int ROWS_PER_LINE = PIECES < 8 ? 8 / PIECES : 1, MASK = PIECES < 8 ? PIECES - 1 : 7;
    return (row * PIECES + (piece ^ ((row / ROWS_PER_LINE) & MASK))) * 16;
}

struct Problem {
    const u16* dy;
    const u16* b;
    const u16* xa;
    float* by_row;
    float* by_column;
    int m;
    long long dy_stride, b_stride, xa_stride;
    bool keep;  // dY is worth its place in the L2 cache
};

template <typename T, int RANK, int COLUMNS, int WARPS, int STAGES>
struct Block {
    // Shared memory: STAGES tiles of dY and XA, then B, then two sets of sums.
    static constexpr int THREADS = WARPS * 32;
    static constexpr int WIDEST = WARPS * COLUMNS;
    static constexpr int WARP_BYTES = ROWS * COLUMNS * 2;  // of a stage
    static constexpr int DY_BYTES = WARPS * WARP_BYTES;
    static constexpr int STAGE_BYTES = DY_BYTES + ROWS * RANK * 2;
    static constexpr int B_BYTES = COLUMNS * RANK * 2;  // of a warp
    static constexpr int SUMS = ROWS * RANK;            // of a warp
    static constexpr int PIECES = COLUMNS / 8, RANK_PIECES = RANK / 8;
    static_assert(ROWS * RANK_PIECES <= THREADS, "XA comes with one copy per thread");

    const Problem& problem;
    const Layout& layout;
    u8* shared;
    int t, lane, warp;
    u64 policy;
    float d[COLUMNS / 16][RANK / 8][4];  // dB, (16 columns) x (8 ranks) each

    __device__ __forceinline__ u8* b_of_warp() const {
        return shared + STAGES * STAGE_BYTES + warp * B_BYTES;
    }
    __device__ __forceinline__ float* sums(int of_warp, int parity) const {
        float* first = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES + WARPS * B_BYTES);
        return first + (parity * WARPS + of_warp) * SUMS;
    }
    // Where a sum lies: eight rows of two columns in different banks.
    static __device__ __forceinline__ int sum_at(int row, int rank) {
        return row * RANK + (rank ^ ((RANK == 16 ? (row >> 1) & 1 : row & 3) << 3));
    }

    // Starts to copy a tile: each warp its own columns, all together XA.
    __device__ __forceinline__ void load(const Strip& strip, int tile, int slot) const {
        constexpr int AT_ONCE = 32 / PIECES;  // rows
        const u32 to = to_shared(shared) + slot * STAGE_BYTES;
        const int piece = lane % PIECES, row = lane / PIECES;
        const int column = warp * COLUMNS + piece * 8;
        const bool inside = column < strip.width;
        const u16* from = problem.dy +
                          static_cast<long long>(tile * ROWS + row) * problem.dy_stride +
                          strip.column + column;
#pragma unroll
        for (int i = 0; i < ROWS; i += AT_ONCE) {
            const bool present = inside && tile * ROWS + row + i < problem.m;
            copy_exactly(to + warp * WARP_BYTES + piece_at<PIECES>(row + i, piece), from, present,
                         policy);
            from += AT_ONCE * problem.dy_stride;
        }
        if (t < ROWS * RANK_PIECES) {
            const int line = t / RANK_PIECES, part = t % RANK_PIECES;
            const int at = tile * ROWS + line;
            copy_exactly(to + DY_BYTES + piece_at<RANK_PIECES>(line, part),
                         problem.xa + at * problem.xa_stride + strip.rank + part * 8,
                         at < problem.m && part * 8 < strip.ranks);
        }
    }

    // This warp's rows of B, zeros beyond the part.
    __device__ __forceinline__ void load_b(const Strip& strip) const {
        constexpr int LOADS = COLUMNS * RANK_PIECES / 32;
        uint4 words[LOADS];
        const int column = warp * COLUMNS;
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int at = i * 32 + lane, line = column + at / RANK_PIECES, part = at % RANK_PIECES;
            words[i] = {0, 0, 0, 0};
            if (line < strip.width && part * 8 < strip.ranks)
                words[i] = __ldg(reinterpret_cast<const uint4*>(
                    problem.b + (strip.column + line) * problem.b_stride + strip.rank + part * 8));
        }
        __syncwarp();  // the strip before has been read
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int at = i * 32 + lane;
            *reinterpret_cast<uint4*>(
                b_of_warp() + piece_at<RANK_PIECES>(at / RANK_PIECES, at % RANK_PIECES)) = words[i];
        }
        __syncwarp();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
            for (int n = 0; n < RANK / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) d[k][n][e] = 0.f;
    }

    // Both products of this warp's part of a tile.
    __device__ __forceinline__ void multiply(int slot, int parity) {
        const int line = lane & 15, half = lane >> 4;
        const u32 stage = to_shared(shared) + slot * STAGE_BYTES;
        const u32 dy = stage + warp * WARP_BYTES, b = to_shared(b_of_warp());
        u32 x[RANK / 16][4];
        float c[RANK / 8][4] = {};
#pragma unroll
        for (int n = 0; n < RANK / 16; ++n)
            load_matrices<true>(x[n], stage + DY_BYTES + piece_at<RANK_PIECES>(line, 2 * n + half));
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k) {
            u32 rows[4], turned[4];
            load_matrices<false>(rows, dy + piece_at<PIECES>(line, 2 * k + half));
            load_matrices<true>(turned, dy + piece_at<PIECES>(line, 2 * k + half));
            const u32 columns[4] = {turned[0], turned[2], turned[1], turned[3]};
#pragma unroll
            for (int n = 0; n < RANK / 16; ++n) {
                u32 of_b[4];
                load_matrices<true>(of_b, b + piece_at<RANK_PIECES>(k * 16 + line, 2 * n + half));
                Mma::run<T>(c[2 * n], rows, of_b[0], of_b[1]);
                Mma::run<T>(c[2 * n + 1], rows, of_b[2], of_b[3]);
                Mma::run<T>(d[k][2 * n], columns, x[n][0], x[n][1]);
                Mma::run<T>(d[k][2 * n + 1], columns, x[n][2], x[n][3]);
            }
        }
        const int g = lane >> 2, q = lane & 3;
        float* to = sums(warp, parity);
#pragma unroll
        for (int n = 0; n < RANK / 8; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<float2*>(to + sum_at(g + 8 * h, n * 8 + 2 * q)) = {
                    c[n][2 * h], c[n][2 * h + 1]};
    }

    // Adds the warps' sums of a tile up.
    __device__ __forceinline__ void write_rows(int strip, int width, int tile, int parity) const {
        const int active = (width + COLUMNS - 1) / COLUMNS;
        const long long first = (static_cast<long long>(strip) * problem.m + tile * ROWS) * RANK;
        const int count = (problem.m - tile * ROWS) * RANK;
#pragma unroll
        for (int i = t; i < SUMS; i += THREADS) {
            const float* from = sums(0, parity) + sum_at(i / RANK, i % RANK);
            float sum = from[0];
#pragma unroll
            for (int w = 1; w < WARPS; ++w)
                if (w < active) sum += from[w * SUMS];
            if (i < count) problem.by_row[first + i] = sum;
        }
    }

    __device__ __forceinline__ void write_columns(int strip, int width) const {
        if (warp * COLUMNS >= width) return;
        const long long place = static_cast<long long>(blockIdx.x) + strip;
        float* to = problem.by_column + (place * WIDEST + warp * COLUMNS) * RANK;
        const int g = lane >> 2, q = lane & 3;
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; ++k)
#pragma unroll
            for (int n = 0; n < RANK / 8; ++n)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    *reinterpret_cast<float2*>(to + (k * 16 + h * 8 + g) * RANK + n * 8 + 2 * q) = {
                        d[k][n][2 * h], d[k][n][2 * h + 1]};
    }

    __device__ __forceinline__ void run() {
        const int begin = layout.tile_at(blockIdx.x * layout.share);
        const int end = layout.tile_at((blockIdx.x + 1) * layout.share);
        if (begin >= end) return;
        policy = problem.keep ? keep_normally() : keep_shortly();
        int index = begin / layout.tiles, tile = begin % layout.tiles, width = 0;
        Strip ahead = layout.strip(index);
        int tile_ahead = tile, left_ahead = end - begin;
        int slot = 0, slot_ahead = 0;
        const auto load_next = [&] {
            if (left_ahead > 0) {
                load(ahead, tile_ahead, slot_ahead);
                if (++tile_ahead == layout.tiles) {
                    tile_ahead = 0;
                    ahead = layout.strip(ahead.index + 1);
                }
            }
            copy_commit();
            --left_ahead;
            slot_ahead = slot_ahead == STAGES - 1 ? 0 : slot_ahead + 1;
        };
#pragma unroll 1
        for (int s = 0; s < STAGES - 1; ++s) load_next();
        int before = -1, before_width = 0, tile_before = 0, parity = 0;
#pragma unroll 1
        for (int left = end - begin; left > 0; --left) {
            if (before != index) {
                if (before >= 0) write_columns(before, before_width);
                const Strip strip = layout.strip(index);
                width = strip.width;
                load_b(strip);
                clear();
            }
            copy_wait<STAGES - 2>();
            __syncthreads();  // this tile has arrived, the one before has been read by all
            load_next();
            if (before >= 0) write_rows(before, before_width, tile_before, parity ^ 1);
            if (warp * COLUMNS < width) multiply(slot, parity);
            before = index, before_width = width, tile_before = tile;
            parity ^= 1;
            slot = slot == STAGES - 1 ? 0 : slot + 1;
            if (++tile == layout.tiles) tile = 0, ++index;
        }
        let_next_start();
        write_columns(before, before_width);
        __syncthreads();
        write_rows(before, before_width, tile_before, parity ^ 1);
    }
};

// Adds up `count` times four values that lie `step` apart, the first to the last; loads run ahead.
__device__ __forceinline__ float4 add_up(const float* from, long long step, int count) {
    constexpr int AT_ONCE = 8;
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < count; i += AT_ONCE) {
        float4 terms[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            terms[j] = {0.f, 0.f, 0.f, 0.f};
            if (i + j < count) terms[j] = *reinterpret_cast<const float4*>(from + j * step);
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j)
            sum = {sum.x + terms[j].x, sum.y + terms[j].y, sum.z + terms[j].z, sum.w + terms[j].w};
        from += AT_ONCE * step;
    }
    return sum;
}

// dYB: four ranks of a row per thread, summed over the strips of their part.
template <typename T>
__device__ __forceinline__ void add_rows(const float* by_row, u16* out, const Layout& layout, u32 m,
                                         long long out_stride, int rank) {
    const u32 fours = layout.rank_ends[MOST_PARTS - 1] / 4;
    const u32 i = blockIdx.x * ADDING_THREADS + threadIdx.x, row = i / fours;
    const int first = i % fours * 4;
    if (row >= m) return;
    int before = 0, own = 0, strips = 0;
#pragma unroll
    for (int p = 0; p < MOST_PARTS; ++p) {
        const Layout::Part part = layout.part(p);
        if (strips) continue;
        if (first < part.rank + part.ranks)
            own = first - part.rank, strips = part.strips;
        else
            before += part.strips;
    }
    wait_for_previous();
    const float* from = by_row + (static_cast<long long>(before) * m + row) * rank + own;
    const float4 sum = add_up(from, static_cast<long long>(m) * rank, strips);
    *reinterpret_cast<uint2*>(out + row * out_stride + first) = {T::pack(sum.x, sum.y),
                                                                 T::pack(sum.z, sum.w)};
}

// dB of 64 columns: four ranks of a column per thread, summed over the blocks of their strip.
__device__ __forceinline__ void add_columns(const float* by_column, float* d_b,
                                            const Layout& layout, int index, int rank,
                                            int widest_rank) {
    Layout::Part part = {};
    int strips = 0, cost = 0;  // before the part
#pragma unroll
    for (int p = 0; p < MOST_PARTS; ++p) {
        if (part.strips) continue;
        const Layout::Part here = layout.part(p);
        const int grains = here.strips * (here.width / GRAIN);
        if (index < grains) {
            part = here;
        } else {
            index -= grains;
            strips += here.strips;
            cost += here.strips * layout.tiles * here.cost;
        }
    }
    const int grains = part.width / GRAIN, strip = index / grains;
    cost += strip * layout.tiles * part.cost;
    const int first = cost / layout.share;
    const int last = (cost + (layout.tiles - 1) * part.cost) / layout.share;
    const int fours = widest_rank / 4, size = layout.widest * rank;
    const float* of_strip = by_column + static_cast<long long>(first + strips + strip) * size;
    wait_for_previous();
    for (int i = threadIdx.x; i < GRAIN * fours; i += ADDING_THREADS) {
        const int column = index % grains * GRAIN + i / fours, at = i % fours * 4;
        const int n = strip * part.width + column;
        if (n >= part.columns) break;
        const int blocks = at < part.ranks ? last - first + 1 : 0;
        *reinterpret_cast<float4*>(d_b + static_cast<long long>(part.column + n) * widest_rank +
                                   at) = add_up(of_strip + column * rank + at, size, blocks);
    }
}

// Arguments in the order of qlora_kit/ops/low_rank_gradients/cuda.py.
#define LAYOUT(COLUMNS_OF_STRIP)                                                               \
    {{static_cast<int>(n0), static_cast<int>(n1), static_cast<int>(n2), static_cast<int>(n3)}, \
     {static_cast<int>(r0), static_cast<int>(r1), static_cast<int>(r2), static_cast<int>(r3)}, \
     static_cast<int>(COLUMNS_OF_STRIP),                                                       \
     static_cast<int>((m + ROWS - 1) / ROWS),                                                  \
     static_cast<int>(share)}

#define LOW_RANK_GRADIENTS(NAME, T, RANK, COLUMNS, WARPS, STAGES, BLOCKS)                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)                     \
        low_rank_gradients_##NAME##_##RANK##_##COLUMNS##x##WARPS##x##STAGES(             \
            const u16* dy, const u16* b, const u16* xa, float* by_row, float* by_column, \
            long long m, long long dy_stride, long long b_stride, long long xa_stride,   \
            long long keep, long long share, long long n0, long long n1, long long n2,   \
            long long n3, long long r0, long long r1, long long r2, long long r3) {      \
        extern __shared__ __align__(128) u8 memory[];                                    \
        typedef Block<T, RANK, COLUMNS, WARPS, STAGES> Of;                               \
        const Layout layout = LAYOUT(Of::WIDEST);                                        \
        const Problem problem = {                                                        \
            dy,        b,        xa,        by_row,   by_column, static_cast<int>(m),    \
            dy_stride, b_stride, xa_stride, keep != 0};                                  \
        const int t = threadIdx.x;                                                       \
        Of block{problem, layout, memory, t, t & 31, t >> 5};                            \
        block.run();                                                                     \
    }

#define LOW_RANK_GRADIENTS_ADD(NAME, T)                                                           \
    extern "C" __global__ void __launch_bounds__(ADDING_THREADS) low_rank_gradients_##NAME##_add( \
        const float* by_row, const float* by_column, u16* out, float* d_b, long long row_blocks,  \
        long long widest_rank, long long rank, long long columns, long long m,                    \
        long long out_stride, long long share, long long n0, long long n1, long long n2,          \
        long long n3, long long r0, long long r1, long long r2, long long r3) {                   \
        const Layout layout = LAYOUT(columns);                                                    \
        const int index = static_cast<int>(blockIdx.x) - static_cast<int>(row_blocks);            \
        if (index < 0)                                                                            \
            add_rows<T>(by_row, out, layout, static_cast<u32>(m), out_stride,                     \
                        static_cast<int>(rank));                                                  \
        else                                                                                      \
            add_columns(by_column, d_b, layout, index, static_cast<int>(rank),                    \
                        static_cast<int>(widest_rank));                                           \
    }

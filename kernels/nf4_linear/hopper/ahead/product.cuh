// Hopper's product for many rows: Y = X W^T + XA B^T + bias, and dX = dY W + dYB A, by tensor cores
// on 16-bit weights that warps of the same launch decode ahead of them.
// Shapes    activations (M,C) | packed (N*K/2) u8 | decoded (N,K) | small (M,r) | factor (N,r) or
//           (r,K) | out (M,R)
//           C, the contraction, is K and R, the result's columns, is N; in the transpose N and K
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_90a, K % 256 == 0, N % 8 == 0, r % 8 == 0, 16-byte alignment; seen to in
//           qlora_kit/ops/nf4_linear/hopper.py (serves) and cuda.py
// Tile      128 rows of the activations x COLUMNS of the result a block; two blocks that are
//           neighbours along the rows are a pair, which brings the weights in once. Blocks stay
//           for all tiles. Warp 0 brings tiles in with the copy engine, three warps decode, two
//           warpgroups multiply 64 rows each.
// Decoding  strips of 32 x 128 weights, given out in the order in which tiles want them. Who is
//           done with one counts it in its cell; who brings a cell in waits for the count. A strip
//           that is given out is always finished, so that no block waits for one that has not begun
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      warp-specialised, persistent products: https://github.com/NVIDIA/cutlass
#pragma once
#include "nf4_linear/hopper/ahead/decode.cuh"

// Where in the ring of stages a warp is.
template <int STAGES>
struct Ring {
    int slot = 0, phase = 0;
    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }
};

template <typename S>
struct Producer {
    const Problem& p;
    const Grid<S>& grid;
    const TensorMap &left, &right, &small, &factor;
    Stage<S>* stages;
    Barrier *full, *empty;
    const int lane, half;
    Ring<S::STAGES> ring;

    // Waits for a chunk of a column tile; returns how many of its chunks are there.
    __device__ __forceinline__ int wait_for(int column, int chunk) const {
        const int mine = chunk + lane;
        const u32* cell = grid.cells + column * grid.chunks + mine;
        u32 missing;
        do {
            const bool there = mine >= grid.chunks || read_relaxed(cell) >= S::STRIPS;
            missing = ~__ballot_sync(0xffffffffu, there);
        } while (missing & 1);
        const int known = missing == 0 ? 32 : __ffs(missing) - 1;
        if (lane < known && mine < grid.chunks) read_acquired(cell);
        __syncwarp();
        fence_global_copies();
        return chunk + known;
    }

    // One stage: this block's activations, and half of the pair's weights for both.
    __device__ __forceinline__ void bring(const TensorMap& a, const TensorMap& b, int token, int at,
                                          int column) {
        empty[ring.slot].wait(ring.phase ^ 1);
        if (elected()) {
            Stage<S>& stage = stages[ring.slot];
            Barrier& barrier = full[ring.slot];
            barrier.arrive_expecting(S::LEFT_BYTES + S::RIGHT_BYTES);
            copy_box(stage.left, a, token, at, barrier);
            constexpr int PART = S::RIGHT_BYTES / 2;
            if (S::TRANSPOSED) {  // tiles of 64 columns
#pragma unroll
                for (int i = 0; i < S::COLUMNS / 128; ++i) {
                    const int tile = half * (S::COLUMNS / 128) + i;
                    copy_box_to_pair(stage.right + tile * DEPTH * 128, b, at, column + 64 * tile,
                                     barrier);
                }
            } else {
                copy_box_to_pair(stage.right + half * PART, b, column + half * (S::COLUMNS / 2), at,
                                 barrier);
            }
        }
        __syncwarp();
        ring.advance();
    }

    __device__ __forceinline__ void run(int first, int step) {
        bool waited = false;
        const int depths = (grid.contraction + DEPTH - 1) / DEPTH;
#pragma unroll 1
        for (int tile = first; tile < grid.tiles; tile += step) {
            const Place at(grid, p.group, tile);
            const int token = (2 * at.pair + half) * TOKENS, column = at.column * S::COLUMNS;
            int known = 0;
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth) {
                const int chunk = depth / (CELL_DEPTH / DEPTH);
                if (chunk >= known) known = wait_for(at.column, chunk);
                bring(left, right, token, depth * DEPTH, column);
            }
            if (p.rank > 0 && !waited) {
                wait_for_previous_kernel();  // which made `small`
                waited = true;
            }
#pragma unroll 1
            for (int r = 0; r < p.rank; r += DEPTH) bring(small, factor, token, r, column);
        }
    }
};

template <typename T, typename S>
struct Consumer {
    static constexpr int COLUMNS = S::COLUMNS;
    float c[COLUMNS / 2];
    const Problem& p;
    const Grid<S>& grid;
    Stage<S>* stages;
    Barrier *full, *empty;
    const int group, warp, lane, half;
    Ring<S::STAGES> ring;
    int waiting;  // the stage to give back once its products are done
    u32 fresh;

    __device__ __forceinline__ void give_back() {
        if (waiting >= 0 && lane < 2 * ARRIVING_LANES)
            for (int turn = 0; turn < min(ARRIVING_LANES, 2); ++turn)
                empty[waiting].arrive_at((lane + turn) % 2);
    }

    __device__ __forceinline__ void multiply(int products) {
        full[ring.slot].wait(ring.phase);
        const Stage<S>& stage = stages[ring.slot];
        const u64 a = tile_descriptor(stage.left + group * 64 * 128);
        const u64 b = S::TRANSPOSED ? transposed_tile_descriptor(stage.right, DEPTH * 128)
                                    : tile_descriptor(stage.right);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; ++i) {
            if (i >= products) break;
            WgmmaShared<T, COLUMNS, S::TRANSPOSED>::run(c, a + 2 * i,
                                                        b + (S::TRANSPOSED ? 128 : 2) * i, fresh);
            fresh = 0;
        }
        wgmma_commit();
        wgmma_wait<1>();
        give_back();
        waiting = ring.slot;
        ring.advance();
    }

    // Four neighbouring lanes trade what they have, so that each has 16 bytes of a row.
    __device__ __forceinline__ uint4 trade(u32 (&v)[4]) const {
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            const bool upper = lane & distance;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (i & distance) continue;
                const u32 sent = upper ? v[i] : v[i + distance];
                const u32 got = __shfl_xor_sync(0xffffffffu, sent, distance);
                (upper ? v[i] : v[i + distance]) = got;
            }
        }
        return {v[0], v[1], v[2], v[3]};
    }

    __device__ __forceinline__ void write(int token, int column) {
        const int g = lane / 4, q = lane % 4, row = token + 64 * group + 16 * warp + g;
        if (p.bias != nullptr)
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; ++j) {
                const int at = column + 8 * j + 2 * q;
                if (at >= grid.columns) continue;
                const u32 two = __ldg(reinterpret_cast<const u32*>(p.bias + at));
                const float low = T::read(static_cast<u16>(two)),
                            high = T::read(static_cast<u16>(two >> 16));
                c[4 * j] += low, c[4 * j + 2] += low;
                c[4 * j + 1] += high, c[4 * j + 3] += high;
            }
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j += 4)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                u32 v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v[i] = T::pack(c[4 * (j + i) + 2 * h], c[4 * (j + i) + 2 * h + 1]);
                const uint4 piece = trade(v);
                const int at = column + 8 * (j + q);
                if (row + 8 * h < p.m && at < grid.columns)
                    *reinterpret_cast<uint4*>(p.out + static_cast<u64>(row + 8 * h) * grid.columns +
                                              at) = piece;
            }
    }

    __device__ __forceinline__ void run(int first, int step) {
        const int depths = (grid.contraction + DEPTH - 1) / DEPTH;
#pragma unroll 1
        for (int tile = first; tile < grid.tiles; tile += step) {
            const Place at(grid, p.group, tile);
            waiting = -1;
            fresh = 1;
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth) multiply(DEPTH / 16);
#pragma unroll 1
            for (int r = 0; r < p.rank; r += DEPTH) multiply((min(DEPTH, p.rank - r) + 15) / 16);
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; ++i) keep(c[i]);
            give_back();
            write((2 * at.pair + half) * TOKENS, at.column * COLUMNS);
        }
    }
};

template <typename T, typename S>
__device__ __forceinline__ void ahead(const TensorMap& left, const TensorMap& right,
                                      const TensorMap& small, const TensorMap& factor,
                                      const Problem& p) {
    extern __shared__ __align__(1024) u8 memory[];
    static_assert(sizeof(Stage<S>) == S::LEFT_BYTES + S::RIGHT_BYTES && sizeof(NF4Table) == 2048 &&
                      sizeof(Desk) == 2 * 2048 + 256,
                  "as ahead.py counts them: _shared_bytes");
    Stage<S>* stages = reinterpret_cast<Stage<S>*>(memory);
    NF4Table* table = reinterpret_cast<NF4Table*>(memory + S::STAGES * sizeof(Stage<S>));
    Desk* desks = reinterpret_cast<Desk*>(table + 1);
    float* map = reinterpret_cast<float*>(desks + DECODERS);
    Barrier* full = reinterpret_cast<Barrier*>(map + 256);
    Barrier* empty = full + S::STAGES;
    const Grid<S> grid(p);
    const int half = cluster_rank(), first = blockIdx.x / 2, step = gridDim.x / 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        prefetch_map(left);
        prefetch_map(right);
        for (int s = 0; s < S::STAGES; ++s) {
            full[s].init(1);
            empty[s].init(8 * 2 * ARRIVING_LANES);
        }
        fence_barrier_init();
    }
    meet_cluster();  // a neighbour's copies count on these barriers
    if (warp <= DECODERS) {
        if (warp == 0) {
            Producer<S>{p, grid, left, right, small, factor, stages, full, empty, lane, half}.run(
                first, step);
        } else {
            const int thread = threadIdx.x - 32;
            table->fill(thread, 32 * DECODERS);
            for (int i = thread; i < 256; i += 32 * DECODERS) map[i] = DYNAMIC_MAP_VALUES[i];
            sync_threads<1, 32 * DECODERS>();
            Decoder<T, S>{p, grid, *table, map, desks[warp - 1], lane}.run();
        }
    } else {
        const int group = (warp - DECODERS - 1) / 4;
        Consumer<T, S> consumer{{}, p, grid, stages, full, empty, group, warp % 4, lane, half};
        consumer.run(first, step);
    }
    __syncwarp();    // lanes that went ways of their own
    meet_cluster();  // nobody leaves while its memory or barriers are in use
}

#define AHEAD(NAME, T, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * (1 + DECODERS + 8), 1)                     \
        NAME(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,   \
             const __grid_constant__ TensorMap small, const __grid_constant__ TensorMap factor, \
             const u8* packed, const void* absmax, const float* nested, const float* offset,    \
             u16* decoded, const u16* bias, u16* out, u32* state, long long m, long long n,     \
             long long k, long long rank, long long group, long long together) {                \
        const Problem p{packed,                                                                 \
                        NF4Scales{absmax, nested, offset, 6},                                   \
                        decoded,                                                                \
                        bias,                                                                   \
                        out,                                                                    \
                        state,                                                                  \
                        static_cast<int>(m),                                                    \
                        static_cast<int>(n),                                                    \
                        static_cast<int>(k),                                                    \
                        static_cast<int>(rank),                                                 \
                        static_cast<int>(group),                                                \
                        static_cast<int>(together)};                                            \
        ahead<T, Shape<__VA_ARGS__>>(left, right, small, factor, p);                            \
    }

#define NF4_AHEAD(T, COLUMNS, STAGES)           \
    AHEAD(nf4_ahead, T, false, COLUMNS, STAGES) \
    AHEAD(nf4_ahead_transposed, T, true, COLUMNS, STAGES)

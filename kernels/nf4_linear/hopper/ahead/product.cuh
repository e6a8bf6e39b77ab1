// Hopper's product for many rows: Y = X W^T + XA B^T + bias, and dX = dY W + dYB A, by tensor cores
// on 16-bit weights that warps of the same launch decode ahead of them.
// Shapes    activations (M,C) | packed (N*K/2) u8 | decoded (N,K) | out (M,R) | small (M,r)
//           narrow (r,K) or (N,r): meets activations | factor (N,r) or (r,K): meets small
//           C, the contraction, is K and R, the result's columns, is N; in the transpose N and K
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_90a, K % 256 == 0, N % 8 == 0, r % 8 == 0, 16-byte alignment; seen to in
//           qlora_kit/ops/nf4_linear/hopper.py (serves) and cuda.py
// Tile      128 rows of the activations x COLUMNS of the result a block; two blocks that are
//           neighbours along the rows are a pair, which brings the weights in once. Blocks stay
//           for all tiles. Warp 0 brings tiles in with the copy engine, three warps decode, two
//           warpgroups multiply 64 rows each. Pairs take tiles from a count, in order
// Decoding  strips of 32 x 128 weights, given out in the order in which tiles want them. Who is
//           done with one counts it in its cell; who brings a cell in waits for the count. A strip
//           that is given out is always finished, so that no block waits for one that has not
//           begun. Where rows are few, those who multiply decode a strip each before they begin
// Small     for few ranks tiles of the first columns make XA (dYB) of their rows besides, by one
//           narrow wgmma for each of theirs; others wait for it at their end, and none for a tile
//           that was given out after it. For more ranks a kernel before this one makes it
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      warp-specialised, persistent products: https://github.com/NVIDIA/cutlass
#pragma once
#include "nf4_linear/hopper/ahead/decode.cuh"
#include "nf4_linear/hopper/ahead/produce.cuh"

template <typename T, typename S>
struct Consumer {
    static constexpr int COLUMNS = S::COLUMNS;
    float c[COLUMNS / 2], narrow[RANKS / 2];
    const Problem& p;
    const Grid<S>& grid;
    Stage<S>* stages;
    const int* turn_of;
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

    __device__ __forceinline__ u64 right_operand(const Stage<S>& stage) const {
        return S::TRANSPOSED ? transposed_tile_descriptor(stage.right, DEPTH * 128)
                             : tile_descriptor(stage.right);
    }

    // The sums of the first columns.
    template <int WIDTH>
    __device__ __forceinline__ float (&sums())
        [WIDTH / 2] { return reinterpret_cast<float (&)[WIDTH / 2]>(c); }

    // NARROW: the small product besides.
    template <int WIDTH, bool NARROW, int PRODUCTS = DEPTH / 16>
    __device__ __forceinline__ void multiply() {
        full[ring.slot].wait(ring.phase);
        const Stage<S>& stage = stages[ring.slot];
        const u64 a = tile_descriptor(stage.left + group * 64 * 128);
        const u64 b = right_operand(stage);
        const u64 few = S::TRANSPOSED ? transposed_narrow_descriptor(stage.narrow)
                                      : tile_descriptor(stage.narrow);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < PRODUCTS; ++i) {
            WgmmaShared<T, WIDTH, S::TRANSPOSED>::run(sums<WIDTH>(), a + 2 * i,
                                                      b + (S::TRANSPOSED ? 128 : 2) * i, fresh);
            if (NARROW)
                WgmmaShared<T, RANKS, S::TRANSPOSED>::run(
                    narrow, a + 2 * i, few + (S::TRANSPOSED ? 32 : 2) * i, fresh);
            fresh = 0;
        }
        wgmma_commit();
        wgmma_wait<1>();
        give_back();
        waiting = ring.slot;
        ring.advance();
    }

    template <int WIDTH>
    __device__ __forceinline__ void finish() {
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) keep(c[i]);
        give_back();
        waiting = -1;
    }

    // The small product's sums are the next product's left operand where they lie.
    template <int WIDTH>
    __device__ __forceinline__ void multiply_ranks(int token) {
        finish<WIDTH>();
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            keep(narrow[2 * i]), keep(narrow[2 * i + 1]);
            a[i] = T::pack(p.scale * narrow[2 * i], p.scale * narrow[2 * i + 1]);
        }
        full[ring.slot].wait(ring.phase);
        wgmma_fence();
        Wgmma<T, WIDTH, S::TRANSPOSED>::run(sums<WIDTH>(), a, right_operand(stages[ring.slot]));
        wgmma_commit();
        waiting = ring.slot;
        ring.advance();
        const int q = lane % 4, row = token + 64 * group + 16 * warp + lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = row + 8 * (i % 2), rank = 2 * q + 8 * (i / 2);
            if (at < p.m && rank < p.rank)
                *reinterpret_cast<u32*>(p.small + static_cast<u64>(at) * p.rank + rank) = a[i];
        }
        __syncwarp();  // all lanes' ranks come before
        if (lane == 0) add_one_released(grid.smalls + token / TOKENS);
#pragma unroll
        for (int i = 0; i < 4; ++i) keep(a[i]);
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

    template <int WIDTH>
    __device__ __forceinline__ void write(int token, int column) {
        const int g = lane / 4, q = lane % 4, row = token + 64 * group + 16 * warp + g;
        if (p.bias != nullptr)
#pragma unroll
            for (int j = 0; j < WIDTH / 8; ++j) {
                const int at = column + 8 * j + 2 * q;
                if (at >= grid.columns) continue;
                const u32 two = __ldg(reinterpret_cast<const u32*>(p.bias + at));
                const float low = T::read(static_cast<u16>(two)),
                            high = T::read(static_cast<u16>(two >> 16));
                c[4 * j] += low, c[4 * j + 2] += low;
                c[4 * j + 1] += high, c[4 * j + 3] += high;
            }
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j += 4)
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

    template <int WIDTH>
    __device__ __forceinline__ void make(int token, int column) {
        const int depths = (grid.contraction + DEPTH - 1) / DEPTH;
        waiting = -1;
        fresh = 1;
        if (__any_sync(0xffffffffu, p.small != nullptr && column == 0)) {  // uniform
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth) multiply<WIDTH, true>();
            multiply_ranks<WIDTH>(token);
        } else {
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth) multiply<WIDTH, false>();
            if (p.rank > 0 && p.rank <= RANKS)
                multiply<WIDTH, false, RANKS / 16>();
            else
#pragma unroll 1
                for (int r = 0; r < p.rank; r += DEPTH) multiply<WIDTH, false>();
        }
        finish<WIDTH>();
        write<WIDTH>(token, column);
    }

    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (;;) {
            full[ring.slot].wait(ring.phase);
            const int turn = __shfl_sync(0xffffffffu, turn_of[ring.slot], 0);
            if (__any_sync(0xffffffffu, turn >= grid.turns)) break;
            const Place at(grid, p.group, turn);
            const int token = (2 * at.pair + half) * TOKENS;
            if (S::HALF < COLUMNS && __any_sync(0xffffffffu, at.width < COLUMNS))
                make<S::HALF>(token, at.column);
            else
                make<COLUMNS>(token, at.column);
        }
    }
};

template <typename T, typename S>
__device__ __forceinline__ void ahead(const TensorMap& left, const TensorMap& right,
                                      const TensorMap& narrow, const TensorMap& small,
                                      const TensorMap& factor, const Problem& p) {
    extern __shared__ __align__(1024) u8 memory[];
    static_assert(sizeof(Stage<S>) == S::LEFT_BYTES + S::RIGHT_BYTES + S::NARROW_BYTES &&
                      sizeof(NF4Table) == 2048 && sizeof(Desk) == 2 * 2048 + 256 &&
                      sizeof(Note) == 16,
                  "as ahead.py counts them: _shared_bytes");
    static_assert(MULTIPLIERS * sizeof(Desk) <= sizeof(Stage<S>), "no room");
    Stage<S>* stages = reinterpret_cast<Stage<S>*>(memory);
    NF4Table* table = reinterpret_cast<NF4Table*>(memory + S::STAGES * sizeof(Stage<S>));
    Desk* desks = reinterpret_cast<Desk*>(table + 1);
    float* map = reinterpret_cast<float*>(desks + DECODERS);
    Barrier* full = reinterpret_cast<Barrier*>(map + 256);
    Barrier* empty = full + S::STAGES;
    Note* notes = reinterpret_cast<Note*>(empty + S::STAGES);
    static_assert(NOTES >= S::STAGES + 2, "a note would be written over before it is read");
    int* turn_of = reinterpret_cast<int*>(notes + NOTES);
    const Grid<S> grid(p);
    const int half = cluster_rank();
    const int warp = warp_of_block(), lane = threadIdx.x % 32;

    if (threadIdx.x == 0) {
        prefetch_map(left);
        prefetch_map(right);
        for (int s = 0; s < S::STAGES; ++s) {
            full[s].init(1);
            empty[s].init(2 * MULTIPLIERS * ARRIVING_LANES);
        }
        for (int i = 0; i < NOTES; ++i) notes[i].there.init(1);
        fence_barrier_init();
    }
    meet_cluster();  // a neighbour's copies count on these barriers
    launch_next_kernel();
    // The kernel before has set the counters to zero, or makes `small`, after the one that did.
    const bool small_comes = p.rank > 0 && p.small == nullptr;
    if (warp > 0) {
        constexpr int THREADS = 32 * (DECODERS + MULTIPLIERS);
        const int thread = threadIdx.x - 32;
        table->fill(thread, THREADS);
        for (int i = thread; i < 256; i += THREADS) map[i] = DYNAMIC_MAP_VALUES[i];
    }
    if (warp <= DECODERS) {
        give_registers<120>();
        if (warp == 0) {
            if (!small_comes) wait_for_previous_kernel();
            const Turns turns{p.state + TILES_GIVEN, notes, half, lane};
            Producer<S>{p,      grid,    left, right, narrow, small, factor,
                        stages, turn_of, full, empty, lane,   half,  turns}
                .run();
        } else {
            sync_threads<1, 32 * (DECODERS + MULTIPLIERS)>();
            if (!small_comes) wait_for_previous_kernel();
            Decoder<T, S>{p, grid, *table, map, desks[warp - 1], lane}.run();
        }
    } else {
        take_registers<192>();
        const int group = (warp - DECODERS - 1) / 4;
        Consumer<T, S> consumer{{},   {},    p,     grid,     stages, turn_of,
                                full, empty, group, warp % 4, lane,   half};
        sync_threads<1, 32 * (DECODERS + MULTIPLIERS)>();
        if (p.helping) {  // over the last stage, which the copy engine has after that
            if (!small_comes) wait_for_previous_kernel();
            Desk* desk = reinterpret_cast<Desk*>(stages + S::STAGES - 1) + warp - DECODERS - 1;
            Decoder<T, S>{p, grid, *table, map, *desk, lane}.help();
            fence_shared_copies();  // the neighbour's engine may write here next
            __syncwarp();
        }
        consumer.waiting = S::STAGES - 1;
        consumer.give_back();
        consumer.run();
    }
    __syncwarp();    // lanes that went ways of their own
    meet_cluster();  // nobody leaves while its memory or barriers are in use
}

#define AHEAD(NAME, T, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(32 * (1 + DECODERS + MULTIPLIERS), 1)          \
        NAME(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,   \
             const __grid_constant__ TensorMap narrow, const __grid_constant__ TensorMap small, \
             const __grid_constant__ TensorMap factor, const u8* packed, const void* absmax,    \
             const float* nested, const float* offset, u16* decoded, const u16* bias, u16* out, \
             u16* made, float scale, u32* state, long long m, long long n, long long k,         \
             long long rank, long long group, long long together, long long helping) {          \
        const Problem p{packed,                                                                 \
                        NF4Scales{absmax, nested, offset, 6},                                   \
                        decoded,                                                                \
                        bias,                                                                   \
                        out,                                                                    \
                        made,                                                                   \
                        scale,                                                                  \
                        state,                                                                  \
                        static_cast<int>(m),                                                    \
                        static_cast<int>(n),                                                    \
                        static_cast<int>(k),                                                    \
                        static_cast<int>(rank),                                                 \
                        static_cast<int>(group),                                                \
                        static_cast<int>(together),                                             \
                        helping != 0};                                                          \
        ahead<T, Shape<__VA_ARGS__>>(left, right, narrow, small, factor, p);                    \
    }

#define NF4_AHEAD(T, COLUMNS, STAGES)           \
    AHEAD(nf4_ahead, T, false, COLUMNS, STAGES) \
    AHEAD(nf4_ahead_transposed, T, true, COLUMNS, STAGES)

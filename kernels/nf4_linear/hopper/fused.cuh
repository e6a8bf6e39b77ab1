// Hopper's fused product: Y = X W^T + XA B^T + bias, and its transpose dX = dY W + dYB A, from the
// 4-bit bytes of W, each in one pass over the result.
// Shapes    activations (M,C) | packed (N*K/2) u8 | small (M,r) | factor (N,r) or (r,K) | out (M,R)
//           C, the contraction, is K and R, the result's columns, is N; in the transpose N and K
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_90a, K % 256 == 0, N % 8 == 0, r % 8 == 0, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/hopper.py
// Tile      128 or 256 columns of the result x TOKENS rows of the activations per block, 64 of the
//           contraction per stage. W is wgmma's register operand, the activations its shared one.
//           Warpgroup 0 brings tiles in with the copy engine and decodes the nested scales; each
//           other warpgroup decodes weights of 64 or 128 columns while its last product runs. For
//           few tokens there are four of them, two sharing each stage, to hide the look-ups.
//           Blocks of a cluster share the contraction, and their sums meet in shared memory; or
//           clusters take stretches of it, as in stretch.cuh. Blocks of 128 columns come in pairs
//           that bring in half of their common activations each. The first clusters may make the
//           small product XA, or dYB, and nothing else: small.cuh.
// Begins    while the kernel before it ends: W is brought in before the wait, activations after it
// Decode    one look-up per byte: 256 pairs of f32 in shared memory, once per lane (no conflicts);
//           a permute makes the address, two products, one rounding: 2.5 instructions per weight
// Transpose a byte holds two neighbours along K, which are rows of the result there: rows of a
//           tile may come in any order, so each byte feeds two rows; ldmatrix.trans hands them out
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      register-fed wgmma with swapped operands: Machete (vLLM), quack
#pragma once
#include "nf4_linear/hopper/decode.cuh"
#include "nf4_linear/hopper/produce.cuh"
#include "nf4_linear/hopper/result.cuh"
#include "nf4_linear/hopper/stretch.cuh"

template <typename T, typename Way, typename S>
struct Consumer {
    static constexpr int TOKENS = S::TOKENS, TILES = S::TILES, PARTS = S::PARTS;
    static constexpr int COLUMNS = S::COLUMNS, STAGES = S::STAGES, PITCH = S::PITCH;
    float c[TILES][TOKENS / 2];
    Fragments<TILES> f[2];
    // How many products ahead the table is looked up; two warpgroups to a stage: warps hide it.
    static constexpr int AHEAD = PARTS == 2 ? 0 : Way::DEEP ? 2 : 1;
    static constexpr int FOUND = AHEAD == 0 ? 1 : 2 * AHEAD;
    Found<TILES> found[FOUND];
    Way way;
    const u32 table, lane_offset;
    const int consumer, part, lane;

    __device__ __forceinline__ Consumer(u32 table)
        : way((threadIdx.x - 128) % 256, threadIdx.x % 32),
          table(table),
          lane_offset(threadIdx.x % 32 * 8),
          consumer((threadIdx.x - 128) % 256),
          part(PARTS == 1 ? 0 : (warp_of_block() - 4) / 8),
          lane(threadIdx.x % 32) {}

    // For a product of a stage's: half of its bytes lies in each buffer.
    template <int PRODUCT>
    __device__ __forceinline__ void find(const Stage<S>& stage) {
        way.template find<PRODUCT / 2, PRODUCT % 2>(found[PRODUCT % FOUND], table, lane_offset,
                                                    stage.scales, PRODUCT);
    }

    __device__ __forceinline__ void multiply(int which, u64 b) {
        wgmma_fence();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            Wgmma<T, TOKENS>::run(c[tile], f[which].a[tile], b);
        wgmma_commit();
        wgmma_wait<1>();
        f[which ^ 1].keep_all();
    }

    // Rounds and multiplies a product of this warpgroup's, whose table entries have arrived, and
    // looks up the one after it, or after that: of this stage, or of the next.
    template <int PRODUCT>
    __device__ __forceinline__ void product(const Stage<S>& stage, const Stage<S>& next, u64 b) {
        constexpr int LATER = PRODUCT + (AHEAD == 2 ? 2 : 1);
        const Stage<S>& later = LATER < S::PRODUCTS ? stage : next;
        const int step = PARTS == 1 ? PRODUCT : 2 * part + PRODUCT;
        if (AHEAD > 0) find<LATER % S::PRODUCTS>(later);
        way.round(f[PRODUCT % 2], found[PRODUCT % FOUND], stage.scales, step);
        if (AHEAD == 0) find<LATER % S::PRODUCTS>(later);
        multiply(PRODUCT % 2, b + 2 * step);
    }

    // A stage whose products are done, to all who fill it.
    __device__ __forceinline__ void give_back(Barrier* empty, int slot) {
        if (slot < 0) return;
        if (S::SHARING == 1 && lane < ARRIVING_LANES) empty[slot].arrive();
        if (S::SHARING == 2 && lane < 2 * ARRIVING_LANES)  // one lane each, or every lane to both
            for (int turn = 0; turn < min(ARRIVING_LANES, 2); ++turn)
                empty[slot].arrive_at((cluster_rank() & ~1u) + (lane + turn) % 2);
    }

    // While a product runs, the next one's weights are rounded and those after it looked up.
    __device__ __forceinline__ void run(const Problem& p, const Work& w, Stage<S>* stages,
                                        Barrier* full, Barrier* empty, u32 before) {
#pragma unroll
        for (int i = 0; i < TILES * TOKENS / 2; ++i) c[i % TILES][i / TILES] = 0.f;
        int waiting = -1;  // the stage to give back once its products are done
        if (w.steps > 0) {
            const Stage<S>& stage = stages[before % STAGES];
            full[before % STAGES].wait(before / STAGES & 1);
            way.template load<0>(stage.packed, PARTS == 1 ? 0 : part);
            if constexpr (AHEAD == 2) {
                way.template load<1>(stage.packed, 1);
                find<1>(stage);
            }
            find<0>(stage);
        }
#pragma unroll 1
        for (int step = 0; step < w.steps; ++step) {
            const u32 at = before + step + 1;
            const int slot = (before + step) % STAGES;
            const int after = step + 1 < w.steps ? at % STAGES : slot;  // nothing that is not there
            const Stage<S>&stage = stages[slot], &next = stages[after];
            const u64 b = tile_descriptor(stage.activations);
            if constexpr (AHEAD == 2) {
                product<0>(stage, next, b);
                give_back(empty, waiting);
                if (step + 1 < w.steps) full[after].wait(at / STAGES & 1);
                way.template load<0>(next.packed, 0);
                product<1>(stage, next, b);
                way.template load<1>(next.packed, 1);
                product<2>(stage, next, b);
            } else {
                if (PARTS == 1) way.template load<1>(stage.packed, 1);
                way.load_scales(stage.scales);
                product<0>(stage, next, b);
                give_back(empty, waiting);
                if constexpr (PARTS == 1) product<1>(stage, next, b);
                if (step + 1 < w.steps) full[after].wait(at / STAGES & 1);
                way.template load<0>(next.packed, PARTS == 1 ? 0 : part);
                if constexpr (PARTS == 1) product<2>(stage, next, b);
            }
            product<S::PRODUCTS - 1>(stage, next, b);
            waiting = slot;
        }
        wgmma_wait<0>();
        f[0].keep_all();
        f[1].keep_all();
#pragma unroll 1
        for (int step = 0; step < w.low_rank_steps; ++step) {
            const u32 at = before + w.steps + step, slot = at % STAGES;
            full[slot].wait(at / STAGES & 1);
            const u64 b = tile_descriptor(stages[slot].activations);
#pragma unroll
            for (int i = 0; i < S::PRODUCTS; ++i) {
                const int s = PARTS == 1 ? i : 2 * part + i;
                Fragments<TILES> e;
                Way::low_rank(e, p, w.first, consumer, lane, step * DEPTH + 16 * s);
                wgmma_fence();
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
                    Wgmma<T, TOKENS>::run(c[tile], e.a[tile], b + 2 * s);
                wgmma_commit();
                wgmma_wait<0>();
                e.keep_all();
            }
            give_back(empty, waiting);
            waiting = slot;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TILES * TOKENS / 2; ++i) keep(c[i % TILES][i / TILES]);
        give_back(empty, waiting);
    }

    // Sums to shared memory as [part][token][column].
    __device__ __forceinline__ void store(float* sums) {
        const int g = lane / 4, q = lane % 4;
        sums += part * TOKENS * PITCH;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float* to = sums + (8 * j + 2 * q + i) * PITCH;
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        to[Way::column(consumer, g, tile, h)] = c[tile][4 * j + 2 * h + i];
            }
    }

    // This block's share of the tokens: the sums of all who share the tile's contraction, in order,
    // bias, one rounding.
    __device__ __forceinline__ void write_out(const Problem& p, const float* sums, const Work& w,
                                              int columns, u32 rank, u32 ranks) {
        const int share = (TOKENS + ranks - 1) / ranks, first_row = rank * share;
        const int rows = min(min(share, TOKENS - first_row), p.m - w.token - first_row);
        for (int i = threadIdx.x - 128; i < rows * (COLUMNS / 8); i += S::THREADS) {
            const int row = first_row + i / (COLUMNS / 8), column = (i % (COLUMNS / 8)) * 8;
            if (w.first + column >= columns) continue;
            float v[8] = {};
            if (p.bias != nullptr)
#pragma unroll
                for (int e = 0; e < 8; ++e) v[e] = T::read(p.bias[w.first + column + e]);
#pragma unroll
            for (u32 r = 0; r < 8; ++r) {
                if (r >= ranks) break;
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float* own = sums + (part * TOKENS + row) * PITCH + column + 4 * h;
                        const float4 add =
                            ranks == 1 ? *reinterpret_cast<const float4*>(own)
                                       : read_peer(shared_address(own), r * S::SHARING + w.half);
                        v[4 * h] += add.x;
                        v[4 * h + 1] += add.y;
                        v[4 * h + 2] += add.z;
                        v[4 * h + 3] += add.w;
                    }
            }
            const uint4 packed = {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]),
                                  T::pack(v[6], v[7])};
            u16* to = p.out + static_cast<long long>(w.token + row) * columns + w.first + column;
            *reinterpret_cast<uint4*>(to) = packed;
        }
    }
};

template <typename T, typename Way, typename S>
__device__ __forceinline__ void fused(const TensorMap& activations, const TensorMap& packed,
                                      const TensorMap& small_map, const Problem& p,
                                      const Small& small) {
    extern __shared__ __align__(1024) u8 memory[];
    float4* table = reinterpret_cast<float4*>(memory);
    Stage<S>* stages = reinterpret_cast<Stage<S>*>(memory + TABLE_BYTES);
    u8* after = memory + TABLE_BYTES + S::STAGES * sizeof(Stage<S>);
    float* map = reinterpret_cast<float*>(after);
    after += MAP_BYTES;
    float* sums = reinterpret_cast<float*>(S::OWN_SUMS ? after : memory + TABLE_BYTES);
    after += S::OWN_SUMS ? S::SUMS_BYTES : 0;
    u8* result = after;
    after += S::RESULT_BYTES;
    Barrier* full = reinterpret_cast<Barrier*>(after);
    Barrier* empty = full + S::STAGES;
    u32* word = reinterpret_cast<u32*>(empty + S::STAGES);
    static_assert(S::STAGES * sizeof(Stage<S>) >= S::SUMS_BYTES, "no room");
    typedef Grid<S, Way::TRANSPOSED> Tiles;
    launch_next_kernel();  // it waits for this one's end before it touches anything of it
    if (own_cluster() < small.makers) {
        make_small<T, Way::TRANSPOSED, S>(small, p, reinterpret_cast<float*>(memory));
        return;
    }

    if (threadIdx.x < S::STAGES) {
        full[threadIdx.x].init(1 + 4 * ARRIVING_LANES);  // the tiles', and warps that decode scales
        empty[threadIdx.x].init(4 * S::GROUPS * S::SHARING * ARRIVING_LANES);
        fence_barrier_init();
    } else if (threadIdx.x == 32) {
        prefetch_map(packed);
        prefetch_map(activations);
    }
    if (S::SHARING > 1)
        meet_cluster();  // a neighbour's copies count on these barriers
    else
        __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<S::GROUPS == 2 ? 56 : 64>();
#pragma unroll 1
        for (u32 before = 0, done = 0;;) {
            const Tiles grid(p);
            const Stretch<S> stretch(grid.tiles, grid.quads, small.makers, done);
            if (stretch.done()) break;
            const Work w = grid.work(stretch);
            const bool apart = grid.apart();
            produce<Way::TRANSPOSED, S>(activations, packed, small_map, p, small,
                                        grid.tiles * S::SHARING * grid.low_rank_steps, w, stages,
                                        full, empty, map, before, before == 0 || !apart);
            before += w.steps + w.low_rank_steps;
            done += stretch.length();
            if (grid.ranks > 1) meet_cluster();  // who decode have sums for one another
            if (!apart) grid.sync_all();
        }
    } else {
        take_registers<S::GROUPS == 2 ? 224 : 104>();
        fill_table<S::THREADS>(table, threadIdx.x - 128);
        sync_threads<1, S::THREADS>();
        Consumer<T, Way, S> consumer(shared_address(table));
#pragma unroll 1
        for (u32 before = 0, done = 0;;) {
            {
                const Tiles grid(p);
                const Stretch<S> stretch(grid.tiles, grid.quads, small.makers, done);
                if (stretch.done()) break;
                const Work w = grid.work(stretch);
                consumer.run(p, w, stages, full, empty, before);
                before += w.steps + w.low_rank_steps;
            }
            const Tiles grid(p);  // again: there was no register for it
            const Stretch<S> stretch(grid.tiles, grid.quads, small.makers, done);
            const Work w = grid.work(stretch);
            const bool apart = grid.apart();
            done += stretch.length();
            const bool direct = grid.direct();
            if (!direct) sync_threads<1, S::THREADS>();  // stages have been read, and sums before
            if (!Meeting<S>(p, stretch, w.half, word).has_all(consumer.c)) {
                // whose cluster comes last adds them up
            } else if (direct) {
                Result<T, Way, S>(p, w.first, consumer.consumer, result)
                    .write(p, w, grid.columns, consumer.c);
            } else {
                consumer.store(sums);
                if (grid.ranks > 1)
                    sync_cluster();
                else
                    sync_threads<1, S::THREADS>();
                consumer.write_out(p, sums, w, grid.columns, grid.rank, grid.ranks);
                if (!apart) fence_shared_copies();  // which come next
            }
            if (!apart) grid.sync_all();  // nobody's memory is used any more
        }
    }
    // A neighbour's copies have come, and its barriers are not used any more.
    if (S::SHARING > 1) meet_cluster();
}

#define FUSED(NAME, T, WAY, ...)                                                                   \
    extern "C" __global__ void __launch_bounds__(128 + Shape<__VA_ARGS__>::THREADS, 1) NAME(       \
        const __grid_constant__ TensorMap activations,                                             \
        const __grid_constant__ TensorMap packed_map, const __grid_constant__ TensorMap small_map, \
        const u8* packed, const void* absmax, const float* nested, const float* offset,            \
        const u16* bias, const u16* factor, u16* out, float* partial, u32* arrived, const u16* x,  \
        const u16* other, u16* low, float* parts, u32* words, long long m, long long n,            \
        long long k, long long rank, long long makers, long long settled, float scale) {           \
        typedef Shape<__VA_ARGS__> S;                                                              \
        const Problem p{packed,                                                                    \
                        NF4Scales{absmax, nested, offset, 6},                                      \
                        bias,                                                                      \
                        factor,                                                                    \
                        out,                                                                       \
                        partial,                                                                   \
                        arrived,                                                                   \
                        static_cast<int>(m),                                                       \
                        static_cast<int>(n),                                                       \
                        static_cast<int>(k),                                                       \
                        static_cast<int>(rank),                                                    \
                        settled != 0};                                                             \
        const Small small{x, other, low, parts, words, scale, static_cast<u32>(makers)};           \
        fused<T, WAY<T, S>, S>(activations, packed_map, small_map, p, small);                      \
    }

// One source file for each dtype and number of tokens: a call compiles only what it needs.
#define NF4_FUSED(T, ...)                     \
    FUSED(nf4_fused, T, Forward, __VA_ARGS__) \
    FUSED(nf4_fused_transposed, T, Backward, __VA_ARGS__)

// Warpgroup 0 of Hopper's fused product: the copy engine's orders and the scales. See fused.cuh.
#pragma once
#include "nf4_linear/hopper/small.cuh"

// What memory holds for the scales of four stages, and which of them a thread decodes. Forward: of
// rows t, t + 128, a byte for each stage. Transposed: of row t / 2 of each stage, a byte per tile.
template <bool TRANSPOSED, int TILES>
struct StoredScales {
    static constexpr int ROWS = TRANSPOSED ? QUAD : TILES;
    u32 codes[ROWS];
    float group[ROWS];

    static __device__ __forceinline__ int row(int first, int depth, int i) {
        const int t = threadIdx.x;
        return TRANSPOSED ? depth + DEPTH * i + t / 2 : first + t + 128 * i;
    }
    static __device__ __forceinline__ int block(int first, int depth) {
        return TRANSPOSED ? first / DEPTH + threadIdx.x % 2 * TILES : depth / DEPTH;
    }
    __device__ __forceinline__ void load(const Problem& p, int first, int depth) {
        const int blocks = p.k / DEPTH, column = block(first, depth);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int n = row(first, depth, i);
            const u32 at = static_cast<u32>(n) * blocks + column;
            const u8* from = static_cast<const u8*>(p.scales.absmax) + at;
            const bool inside = n < p.n && column < blocks && p.scales.nested != nullptr;
            codes[i] = 0;
            if (inside && !TRANSPOSED) codes[i] = __ldg(reinterpret_cast<const u32*>(from));
            if (inside && TRANSPOSED)
                codes[i] = TILES == 2 ? __ldg(reinterpret_cast<const u16*>(from)) : __ldg(from);
            group[i] = inside ? __ldg(p.scales.nested + at / 256) : 0.f;
        }
    }
    // Scales without a nest are read only now.
    static __device__ __forceinline__ float plain(const Problem& p, int n, int column) {
        const int blocks = p.k / DEPTH;
        if (n >= p.n || column >= blocks) return 0.f;
        return __ldg(static_cast<const float*>(p.scales.absmax) + static_cast<u32>(n) * blocks +
                     column);
    }
    // The scales of all four stages.
    __device__ __forceinline__ void decode(float (&scales)[QUAD][TILES], const Problem& p,
                                           float mean, const float* map, int first,
                                           int depth) const {
#pragma unroll
        for (int s = 0; s < QUAD; ++s)
#pragma unroll
            for (int h = 0; h < TILES; ++h) {
                const int i = TRANSPOSED ? s : h, byte = TRANSPOSED ? h : s;
                const u32 code = (codes[i] >> (8 * byte)) & 255;
                scales[s][h] = p.scales.nested != nullptr
                                   ? __fadd_rn(__fmul_rn(map[code], group[i]), mean)
                                   : plain(p, row(first, depth, i), block(first, depth) + byte);
            }
    }
    // Those of a stage: of rows t and t + 128, or of neighbouring blocks of row t / 2.
    static __device__ __forceinline__ void store(float* to, const float (&scales)[TILES]) {
        const int t = threadIdx.x;
#pragma unroll
        for (int h = 0; h < TILES; ++h)
            to[TRANSPOSED ? (t % 2 * TILES + h) * DEPTH + t / 2
                          : place_of_scale<2 * TILES>(t) + 128 * h] = scales[h];
    }
};

template <bool TRANSPOSED, typename S>
__device__ __forceinline__ void bring_weights(const TensorMap& packed, const Work& w,
                                              Stage<S>& stage, Barrier& full, int step) {
    const int depth = (w.begin + step) * DEPTH;
    full.arrive_expecting(S::TILE_BYTES + S::PACKED_BYTES);
    if (TRANSPOSED)
        copy_box(stage.packed, packed, depth, w.first / 2, full);
    else
        copy_box(stage.packed, packed, w.first, depth / 2, full);
}

template <typename S>
__device__ __forceinline__ void bring_activations(const TensorMap& from, const Work& w,
                                                  Stage<S>& stage, Barrier& full, int column) {
    if (S::SHARING == 1) {
        copy_box(stage.activations, from, w.token, column, full);
    } else {
        u8* to = stage.activations + w.half * (S::TILE_BYTES / 2);
        copy_box_to_pair(to, from, w.token + w.half * (S::TOKENS / 2), column, full);
    }
}

// Warpgroup 0: its warps take turns at keeping the copy engine busy, all threads decode scales, of
// four stages at once. `before` stages have gone through the ring; `fresh`: all of them are empty.
// W and its scales are asked for before the kernel ahead has ended: hopper.py launches so only
// where that one does not write them. Who orders is told in a way from which the compiler knows
// addresses for uniform: otherwise an order costs 400 cycles, and one thread that gave them all was
// what the block waited for.
template <bool TRANSPOSED, typename S>
__device__ __forceinline__ void produce(const TensorMap& activations, const TensorMap& packed,
                                        const TensorMap& small_map, const Problem& p,
                                        const Small& small, int readers, const Work& w,
                                        Stage<S>* stages, Barrier* full, Barrier* empty, float* map,
                                        u32 before, bool fresh) {
    const int t = threadIdx.x;
    const int at_once = fresh ? min(S::STAGES, w.steps) : 0;
    static_assert(QUAD == 4, "a stage of four for each warp");
    const int warp = warp_of_block();
    // Asked for before the tiles, of which there are many.
    StoredScales<TRANSPOSED, S::TILES> stored;
    stored.load(p, w.first, w.begin * DEPTH);
    const float mean = p.scales.mean();
    const float map_values[2] = {DYNAMIC_MAP_VALUES[t], DYNAMIC_MAP_VALUES[t + 128]};
    if (fresh && elected()) {
#pragma unroll 1
        for (int step = warp; step < at_once; step += QUAD) {
            const int slot = (before + step) % S::STAGES;
            bring_weights<TRANSPOSED, S>(packed, w, stages[slot], full[slot], step);
        }
        if (!p.settled) wait_for_previous_kernel();
#pragma unroll 1
        for (int step = warp; step < at_once; step += QUAD) {
            const int slot = (before + step) % S::STAGES;
            bring_activations<S>(activations, w, stages[slot], full[slot],
                                 (w.begin + step) * DEPTH);
        }
    }
    if (before == 0) {
        map[t] = map_values[0];
        map[t + 128] = map_values[1];
        sync_threads<2, 128>();
    }
    for (int base = 0; base < w.steps; base += QUAD) {
        const int depth = (w.begin + base) * DEPTH;
        float scales[QUAD][S::TILES];
        stored.decode(scales, p, mean, map, w.first, depth);
        if (base + QUAD < w.steps) stored.load(p, w.first, depth + QUAD * DEPTH);
#pragma unroll
        for (int s = 0; s < QUAD; ++s) {
            const int step = base + s;
            if (step >= w.steps) break;
            const u32 at = before + step, slot = at % S::STAGES;
            empty[slot].wait((at / S::STAGES & 1) ^ 1);
            if (warp == s && step >= at_once && elected()) {
                bring_weights<TRANSPOSED, S>(packed, w, stages[slot], full[slot], step);
                bring_activations<S>(activations, w, stages[slot], full[slot],
                                     (w.begin + step) * DEPTH);
            }
            stored.store(stages[slot].scales, scales[s]);
            __syncwarp();
            if (t % 32 < ARRIVING_LANES) full[slot].arrive();
        }
    }
#pragma unroll 1
    for (int step = 0; step < w.low_rank_steps; ++step) {
        const u32 at = before + w.steps + step, slot = at % S::STAGES;
        empty[slot].wait((at / S::STAGES & 1) ^ 1);
        if (warp == 0 && elected()) {
            wait_for_small<S::SMALL_TOKENS>(small, p, readers);
            full[slot].arrive_expecting(S::TILE_BYTES);
            bring_activations<S>(small_map, w, stages[slot], full[slot], step * DEPTH);
        }
        __syncwarp();
        if (t % 32 < ARRIVING_LANES) full[slot].arrive();
    }
}

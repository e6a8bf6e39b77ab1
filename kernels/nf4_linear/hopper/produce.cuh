// Warpgroup 0 of Hopper's fused product: the copy engine's orders and the scales. See fused.cuh.
#pragma once
#include "nf4_linear/hopper/shape.cuh"

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
            to[TRANSPOSED ? (t % 2 * TILES + h) * DEPTH + t / 2 : t + 128 * h] = scales[h];
    }
};

template <bool TRANSPOSED, typename S>
__device__ __forceinline__ void bring_tiles(const TensorMap& activations, const TensorMap& packed,
                                            const TensorMap& small, const Work& w, Stage<S>& stage,
                                            Barrier& full, int step) {
    const int depth = (w.begin + step) * DEPTH;
    const bool main = step < w.steps;
    full.arrive_expecting(S::TILE_BYTES + (main ? S::PACKED_BYTES : 0));
    if (main && TRANSPOSED) copy_box(stage.packed, packed, depth, w.first / 2, full);
    if (main && !TRANSPOSED) copy_box(stage.packed, packed, w.first, depth / 2, full);
    if (!main) wait_for_previous_kernel();  // which made `small`
    const TensorMap& from = main ? activations : small;
    const int column = main ? depth : (step - w.steps) * DEPTH;
    if (S::SHARING == 1) {
        copy_box(stage.activations, from, w.token, column, full);
    } else {
        u8* to = stage.activations + w.half * (S::TILE_BYTES / 2);
        copy_box_to_pair(to, from, w.token + w.half * (S::TOKENS / 2), column, full);
    }
}

// Warpgroup 0: its warps take turns at keeping the copy engine busy, all threads decode scales, of
// four stages at once. `before` stages have gone through the ring, and all of them are empty. Who
// orders is told in a way from which the compiler knows addresses for uniform: otherwise an order
// costs 400 cycles, and one thread that gave them all was what the block waited for.
template <bool TRANSPOSED, typename S>
__device__ __forceinline__ void produce(const TensorMap& activations, const TensorMap& packed,
                                        const TensorMap& small, const Problem& p, const Work& w,
                                        Stage<S>* stages, Barrier* full, Barrier* empty,
                                        const float* map, u32 before) {
    const int t = threadIdx.x, total = w.steps + w.low_rank_steps;
    const int at_once = min(S::STAGES, w.steps);
    static_assert(QUAD == 4, "a stage of four for each warp");
    const int warp = warp_of_block();
    if (elected())
#pragma unroll 1
        for (int step = warp; step < at_once; step += QUAD) {
            const int slot = (before + step) % S::STAGES;
            bring_tiles<TRANSPOSED, S>(activations, packed, small, w, stages[slot], full[slot],
                                       step);
        }
    StoredScales<TRANSPOSED, S::TILES> stored;
    stored.load(p, w.first, w.begin * DEPTH);
    const float mean = p.scales.mean();
    for (int base = 0; base < total; base += QUAD) {
        const int depth = (w.begin + base) * DEPTH;
        float scales[QUAD][S::TILES];
        if (base < w.steps) stored.decode(scales, p, mean, map, w.first, depth);
        if (base + QUAD < w.steps) stored.load(p, w.first, depth + QUAD * DEPTH);
#pragma unroll
        for (int s = 0; s < QUAD; ++s) {
            const int step = base + s;
            if (step >= total) break;
            const u32 at = before + step, slot = at % S::STAGES;
            empty[slot].wait((at / S::STAGES & 1) ^ 1);
            if (warp == s && step >= at_once && elected())
                bring_tiles<TRANSPOSED, S>(activations, packed, small, w, stages[slot], full[slot],
                                           step);
            if (step < w.steps) stored.store(stages[slot].scales, scales[s]);
            __syncwarp();
            if (t % 32 < ARRIVING_LANES) full[slot].arrive();
        }
    }
}

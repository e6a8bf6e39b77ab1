// What the parts of Hopper's fused product share: sizes, the problem, a stage. See fused.cuh.
#pragma once
#include "common/convert.cuh"
#include "common/hopper.cuh"
#include "common/nf4.cuh"
#include "common/wgmma.cuh"

constexpr int DEPTH = 64;  // of the contraction, per stage: one block of scales
constexpr int QUAD = 4;    // stages whose scales are read at once: four bytes of a row
constexpr int TABLE_BYTES = 256 * 32 * 8;
constexpr int MAP_BYTES = 1024;

// TOKENS x COLUMNS of the result per block, GROUPS warpgroups that decode, each TILES x 64 columns.
template <int TOKENS_, int STAGES_, int GROUPS_, int TILES_>
struct Shape {
    static constexpr int TOKENS = TOKENS_, STAGES = STAGES_, GROUPS = GROUPS_, TILES = TILES_;
    static constexpr int COLUMNS = 128 * TILES;
    static constexpr int THREADS = 128 * GROUPS;  // that decode
    static constexpr int PARTS = GROUPS / 2;      // warpgroups that share a stage's contraction
    static constexpr int PRODUCTS = 4 / PARTS;    // of 16 of the contraction, for each of them
    static constexpr int PITCH = COLUMNS + 4;     // floats per token when sums meet
    static constexpr int TILE_BYTES = TOKENS * DEPTH * 2, PACKED_BYTES = COLUMNS * DEPTH / 2;
    // Two blocks with neighbouring columns bring in half of their common activations each.
    static constexpr int SHARING = TILES == 1 ? 2 : 1;
    // Sums have memory of their own where there is some: then the next piece's tiles need not wait
    // until this one's are written. Else they lie over the stages.
    static constexpr bool OWN_SUMS = TOKENS <= 16;
    // Of a tile of the small product, and how many steps of it are on their way.
    static constexpr int SMALL_TOKENS = GROUPS == 4 ? 16 : 32, SMALL_AHEAD = 4;
    static constexpr int SUMS_BYTES = PARTS * TOKENS * PITCH * 4;
    // Whether clusters make whole tiles first: Stretch. It costs few tokens more than it gains.
    static constexpr bool WHOLE = PARTS == 1;
    // Who has a tile's sums in one place writes them by way of this much: Result.
    static constexpr int RESULT_BYTES = PARTS == 1 ? 10240 : 0;
};

template <typename S>
struct alignas(1024) Stage {
    u8 activations[S::TILE_BYTES];
    u8 packed[S::PACKED_BYTES];
    float scales[S::COLUMNS];
};

// Where a stage keeps the scale of a tile's row, forward: a thread's R rows, 8 apart, lie together.
template <int R>
__device__ __forceinline__ int place_of_scale(int r) {
    return r / (8 * R) * (8 * R) + r % 8 * R + r / 8 % R;
}

// One matrix product as the blocks see it.
struct Problem {
    const u8* packed;
    NF4Scales scales;
    const u16* bias;    // null without
    const u16* factor;  // null without LoRA
    u16* out;
    float* partial;  // sums of tiles that several clusters make: Meeting
    u32* arrived;    // of a block's tile: how many of its clusters have left their sums there
    int m, n, k, rank;
    bool settled;  // all that came before the previous kernel has ended, so that x is there
};

// What a block brings in: its tile, and its share of the contraction.
struct Work {
    int first, token, begin, steps, low_rank_steps;
    u32 half;  // which half of shared activations
};

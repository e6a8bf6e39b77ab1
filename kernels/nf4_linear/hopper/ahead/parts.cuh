// What the warps of the product that decodes ahead share: sizes, the problem, where a tile lies.
// See product.cuh.
#pragma once
#include "common/counters.cuh"
#include "common/mma.cuh"
#include "common/nf4.cuh"
#include "common/wgmma_shared.cuh"

constexpr int DEPTH = 64;         // of the contraction, per stage
constexpr int CELL_DEPTH = 128;   // of the contraction: decoded before it is said to be there
constexpr int STRIP = 32 * 128;   // weights that a warp decodes at once
constexpr int TOKENS = 128;       // of a block; a pair of blocks takes neighbours
constexpr int DECODERS = 3;       // warps that decode
constexpr int MOST_AT_ONCE = 4;   // strips that a warp says are there
constexpr int WORDS_BEFORE = 32;  // of the state, before the cells: the count has its own line

template <bool TRANSPOSED_, int COLUMNS_, int STAGES_>
struct Shape {
    static constexpr bool TRANSPOSED = TRANSPOSED_;
    static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_;
    static constexpr int STRIPS = COLUMNS * CELL_DEPTH / STRIP;  // of a cell
    static constexpr int LEFT_BYTES = TOKENS * DEPTH * 2, RIGHT_BYTES = COLUMNS * DEPTH * 2;
};

template <typename S>
struct alignas(1024) Stage {
    u8 left[S::LEFT_BYTES];    // activations
    u8 right[S::RIGHT_BYTES];  // decoded weights
};

struct Problem {
    const u8* packed;
    NF4Scales scales;
    u16* decoded;     // (n,k)
    const u16* bias;  // null without
    u16* out;         // (m, columns)
    u32* state;       // zeros: strips given out, then for each cell strips that are there
    int m, n, k, rank;
    int group;     // pairs of token tiles that are neighbours in time
    int together;  // column tiles that are worked on at once
};

// The product as a matter of tiles.
template <typename S>
struct Grid {
    int contraction, columns;  // of the product
    int chunks, column_tiles;  // cells
    int token_pairs, tiles;    // tiles of a pair of blocks
    u32* cells;                // strips that are there

    __device__ __forceinline__ explicit Grid(const Problem& p) {
        contraction = S::TRANSPOSED ? p.n : p.k;
        columns = S::TRANSPOSED ? p.k : p.n;
        chunks = (contraction + CELL_DEPTH - 1) / CELL_DEPTH;
        column_tiles = (columns + S::COLUMNS - 1) / S::COLUMNS;
        token_pairs = (p.m + 2 * TOKENS - 1) / (2 * TOKENS);
        tiles = token_pairs * column_tiles;
        cells = p.state + WORDS_BEFORE;
    }
};

// Tiles in groups of token pairs: neighbours in time share both operands.
struct Place {
    int pair, column;

    template <typename S>
    __device__ __forceinline__ Place(const Grid<S>& grid, int group, int tile) {
        const int per_group = group * grid.column_tiles, which = tile / per_group;
        const int width = min(group, grid.token_pairs - which * group);
        const int inside = tile - which * per_group;
        pair = which * group + inside % width;
        column = inside / width;
    }
};

// No barrier to the compiler: look-ups may pass it. What says that it is there may not.
__device__ __forceinline__ void store16(u16* to, const u32 (&v)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3]));
}

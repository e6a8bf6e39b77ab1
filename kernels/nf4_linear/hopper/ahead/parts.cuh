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
constexpr int WORDS_BEFORE = 64;  // of the state, before the cells: each count has its own line
constexpr int TILES_GIVEN = 32;   // which of them counts tiles
constexpr int RANKS = 16;         // of the small product, where a launch makes it
constexpr int MULTIPLIERS = 8;    // warps that multiply

template <bool TRANSPOSED_, int COLUMNS_, int STAGES_>
struct Shape {
    static constexpr bool TRANSPOSED = TRANSPOSED_;
    static constexpr int COLUMNS = COLUMNS_, STAGES = STAGES_;
    static constexpr int STRIPS = COLUMNS * CELL_DEPTH / STRIP;  // of a cell
    static constexpr int LEFT_BYTES = TOKENS * DEPTH * 2, RIGHT_BYTES = COLUMNS * DEPTH * 2;
    static constexpr int NARROW_BYTES = RANKS * DEPTH * 2;
    static constexpr int HALF = COLUMNS / 2 % 128 == 0 ? COLUMNS / 2 : COLUMNS;  // see Grid
};

template <typename S>
struct alignas(1024) Stage {
    u8 left[S::LEFT_BYTES];      // activations
    u8 right[S::RIGHT_BYTES];    // decoded weights
    u8 narrow[S::NARROW_BYTES];  // of the factor that meets the activations
};

struct Problem {
    const u8* packed;
    NF4Scales scales;
    u16* decoded;     // (n,k)
    const u16* bias;  // null without
    u16* out;         // (m, columns)
    u16* small;       // (m, rank), made here; null: made before, or no ranks
    float scale;      // of the small product
    u32* state;       // zeros: strips and tiles given out, then for each cell strips that are
                      // there, then for each 128 rows warps whose part of `small` is
    int m, n, k, rank;
    int group;     // pairs of token tiles that are neighbours in time
    int together;  // column tiles that are worked on at once
    bool helping;  // those who multiply decode a strip each before they have weights
};

// The product as a matter of tiles.
template <typename S>
struct Grid {
    int contraction, columns;  // of the product
    int chunks, column_tiles;  // cells
    int token_pairs, tiles;    // tiles of a pair of blocks
    int whole, turns;          // tiles in full, those and halves of the others
    u32* cells;                // strips that are there
    u32* smalls;               // parts of the small product that are

    __device__ __forceinline__ explicit Grid(const Problem& p) {
        contraction = S::TRANSPOSED ? p.n : p.k;
        columns = S::TRANSPOSED ? p.k : p.n;
        chunks = (contraction + CELL_DEPTH - 1) / CELL_DEPTH;
        column_tiles = (columns + S::COLUMNS - 1) / S::COLUMNS;
        token_pairs = (p.m + 2 * TOKENS - 1) / (2 * TOKENS);
        tiles = token_pairs * column_tiles;
        // Tiles of the last round are shared by two where half of the pairs would have none.
        const int pairs = static_cast<int>(cluster_count()), over = tiles % pairs;
        const bool shared = S::HALF < S::COLUMNS && 2 * over <= pairs;
        whole = shared ? tiles - over : tiles;
        turns = shared ? tiles + over : tiles;
        cells = p.state + WORDS_BEFORE;
        smalls = cells + column_tiles * chunks;
    }
};

// Tiles in groups of token pairs: neighbours in time share both operands. A group's first column,
// which makes the small product, comes before the other columns of the group before it.
struct Place {
    int pair, tile;     // of tokens, of columns
    int column, width;  // of the result: the first one, how many

    template <typename S>
    __device__ __forceinline__ Place(const Grid<S>& grid, int group, int turn) {
        const int half = turn - grid.whole;
        find(grid, group, half < 0 ? turn : grid.whole + half / 2);
        column = tile * S::COLUMNS + (half < 0 ? 0 : half % 2 * S::HALF);
        width = half < 0 ? S::COLUMNS : S::HALF;
    }

    template <typename S>
    __device__ __forceinline__ void find(const Grid<S>& grid, int group, int index) {
        const int first = min(group, grid.token_pairs), columns = grid.column_tiles - 1;
        pair = index, tile = 0;
        if (index < first) return;
        const int last = (grid.token_pairs - 1) / group;
        int inside = index - first;
        int which = min(inside / (group * grid.column_tiles), max(last - 1, 0));
        inside -= which * group * grid.column_tiles;
        int next = pairs_of(grid, group, which + 1);
        if (which < last && inside >= next + group * columns) {
            inside -= next + group * columns;
            next = pairs_of(grid, group, ++which + 1);
        }
        const bool ahead = inside < next;
        if (!ahead) inside -= next;
        const int own = pairs_of(grid, group, which);
        pair = (which + ahead) * group + (ahead ? inside : inside % own);
        tile = ahead ? 0 : 1 + inside / own;
    }

    template <typename S>
    static __device__ __forceinline__ int pairs_of(const Grid<S>& grid, int group, int which) {
        return max(0, min(group, grid.token_pairs - which * group));
    }
};

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

// No barrier to the compiler: look-ups may pass it. What says that it is there may not.
__device__ __forceinline__ void store16(u16* to, const u32 (&v)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3]));
}

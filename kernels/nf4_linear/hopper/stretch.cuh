// A cluster's part of Hopper's fused product: a stretch of all tiles' contraction. See fused.cuh.
//
// Of more than 32 tokens, each cluster first makes as many whole tiles as all can: they are at the
// same place of the contraction, so that what one brings in the others find in the cache. The tiles
// that are left lie one behind the other, each as long as its contraction; clusters take stretches
// of equal length, so all of them end at about the same time whatever the number of tiles. A tile
// that a stretch cuts is made by several clusters: each leaves its sums in memory and counts
// itself; who finds all others counted adds them up, in the order of the contraction. Nobody waits
// for that.
#pragma once
#include "common/counters.cuh"
#include "nf4_linear/hopper/shape.cuh"

// The first `makers` clusters take none: they make the small product.
template <typename S>
struct Stretch {
    const int quads;  // of a tile
    const u32 makers;
    int whole, left;     // tiles that are made whole, and the others
    int tile, from, to;  // the piece that comes next, in quads of its tile

    // After so many quads of this cluster's.
    __device__ __forceinline__ Stretch(int tiles, int quads, u32 makers, int done)
        : quads(quads), makers(makers), whole(0), left(tiles), tile(0), from(0), to(0) {
        const int count = clusters();
        if (S::WHOLE && tiles >= count) {
            whole = tiles / count * count;
            left = tiles - whole;
            if (left > 0 && left * quads < count) {  // a quad for everybody
                whole -= count;
                left += count;
            }
        }
        const int turn = S::WHOLE && done > 0 ? done / quads : 0;
        if (S::WHOLE && turn * count < whole) {
            tile = turn * count + cluster();
            to = quads;
        } else if (!S::WHOLE || left > 0) {
            const int made = S::WHOLE ? whole / count * quads : 0;
            const int at = begin_of(cluster()) + done - made;
            from = at % quads;
            to = min(quads, from + begin_of(cluster() + 1) - at);
            tile = whole + at / quads;
        }
    }
    __device__ __forceinline__ u32 cluster() const { return own_cluster() - makers; }
    __device__ __forceinline__ u32 clusters() const { return cluster_count() - makers; }
    // Quads of the tiles that are left, of which there are less than 2^32: hopper_tiling.py.
    __device__ __forceinline__ int begin_of(u32 which) const {
        return static_cast<u32>(left * quads) * which / clusters();
    }
    // Whose stretch such a quad is part of.
    __device__ __forceinline__ int owner_of(int quad) const {
        return ((quad + 1u) * clusters() - 1) / static_cast<u32>(left * quads);
    }
    __device__ __forceinline__ bool done() const { return to <= from; }
    __device__ __forceinline__ int length() const { return to - from; }
};

// Where tiles and blocks are. Worked out anew for each piece: in between every register is needed.
template <typename S, bool TRANSPOSED>
struct Grid {
    int columns, rows, token_tiles, tiles, depths, quads;
    u32 half, rank, ranks, blocks;
    int low_rank_steps;

    // Blocks of a cluster: pairs with neighbouring columns, if they share, for each split.
    __device__ __forceinline__ explicit Grid(const Problem& p) {
        constexpr int WIDTH = S::COLUMNS * S::SHARING;
        const u32 in_cluster = cluster_rank();
        blocks = cluster_size();
        half = in_cluster % S::SHARING;
        rank = in_cluster / S::SHARING;
        ranks = blocks / S::SHARING;
        columns = anew(TRANSPOSED ? p.k : p.n);
        rows = (columns + WIDTH - 1) / WIDTH;
        token_tiles = (anew(p.m) + S::TOKENS - 1) / S::TOKENS;
        tiles = rows * token_tiles;
        depths = (anew(TRANSPOSED ? p.n : p.k) + DEPTH - 1) / DEPTH;
        quads = (depths + QUAD - 1) / QUAD;
        low_rank_steps = p.factor != nullptr ? (p.rank + DEPTH - 1) / DEPTH : 0;
    }
    // Tiles in groups of eight along the tokens: neighbours in time share both operands. Ranks
    // share a piece; who has the contraction's beginning also adds the low-rank product, after its
    // steps: of a tile that a stretch cuts, that is whose stretch ends with it, and so comes late.
    __device__ __forceinline__ Work work(const Stretch<S>& stretch) const {
        constexpr int WIDTH = S::COLUMNS * S::SHARING;
        const int tile = stretch.tile, group = tile / (8 * rows);
        const int width = min(8, token_tiles - 8 * group), inside = tile - group * 8 * rows;
        const int token = (8 * group + inside % width) * S::TOKENS;
        const int first = inside / width * WIDTH + half * S::COLUMNS;
        const int from = stretch.from, length = stretch.length();
        const int begin = QUAD * (from + static_cast<int>(length * rank / ranks));
        const int end = min(depths, QUAD * (from + static_cast<int>(length * (rank + 1) / ranks)));
        const bool adds = from == 0 && rank == 0;
        return {first, token, begin, end - begin, adds ? low_rank_steps : 0, half};
    }
    // Whether this block's registers have all sums of its piece, and no other block's any.
    __device__ __forceinline__ bool direct() const { return S::PARTS == 1 && ranks == 1; }
    // Whether a piece can begin before the one before it has ended.
    __device__ __forceinline__ bool apart() const {
        return direct() || (S::OWN_SUMS && blocks == 1);
    }
    // Of this block and of its cluster; from two places of the code, so by a number.
    __device__ __forceinline__ void sync_all() const {
        sync_threads<3, 128 + S::THREADS>();
        if (blocks > 1) meet_cluster();
    }
};

// The clusters that make one tile, as a block of one of them sees it.
template <typename S>
struct Meeting {
    static constexpr int EACH = S::TILES * S::TOKENS / 8;  // float4 of a thread
    const Problem& p;
    const Stretch<S>& stretch;
    const u32 half;
    u32* word;  // of shared memory
    int first, others, mine;

    __device__ __forceinline__ Meeting(const Problem& p, const Stretch<S>& stretch, u32 half,
                                       u32* word)
        : p(p), stretch(stretch), half(half), word(word) {
        first = others = 0;
        const int quad = (stretch.tile - stretch.whole) * stretch.quads;
        if (!S::WHOLE || quad >= 0) {
            first = stretch.owner_of(quad);
            others = stretch.owner_of(quad + stretch.quads - 1) - first;
        }
        mine = stretch.cluster() - first;
    }
    // Where the i-th of them leaves its sums: of a cluster's stretch only the first and the last
    // tile can be somebody else's too.
    __device__ __forceinline__ float4* sums_of(int i) const {
        const u64 slot = (2 * (first + i) + (i == 0)) * S::SHARING + half;
        return reinterpret_cast<float4*>(p.partial) + slot * EACH * S::THREADS + threadIdx.x - 128;
    }
    __device__ __forceinline__ u32 tell_all(u32 value) const {
        if (threadIdx.x == 128) *word = value;
        sync_threads<1, S::THREADS>();
        const u32 got = *word;
        sync_threads<1, S::THREADS>();
        return got;
    }
    // Whether the tile is this block's to finish; then `c` has all sums.
    __device__ __forceinline__ bool has_all(float (&c)[S::TILES][S::TOKENS / 2]) const {
        if (others == 0) return true;
        u32* counter = p.arrived + stretch.tile * S::SHARING + half;
        u32 there = 0;
        if (threadIdx.x == 128) {
            wait_for_previous_kernel();  // which made the zeros, or counted here itself
            there = read_acquired(counter);
        }
        if (tell_all(there) < others) {
            leave(c);
            sync_threads<1, S::THREADS>();
            if (threadIdx.x == 128) there = add_in_order(counter);
            if (tell_all(there) < others) return false;
        }
        if (threadIdx.x == 128) *counter = 0;  // as the next launch wants it
        collect(c);
        return true;
    }
    __device__ __forceinline__ void leave(float (&c)[S::TILES][S::TOKENS / 2]) const {
        float4* to = sums_of(mine);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float* v = own(c, i);
            __stcg(to + i * S::THREADS, float4{v[0], v[1], v[2], v[3]});
        }
    }
    // All sums, in the order of the contraction; so many of a thread's, of so many clusters, are on
    // their way at once.
    static constexpr int MANY = S::TOKENS > 64 ? 8 : S::GROUPS == 2 ? 4 : 2;
    static constexpr int PEERS = S::TOKENS > 64 ? 1 : 4;
    __device__ __forceinline__ void collect(float (&c)[S::TILES][S::TOKENS / 2]) const {
        static_assert(EACH % MANY == 0, "whole rounds");
#pragma unroll
        for (int base = 0; base < EACH; base += MANY) {
            float4 sum[MANY] = {};
#pragma unroll 1
            for (int j = 0; j < mine; j += PEERS) add(sum, j, mine, base);
#pragma unroll
            for (int i = 0; i < MANY; ++i) {
                const float* v = own(c, base + i);
                sum[i] = {sum[i].x + v[0], sum[i].y + v[1], sum[i].z + v[2], sum[i].w + v[3]};
            }
#pragma unroll 1
            for (int j = mine + 1; j <= others; j += PEERS) add(sum, j, others + 1, base);
#pragma unroll
            for (int i = 0; i < MANY; ++i) {
                float* v = own(c, base + i);
                v[0] = sum[i].x, v[1] = sum[i].y, v[2] = sum[i].z, v[3] = sum[i].w;
            }
        }
    }
    __device__ __forceinline__ void add(float4 (&to)[MANY], int first, int end, int base) const {
        float4 v[PEERS][MANY];
#pragma unroll
        for (int j = 0; j < PEERS; ++j)
#pragma unroll
            for (int i = 0; i < MANY; ++i)
                v[j][i] = first + j < end ? __ldcg(sums_of(first + j) + (base + i) * S::THREADS)
                                          : float4{0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int j = 0; j < PEERS; ++j)
#pragma unroll
            for (int i = 0; i < MANY; ++i)
                to[i] = {to[i].x + v[j][i].x, to[i].y + v[j][i].y, to[i].z + v[j][i].z,
                         to[i].w + v[j][i].w};
    }
    static __device__ __forceinline__ float* own(float (&c)[S::TILES][S::TOKENS / 2], int i) {
        return &c[i / (S::TOKENS / 8)][i % (S::TOKENS / 8) * 4];
    }
};

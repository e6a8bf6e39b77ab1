// The warp of each block that brings tiles in with the copy engine. See product.cuh.
#pragma once
#include "nf4_linear/hopper/ahead/parts.cuh"

// Which tile comes next. The first block of a pair takes a number in the middle of the tile before,
// so that tiles are given out in the order in which they begin, and tells its neighbour. A tile
// that is given out is always finished, and waits for none that is given out after it.
struct Note {
    Barrier there;
    int tile;
};

// The first block is at most all stages ahead of its neighbour, of which each may be a tile's only
// one; besides there are the tile that it tells of and the one that its neighbour works on.
constexpr int NOTES = 8;

struct Turns {
    u32* count;
    Note* notes;
    const int half, lane;
    u32 next;
    int turn;

    __device__ __forceinline__ void take() {
        if (half == 0 && lane == 0) next = take_one(count);
    }
    // The first block's: what it has taken.
    __device__ __forceinline__ void tell() {
        if (half == 0 && lane == 0) {
            Note& note = notes[turn % NOTES];
            note.tile = static_cast<int>(next);
            write_to_peer(shared_address(&note.tile), next, 1, shared_address(&note.there));
        }
        __syncwarp();
    }
    // What has been told last.
    __device__ __forceinline__ int go_on() {
        Note& note = notes[turn % NOTES];
        const int phase = turn / NOTES % 2;
        ++turn;
        if (half == 1) {
            if (lane == 0) note.there.arrive_expecting(4);
            note.there.wait(phase);
        }
        return static_cast<int>(*reinterpret_cast<volatile const int*>(&note.tile));
    }
};

template <typename S>
struct Producer {
    const Problem& p;
    const Grid<S>& grid;
    const TensorMap &left, &right, &narrow, &small, &factor;
    Stage<S>* stages;
    int* turn_of;  // whose stage it is
    Barrier *full, *empty;
    const int lane, half;
    Turns turns;
    Ring<S::STAGES> ring;

    // The tile that is brought in.
    int turn = 0, token = 0, column_tile = 0, column = 0, width = 0;
    bool makes = false;     // the small product besides
    bool is_there = false;  // the small product of this block's rows, as far as is known

    // Those who multiply have the last stage first, see product.cuh.
    __device__ __forceinline__ void wait_until_empty() const {
        empty[ring.slot].wait(ring.slot == S::STAGES - 1 ? ring.phase : ring.phase ^ 1);
    }
    __device__ __forceinline__ const u32* parts() const { return grid.smalls + token / TOKENS; }

    // Waits for a chunk of a column of tiles; returns how many of its chunks are there. What else
    // will be waited for is looked at in the same round trip.
    __device__ __forceinline__ int wait_for(int chunk) {
        const int mine = chunk + lane;
        const u32* cell = grid.cells + column_tile * grid.chunks + mine;
        const u32 made = read_relaxed(parts());
        u32 missing;
        do {
            const bool there = mine >= grid.chunks || read_relaxed(cell) >= S::STRIPS;
            missing = ~__ballot_sync(0xffffffffu, there);
        } while (missing & 1);
        const int known = missing == 0 ? 32 : __ffs(missing) - 1;
        is_there = __shfl_sync(0xffffffffu, made, 0) >= MULTIPLIERS;
        if (is_there) read_acquired(parts());
        if (lane < known && mine < grid.chunks) read_acquired(cell);
        __syncwarp();
        fence_global_copies();
        return chunk + known;
    }

    __device__ __forceinline__ void wait_for_small() const {
        while (read_relaxed(parts()) < MULTIPLIERS) continue;
        read_acquired(parts());
        __syncwarp();
        fence_global_copies();
    }

    // One stage: this block's activations (null: none), half of the pair's weights for both, and
    // the narrow factor or none.
    __device__ __forceinline__ void bring(const TensorMap* a, const TensorMap& b, int at,
                                          bool with_narrow) {
        wait_until_empty();
        if (elected()) {
            Stage<S>& stage = stages[ring.slot];
            Barrier& barrier = full[ring.slot];
            turn_of[ring.slot] = turn;
            barrier.arrive_expecting((a != nullptr ? S::LEFT_BYTES : 0) + width * DEPTH * 2 +
                                     (with_narrow ? S::NARROW_BYTES : 0));
            if (a != nullptr) copy_box(stage.left, *a, token, at, barrier);
            if (with_narrow)
                copy_box(stage.narrow, narrow, S::TRANSPOSED ? at : 0, S::TRANSPOSED ? 0 : at,
                         barrier);
            for (int i = 0; i < width / 128; ++i) {  // boxes of 64 columns
                const int box = half * (width / 128) + i;
                copy_box_to_pair(stage.right + box * DEPTH * 128, b,
                                 S::TRANSPOSED ? at : column + 64 * box,
                                 S::TRANSPOSED ? column + 64 * box : at, barrier);
            }
        }
        __syncwarp();
        ring.advance();
    }

    __device__ __forceinline__ void run() {
        bool waited = false;
        const int depths = (grid.contraction + DEPTH - 1) / DEPTH;
        turns.take();
        turns.tell();
#pragma unroll 1
        while ((turn = turns.go_on()) < grid.turns) {
            const Place at(grid, p.group, turn);
            token = (2 * at.pair + half) * TOKENS;
            column_tile = at.tile, column = at.column, width = at.width;
            makes = p.small != nullptr && column == 0;
            int known = 0;
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth) {
                const int chunk = depth / (CELL_DEPTH / DEPTH);
                if (chunk >= known) known = wait_for(chunk);
                bring(&left, right, depth * DEPTH, makes);
                if (depth == depths / 2) turns.take();
                if (depth == depths - 1) turns.tell();
            }
            if (p.small != nullptr) {
                if (!makes && !is_there) wait_for_small();
            } else if (p.rank > 0 && !waited) {
                wait_for_previous_kernel();  // which made `small`
                waited = true;
            }
#pragma unroll 1
            for (int r = 0; r < p.rank; r += DEPTH)
                bring(makes ? nullptr : &small, factor, r, false);
        }
        wait_until_empty();
        if (elected()) {
            turn_of[ring.slot] = turn;  // none: the end
            full[ring.slot].arrive();
        }
    }
};

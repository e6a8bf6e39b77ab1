// The warps that decode W into memory, ahead of the tensor cores of all blocks. See product.cuh.
//
// Three of four schedulers have one such warp each, so that no other hides what it waits for: bytes
// arrive in shared memory a strip ahead, and a strip is asked for before the one ahead of it is
// decoded.
#pragma once
#include "nf4_linear/hopper/ahead/parts.cuh"

constexpr int STRIP_BYTES = STRIP / 2;

// Shared memory of one of these warps.
struct alignas(128) Desk {
    u8 packed[2][STRIP_BYTES];  // 32 rows of 64 bytes
    float2 scales[32];          // of the two blocks of each row
};

// 32 rows x 128 columns of W.
struct Strip {
    int row, column;
    u32* there;  // its cell; null: no strip
    u32 codes;   // of row `lane`: the scales of its two blocks
    float group[2];
};

template <typename T, typename S>
struct Decoder {
    const Problem& p;
    const Grid<S>& grid;
    const NF4Table& table;
    const float* map;
    Desk& desk;
    const int lane;
    float mean;
    int group, before;      // column tiles that are worked on at once: which, strips before them
    int finished, at_once;  // strips that are decoded, and not yet said to be
    u32* done;              // lane i has the cell of the i-th

    __device__ __forceinline__ int per_group() const {
        return p.together * grid.chunks * S::STRIPS;
    }

    // The order in which tiles want them: chunk after chunk of the columns that are worked on.
    __device__ __forceinline__ void find(Strip& strip, int index) {
        strip.there = nullptr;
        if (index >= grid.column_tiles * grid.chunks * S::STRIPS) return;
        while (index >= before + per_group()) {
            ++group;
            before += per_group();
        }
        const int width = min(p.together, grid.column_tiles - group * p.together);
        const int cell = (index - before) / S::STRIPS, sub = (index - before) % S::STRIPS;
        int chunk =
            static_cast<int>(__fdividef(static_cast<float>(cell), static_cast<float>(width)));
        chunk += (chunk + 1) * width <= cell;
        chunk -= chunk * width > cell;
        const int tile = group * p.together + cell - chunk * width;
        if (S::TRANSPOSED) {
            strip.row = chunk * CELL_DEPTH + sub / (S::COLUMNS / 128) * 32;
            strip.column = tile * S::COLUMNS + sub % (S::COLUMNS / 128) * 128;
        } else {
            strip.row = tile * S::COLUMNS + sub * 32;
            strip.column = chunk * CELL_DEPTH;
        }
        strip.there = grid.cells + tile * grid.chunks + chunk;
    }

    __device__ __forceinline__ bool outside(const Strip& strip) const {
        return strip.row >= p.n || strip.column >= p.k;
    }

    // Rows past the last one are the last one again.
    __device__ __forceinline__ void load(Strip& strip, int side) const {
        if (strip.there != nullptr && !outside(strip)) {
            const u8* from = p.packed + strip.column / 2 + lane % 4 * 16;
            const u32 to = to_shared(desk.packed[side]) + lane * 16;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 row = min(strip.row + 8 * i + lane / 4, p.n - 1);
                copy_async(to + 512 * i, from + static_cast<u64>(row) * (p.k / 2), true);
            }
            const u32 block = min(strip.row + lane, p.n - 1) * (p.k / 64) + strip.column / 64;
            const u8* codes = static_cast<const u8*>(p.scales.absmax) + block;
            const float* plain = static_cast<const float*>(p.scales.absmax) + block;
            const bool nested = p.scales.nested != nullptr;
            strip.codes = nested ? __ldg(reinterpret_cast<const u16*>(codes)) : 0;
            strip.group[0] = __ldg(nested ? p.scales.nested + block / 256 : plain);
            strip.group[1] = __ldg(nested ? p.scales.nested + block / 256 : plain + 1);
        }
        copy_commit();
    }

    __device__ __forceinline__ void write(const Strip& strip, int side) const {
        if (outside(strip)) return;
        float scale[2] = {strip.group[0], strip.group[1]};
        if (p.scales.nested != nullptr)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                scale[i] =
                    __fadd_rn(__fmul_rn(map[(strip.codes >> (8 * i)) & 255], strip.group[i]), mean);
        desk.scales[lane] = {scale[0], scale[1]};
        __syncwarp();
        const int first = lane / 16;
        const u32* words = reinterpret_cast<const u32*>(desk.packed[side]) + lane;
        const float* scales = reinterpret_cast<const float*>(desk.scales + first) + lane / 8 % 2;
        const int rows = p.n - strip.row - first;
        u16* to =
            p.decoded + static_cast<u64>(strip.row + first) * p.k + strip.column + lane % 16 * 8;
#pragma unroll 1
        for (int i = 0; i < 16; i += 2) {
            float value[2][8];
            float mine[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const u32 word = words[32 * (i + j)];
                mine[j] = scales[4 * (i + j)];
#pragma unroll
                for (int b = 0; b < 8; ++b) value[j][b] = table.at(word, b, lane);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u32 v[4];
#pragma unroll
                for (int b = 0; b < 4; ++b)
                    v[b] = T::pack(__fmul_rn(value[j][2 * b], mine[j]),
                                   __fmul_rn(value[j][2 * b + 1], mine[j]));
                if (2 * (i + j) < rows) store16(to, v);
                to += 2 * p.k;
            }
        }
    }

    // A fence waits for all that is on its way, a microsecond or more: one for several strips.
    __device__ __forceinline__ void finish(const Strip& strip) {
        if (lane == finished) done = strip.there;
        if (++finished < at_once) return;
        tell();
        at_once = min(2 * at_once, MOST_AT_ONCE);
    }
    __device__ __forceinline__ void tell() {
        __syncwarp();  // all lanes' weights come before
        if (lane < finished) add_one_released(done);
        finished = 0;
    }

    __device__ __forceinline__ u32 take() const { return lane == 0 ? take_one(p.state) : 0u; }
    __device__ __forceinline__ int given(u32 taken) const {
        return static_cast<int>(__shfl_sync(0xffffffffu, taken, 0));
    }

    // One strip, by a warp that has nothing to multiply yet.
    __device__ __forceinline__ void help() {
        begin();
        Strip strip;
        find(strip, given(take()));
        load(strip, 0);
        copy_wait<0>();
        __syncwarp();
        if (strip.there == nullptr) return;
        write(strip, 0);
        finish(strip);
    }

    __device__ __forceinline__ void begin() {
        mean = p.scales.mean();
        group = before = finished = 0;
        at_once = 1;
    }

    __device__ __forceinline__ void run() {
        begin();
        Strip now, after;
        u32 next = take();
        find(now, given(next));
        load(now, 0);
        next = take();
        int side = 0;
#pragma unroll 1
        while (now.there != nullptr) {
            find(after, given(next));
            load(after, side ^ 1);
            if (after.there != nullptr) next = take();
            copy_wait<1>();
            __syncwarp();
            write(now, side);
            __syncwarp();  // what it read may be written over
            finish(now);
            now = after;
            side ^= 1;
        }
        tell();
    }
};

// From sums in registers to the result, where no other block of the cluster has sums of the tile:
// 32 columns of 16 tokens at a time, by a warp or by two, which meet nobody else. Nothing lies over
// the stages meanwhile, so that the next tile is on its way. See fused.cuh.
#pragma once
#include "nf4_linear/hopper/decode.cuh"

__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
}

template <typename T, typename Way, typename S>
struct Result {
    static constexpr int TILES = S::TILES, TOKENS = 16;  // of a round
    static constexpr int WARPS = 2 / TILES;              // that have the same 32 columns
    static constexpr int PITCH = 40;                     // values of a row: no bank meets another
    static constexpr int BUFFERS = WARPS;                // of those 32 columns
    static constexpr int BYTES = 2 * TOKENS * PITCH;     // of a buffer
    static_assert(8 / WARPS * BUFFERS * BYTES == S::RESULT_BYTES || S::PARTS == 2, "no room");
    const int consumer, unit, lane;
    u16* buffers;
    float bias[TILES][2];

    __device__ __forceinline__ Result(const Problem& p, int first, int consumer, u8* memory)
        : consumer(consumer),
          unit(consumer / (32 * WARPS)),
          lane(consumer % 32),
          buffers(reinterpret_cast<u16*>(memory + unit * BUFFERS * BYTES)) {
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const int column = first + Way::column(consumer, lane / 4, i / 2, i % 2);
            bias[i / 2][i % 2] = p.bias != nullptr && column < p.n ? T::read(p.bias[column]) : 0.f;
        }
    }
    // All who have these columns; between two rounds another buffer makes up for a second time.
    __device__ __forceinline__ void meet() const {
        if (WARPS == 1)
            __syncwarp();
        else
            asm volatile("bar.sync %0, 64;" ::"r"(4 + unit) : "memory");
    }
    __device__ __forceinline__ float value(const float (&c)[TILES][S::TOKENS / 2], int tile, int j,
                                           int half, int i) const {
        return bias[tile][half] + c[tile][4 * j + 2 * half + i];
    }
    // Neighbours along the tokens, whose columns lie eight apart: stored transposed.
    __device__ __forceinline__ void store_columns(const float (&c)[TILES][S::TOKENS / 2], u16* to,
                                                  int round) const {
#pragma unroll
        for (int x = 0; x < TILES; ++x) {
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int tile = TILES == 1 ? 0 : i / 2;
                const int j = 2 * round + (TILES == 1 ? i / 2 : x);
                v[i] = T::pack(value(c, tile, j, i % 2, 0), value(c, tile, j, i % 2, 1));
            }
            const int matrix = lane / 8, token = 8 * (TILES == 1 ? matrix / 2 : x) + lane % 8;
            const int column = TILES == 1 ? consumer / 32 % 2 * 16 + matrix % 2 * 8 : matrix * 8;
            store_transposed(shared_address(to + token * PITCH + column), v[0], v[1], v[2], v[3]);
        }
    }
    // Neighbours along the columns, of two tokens.
    __device__ __forceinline__ void store_rows(const float (&c)[TILES][S::TOKENS / 2], u16* to,
                                               int round) const {
        const int column = 4 * (lane / 4) + (TILES == 1 ? consumer / 32 % 2 * 2 : 0);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int j = 2 * round + k / 2, i = k % 2;
            u32* row =
                reinterpret_cast<u32*>(to + (8 * (k / 2) + lane % 4 * 2 + i) * PITCH + column);
            const u32 v = T::pack(value(c, 0, j, 0, i), value(c, 0, j, 1, i));
            if (TILES == 1)
                *row = v;
            else
                *reinterpret_cast<uint2*>(row) = {
                    v, T::pack(value(c, TILES - 1, j, 0, i), value(c, TILES - 1, j, 1, i))};
        }
    }
    __device__ __forceinline__ void write(const Problem& p, const Work& w, int columns,
                                          const float (&c)[TILES][S::TOKENS / 2]) const {
        const int thread = consumer % (32 * WARPS), column = w.first + 32 * unit + thread % 4 * 8;
        u16* out = p.out + static_cast<long long>(w.token) * columns + column;
#pragma unroll
        for (int round = 0; round < S::TOKENS / TOKENS; ++round) {
            if (w.token + TOKENS * round >= p.m) break;
            u16* buffer = buffers + round % BUFFERS * (BYTES / 2);
            if (BUFFERS == 1 || round == 0) meet();  // nobody reads it any more
            if (Way::TRANSPOSED)
                store_rows(c, buffer, round);
            else
                store_columns(c, buffer, round);
            meet();
#pragma unroll
            for (int row = thread / 4; row < TOKENS; row += 8 * WARPS) {
                const uint4 v =
                    *reinterpret_cast<const uint4*>(buffer + row * PITCH + thread % 4 * 8);
                const int token = TOKENS * round + row;
                if (w.token + token < p.m && column < columns)
                    *reinterpret_cast<uint4*>(out + static_cast<long long>(token) * columns) = v;
            }
        }
    }
};

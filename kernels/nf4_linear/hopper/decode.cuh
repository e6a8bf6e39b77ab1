// From packed bytes in shared memory to wgmma's register operand. See fused.cuh.
#pragma once
#include "nf4_linear/hopper/shape.cuh"

__device__ __forceinline__ float2 look_up(u32 table, u32 word, u32 lane_offset, u32 selector) {
    u32 offset;
    float2 pair;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(offset) : "r"(word), "r"(lane_offset), "r"(selector));
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(table + offset));
    return pair;
}

// Entry b: the values of byte b's high and low nibble, at lane's own pair of banks.
template <int CONSUMERS>
__device__ __forceinline__ void fill_table(float4* table, int consumer) {
    constexpr int EACH = 16 * 256 / CONSUMERS;
    const int thread = consumer % 256, part = consumer / 256;
    const float low = NF4_VALUES[thread >> 4];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float high = NF4_VALUES[part * EACH + i];
        table[(part * EACH + i) * 256 + thread] = {high, low, high, low};
    }
}

// The decoded weights of one product: tiles of 64 columns of the result, 16 of the contraction.
template <int TILES>
struct Fragments {
    u32 a[TILES][4];

    __device__ __forceinline__ void keep_all() {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) keep(a[i / 4][i % 4]);
    }
};

// What was read for one product: of the table, before scaling, and scales along the contraction.
template <int TILES>
struct Found {
    float2 pairs[4 * TILES];
    float2 scales[2];  // transposed and DEEP
};

// Y = X W^T: contraction along a row of W. A thread's row j of four (or two) is
// 16 TILES warp + 16 (j / 2) + 8 (j % 2) + g; its byte for columns 2q, 2q+1 is byte q of a word.
template <typename T, typename S>
struct Forward {
    static constexpr bool TRANSPOSED = false;
    static constexpr bool DEEP = false;  // gained nothing; scales would be a stage ahead, too
    static constexpr int TILES = S::TILES, ROWS = 2 * TILES;
    u32 words[2][ROWS][4];
    alignas(16) float scale[ROWS];
    u32 selector;
    int row, swap;

    __device__ __forceinline__ Forward(int consumer, int lane) {
        const int g = lane / 4;
        row = (consumer / 32) * 16 * TILES + g;
        selector = 0x5504u | ((lane % 4) << 4);
        swap = (g >> 2) & 1;  // how the copy engine permuted the 32 bytes of this row
    }
    static __device__ __forceinline__ int column(int consumer, int g, int tile, int half) {
        return (consumer / 32) * 16 * TILES + 16 * tile + 8 * half + g;
    }
    // The bytes of half a stage: 32 of the contraction.
    template <int BUFFER>
    __device__ __forceinline__ void load(const u8* packed, int half) {
#pragma unroll
        for (int j = 0; j < ROWS; ++j) {
            const u8* from = packed + (row + 8 * j) * 32 + ((half ^ swap) * 16);
            *reinterpret_cast<uint4*>(words[BUFFER][j]) = *reinterpret_cast<const uint4*>(from);
        }
    }
    __device__ __forceinline__ void load_scales(const float* scales) {
        const float* from = scales + place_of_scale<ROWS>(row);
        if (ROWS == 4)
            *reinterpret_cast<float4*>(scale) = *reinterpret_cast<const float4*>(from);
        else
            *reinterpret_cast<float2*>(scale) = *reinterpret_cast<const float2*>(from);
    }
    // The first or second product of the half in a buffer.
    template <int BUFFER, int WHICH>
    __device__ __forceinline__ void find(Found<TILES>& found, u32 table, u32 lane_offset,
                                         const float*, int) const {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i)
            found.pairs[i] =
                look_up(table, words[BUFFER][i / 2][2 * WHICH + i % 2], lane_offset, selector);
    }
    __device__ __forceinline__ void round(Fragments<TILES>& f, const Found<TILES>& found,
                                          const float*, int) const {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) {
            const int j = i / 2;
            f.a[j / 2][2 * (i % 2) + (j & 1)] = T::pack(__fmul_rn(found.pairs[i].x, scale[j]),
                                                        __fmul_rn(found.pairs[i].y, scale[j]));
        }
    }
    // 16 columns of B (N, r) from `column` of r on.
    static __device__ __forceinline__ void low_rank(Fragments<TILES>& f, const Problem& p,
                                                    int first, int consumer, int lane, int column) {
        const int g = lane / 4, q = lane % 4;
#pragma unroll
        for (int j = 0; j < ROWS; ++j)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const long long n = first + Forward::column(consumer, g, j / 2, j & 1);
                const int r = column + 2 * q + 8 * part;
                const bool inside = n < p.n && r < p.rank;
                f.a[j / 2][2 * part + (j & 1)] =
                    inside ? *reinterpret_cast<const u32*>(p.factor + n * p.rank + r) : 0u;
            }
    }
};

// dX = dY W: contraction down the rows of W. ldmatrix.trans gives a thread, for rows 2q and 2q+1,
// the two bytes at 2g of 16: columns 4g .. 4g+3 of 32, tile t those of byte t. With one tile to a
// warpgroup, two warps share the 32 columns, a byte each.
template <typename T, typename S>
struct Backward {
    static constexpr bool TRANSPOSED = true;
    // Look-ups two products ahead, all else a stage: where there are registers for it.
    static constexpr bool DEEP = S::PARTS == 1 && S::TILES * S::TOKENS <= 128;
    static constexpr int TILES = S::TILES, ROW_BYTES = 64 * TILES;
    u32 words[2][4];
    u32 address, selector;
    int scale_row;

    static __device__ __forceinline__ int piece(int consumer) {  // which 16 bytes of a row
        return TILES == 2 ? consumer / 32 : consumer / 64;
    }
    __device__ __forceinline__ Backward(int consumer, int lane) {
        const int swap = TILES == 2 ? lane & 7 : (lane >> 1) & 3;  // the copy engine's permutation
        address = lane * ROW_BYTES + ((piece(consumer) ^ swap) * 16);
        selector = 0x5504u + (TILES == 1 ? 0x10u * (consumer / 32 % 2) : 0);
        scale_row = piece(consumer) / 2 * DEPTH + 2 * (lane % 4);
    }
    static __device__ __forceinline__ int column(int consumer, int g, int tile, int half) {
        const int byte = TILES == 2 ? tile : consumer / 32 % 2;
        return piece(consumer) * 32 + 4 * g + 2 * byte + half;
    }
    template <int BUFFER>
    __device__ __forceinline__ void load(const u8* packed, int half) {
        u32* to = words[BUFFER];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(packed) + address + half * 32 * ROW_BYTES)
                     : "memory");
    }
    __device__ __forceinline__ void load_scales(const float*) {}
    __device__ __forceinline__ float2 scales_of(const float* scales, int step, int part) const {
        return *reinterpret_cast<const float2*>(scales + scale_row + 16 * step + 8 * part);
    }
    // Pair 2 TILES part + TILES row + tile: row 2q + row of the sixteen's half `part`.
    template <int BUFFER, int WHICH>
    __device__ __forceinline__ void find(Found<TILES>& found, u32 table, u32 lane_offset,
                                         const float* scales, int step) const {
#pragma unroll
        for (int part = 0; part < 2; ++part)
            if (DEEP) found.scales[part] = scales_of(scales, step, part);
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) {
            const int part = i / (2 * TILES), row = i / TILES % 2, tile = i % TILES;
            found.pairs[i] = look_up(table, words[BUFFER][2 * WHICH + part], lane_offset,
                                     selector + 0x10u * (2 * row + tile));
        }
    }
    __device__ __forceinline__ void round(Fragments<TILES>& f, const Found<TILES>& found,
                                          const float* scales, int step) const {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const float2 scale = DEEP ? found.scales[part] : scales_of(scales, step, part);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const float2 v = found.pairs[2 * TILES * part + tile];
                const float2 w = found.pairs[2 * TILES * part + TILES + tile];
                f.a[tile][2 * part] = T::pack(__fmul_rn(v.x, scale.x), __fmul_rn(w.x, scale.y));
                f.a[tile][2 * part + 1] = T::pack(__fmul_rn(v.y, scale.x), __fmul_rn(w.y, scale.y));
            }
        }
    }
    // 16 rows of A (r, K) from `column` of r on.
    static __device__ __forceinline__ void low_rank(Fragments<TILES>& f, const Problem& p,
                                                    int first, int consumer, int lane, int column) {
        const int g = lane / 4, q = lane % 4;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const long long k = first + Backward::column(consumer, g, tile, 0);
                const int r = column + 2 * q + 8 * part;
                const bool inside = k < p.k && r < p.rank;
                const u16* from = p.factor + r * static_cast<long long>(p.k) + k;
                const u32 v = inside ? *reinterpret_cast<const u32*>(from) : 0u;
                const u32 w = inside ? *reinterpret_cast<const u32*>(from + p.k) : 0u;
                f.a[tile][2 * part] = __byte_perm(v, w, 0x5410u);
                f.a[tile][2 * part + 1] = __byte_perm(v, w, 0x7632u);
            }
    }
};

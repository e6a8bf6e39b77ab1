// W = dtype(NF4 value x scale), the nested 8-bit scales decoded on the way: one launch, one pass.
// Shapes    packed (ceil(n/2)) u8 | absmax (blocks) u8 or f32 | out (n), or (rows, K + r) with r
//           given columns (rows, r); bf16/fp16/f32. A slice starts at weight `first`.
// Format    qlora_kit/quant/nf4.py and double_quant.py; NF4_VALUES and DYNAMIC_MAP_VALUES are
//           generated from there and put before this file
// Requires  sm_80+, first % 32 == 0, out and columns 16-byte aligned, packed 4-byte aligned at
//           `first`; with columns, K and r whole 16-byte pieces; checked in
//           qlora_kit/ops/nf4_dequantize/cuda.py, which sends all else to layouts.cu
// Tile      4 pieces of 32 lanes x 16 bytes of output (1024 or 512 weights) per warp, the next tile
//           read while this one is decoded; a grid that stays, 256 threads, 4 blocks per processor
// Numerics  f32 product and sum per scale, f32 product per weight, one rounding: the reference's
//           bits
// Truth     qlora_kit/quant/nf4.py: dequantize_nf4
//
// Why these accesses: four fifths of the traffic are stores, so stores decide. A lane owns the
// weights of one 16-byte store, hence a warp stores 512 bytes in a row and reads 128 in a request.
// 16-byte reads would need a transposition before the stores and save no traffic: reads need some
// 5 KB in flight per processor (0.6 TB/s for 1 us), and 1024 threads x 4 words hold 16 KB. Nor do
// instructions limit: 7 a weight, of the 22 that an H100 issues while its memory moves 2.5 bytes.
// A warp's tile has at most 32 scales: each lane decodes one and passes it on.
#include "common/convert.cuh"
#include "common/nf4.cuh"
#include "nf4_dequantize/output.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PIECES = 4;

// What one lane reads of a warp's tile: its codes, and one of the tile's scales.
template <typename T>
struct Tile {
    typedef typename Output<T>::Word Word;
    static constexpr int WEIGHTS = Output<T>::WEIGHTS;
    static constexpr int SIZE = PIECES * 32 * WEIGHTS;

    Word codes[PIECES];
    NF4Scales::Stored stored;

    __device__ __forceinline__ void load(const u8* packed, const NF4Scales& scales,
                                         long long first, u32 tile, int lane) {
        const long long weight = first + static_cast<long long>(tile) * SIZE;
        const Word* from = reinterpret_cast<const Word*>(packed + weight / 2) + lane;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) codes[p] = __ldcs(from + 32 * p);  // read once: no caching
        const int shift = scales.block_shift;
        const int skipped = static_cast<int>(weight) & ((1 << shift) - 1);
        const int last = (skipped + SIZE - 1) >> shift;
        const int block = lane < last ? lane : last;
        stored = scales.load_block((weight >> shift) + block);
    }

    __device__ __forceinline__ uint4 decode(int p, float scale, int skipped, int shift,
                                            const NF4Table& table, int lane) const {
        const int block = (skipped + (p * 32 + lane) * WEIGHTS) >> shift;
        const float mine = __shfl_sync(0xffffffffu, scale, block);
        float v[WEIGHTS];
#pragma unroll
        for (int i = 0; i < WEIGHTS / 2; ++i) {
            const float2 two = table.pair(codes[p], i, lane);
            v[2 * i] = __fmul_rn(two.x, mine);
            v[2 * i + 1] = __fmul_rn(two.y, mine);
        }
        return Output<T>::round(v);
    }
};

// The given columns, to the right of each row's weights.
__device__ __forceinline__ void copy_columns(const uint4* columns, uint4* out, long long pieces,
                                             u32 row_pieces, u32 rank_pieces) {
    const long long threads = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = blockIdx.x * THREADS + threadIdx.x; i < pieces; i += threads) {
        const u32 row = static_cast<u32>(i) / rank_pieces;
        out[i + static_cast<long long>(row + 1) * row_pieces] = __ldg(columns + i);
    }
}

// n weights from weight `first` on; with COLUMNS in rows of k weights and r given values.
template <typename T, bool COLUMNS>
__device__ __forceinline__ void dequantize(const u8* packed, const NF4Scales& scales, void* out,
                                           long long first, long long n,
                                           const void* columns = nullptr, long long k = 0,
                                           long long r = 0) {
    __shared__ float map[256];
    __shared__ NF4Table table;
    typedef Tile<T> Tile;
    constexpr int WEIGHTS = Tile::WEIGHTS;
    const int t = threadIdx.x, lane = t & 31;
    __builtin_assume(t < THREADS);
    const u32 row_pieces = static_cast<u32>(k / WEIGHTS);
    const u32 rank_pieces = static_cast<u32>(r / WEIGHTS);

    const u32 tiles = static_cast<u32>(n / Tile::SIZE);
    const u32 stride = gridDim.x * WARPS;
    u32 tile = blockIdx.x * WARPS + __shfl_sync(0xffffffffu, t / 32, 0);  // the same for a warp
    // The first reads are on their way while the tables are made.
    Tile even, odd;
    if (tile < tiles) even.load(packed, scales, first, tile, lane);
    const float mean = scales.mean();
    map[t] = DYNAMIC_MAP_VALUES[t];
    table.fill(t, THREADS);
    if constexpr (COLUMNS)
        copy_columns(static_cast<const uint4*>(columns), static_cast<uint4*>(out),
                     n / k * rank_pieces, row_pieces, rank_pieces);
    __syncthreads();

    const auto write = [&](const Tile& tile, u32 index) {
        const float scale = scales.decode(tile.stored, mean, map);
        const int shift = scales.block_shift;
        // Weights of the tile's first block that lie before it.
        const int skipped = static_cast<int>(first + index * Tile::SIZE) & ((1 << shift) - 1);
        const u32 piece = index * (PIECES * 32) + lane;
        uint4* to = static_cast<uint4*>(out) + piece;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const uint4 rounded = tile.decode(p, scale, skipped, shift, table, lane);
            if constexpr (COLUMNS) {
                const u32 row = (piece + p * 32) / row_pieces;
                to[p * 32 + static_cast<long long>(row) * rank_pieces] = rounded;
            } else {
                to[p * 32] = rounded;
            }
        }
    };
    // Two tiles take turns, so that no register waits to be copied.
    while (tile < tiles) {
        if (tile + stride < tiles) odd.load(packed, scales, first, tile + stride, lane);
        write(even, tile);
        tile += stride;
        if (tile >= tiles) break;
        if (tile + stride < tiles) even.load(packed, scales, first, tile + stride, lane);
        write(odd, tile);
        tile += stride;
    }

    // What is left after the last whole tile, one weight at a time.
    if (blockIdx.x == gridDim.x - 1) {
#pragma unroll 1
        for (long long i = static_cast<long long>(tiles) * Tile::SIZE + t; i < n; i += THREADS) {
            const long long weight = first + i;
            const float2 two = table.pair(packed[weight / 2], 0, lane);
            const float scale = scales.decode(scales.load(weight), mean, map);
            const long long at = COLUMNS ? i + i / k * r : i;
            Output<T>::store_one(out, at, __fmul_rn(weight & 1 ? two.y : two.x, scale));
        }
    }
}

#define NF4_DEQUANTIZE(NAME, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                      \
        nf4_dequantize_##NAME(const u8* packed, const void* absmax, const float* nested,          \
                              const float* offset, void* out, long long first, long long n,       \
                              long long block_shift) {                                            \
        const NF4Scales scales{absmax, nested, offset, static_cast<int>(block_shift)};            \
        dequantize<T, false>(packed, scales, out, first, n);                                      \
    }

#define NF4_DEQUANTIZE_COLUMNS(NAME, T)                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) nf4_dequantize_##NAME##_columns(     \
        const u8* packed, const void* absmax, const float* nested, const float* offset,           \
        void* out, long long first, long long n, long long block_shift, const void* columns,      \
        long long k, long long r) {                                                               \
        const NF4Scales scales{absmax, nested, offset, static_cast<int>(block_shift)};            \
        dequantize<T, true>(packed, scales, out, first, n, columns, k, r);                        \
    }

NF4_DEQUANTIZE(bfloat16, BFloat16)
NF4_DEQUANTIZE(float16, Float16)
NF4_DEQUANTIZE(float32, Float32)
NF4_DEQUANTIZE_COLUMNS(bfloat16, BFloat16)
NF4_DEQUANTIZE_COLUMNS(float16, Float16)
NF4_DEQUANTIZE_COLUMNS(float32, Float32)

// W = dtype(NF4 value x scale) where the plain kernel does not serve: transposed, or at any place.
// Shapes    packed (ceil(n/2)) u8 | absmax (blocks) u8 or f32 | columns (rows, r) or none;
//           out (rows, k + r) or its transpose (k + r, rows), bf16/fp16/f32; rows of k weights from
//           weight `first` on
// Format    qlora_kit/quant/nf4.py and double_quant.py
// Requires  sm_80+; `_transposed`: first % 32 == 0, k % 32 == 0, rows whole 16-byte pieces of out,
//           packed and out 16-byte aligned; `_any`: nothing. Checked in
//           qlora_kit/ops/nf4_dequantize/cuda.py
// Tile      _transposed: 256 columns of W by 32 words of output (64 rows in 16 bits, 32 in f32),
//           turned in 32 KB of shared memory. A thread decodes 32 neighbours of one row, or of two
//           rows that share each word of output. _any: one weight per thread and step
// Numerics  the plain kernel's, hence the reference's bits
// Truth     qlora_kit/ops/nf4_dequantize/reference.py
#include "common/convert.cuh"
#include "common/nf4.cuh"
#include "nf4_dequantize/output.cuh"

constexpr int THREADS = 256;
constexpr int TILE_COLUMNS = 256;
constexpr int TILE_WORDS = 32;
constexpr int SHARE = 32;  // weights of a row that one thread reads at once

// One word of output: two rows in 16 bits, or one row in f32.
template <typename T>
struct Word {
    static constexpr int ROWS = 2;
    typedef u16 Element;

    static __device__ __forceinline__ u32 round(const float (&v)[ROWS]) {
        return T::pack(v[0], v[1]);
    }
};

template <>
struct Word<Float32> {
    static constexpr int ROWS = 1;
    typedef u32 Element;

    static __device__ __forceinline__ u32 round(const float (&v)[ROWS]) {
        return __float_as_uint(v[0]);
    }
};

template <typename T>
__device__ __forceinline__ void transposed(const u8* packed, const NF4Scales& scales,
                                           const typename Word<T>::Element* columns,
                                           typename Word<T>::Element* out, long long first,
                                           long long rows, long long k, long long r) {
    constexpr int ROWS = Word<T>::ROWS;
    constexpr int TILE_ROWS = TILE_WORDS * ROWS;
    constexpr int PIECE = TILE_ROWS / 8;  // rows in 16 bytes of output
    __shared__ float map[256];
    __shared__ NF4Table table;
    __shared__ uint4 turned[TILE_COLUMNS][TILE_WORDS / 4];
    const int t = threadIdx.x, lane = t & 31, warp = t / 32;
    __builtin_assume(t < THREADS);
    const long long row0 = static_cast<long long>(blockIdx.x) * TILE_ROWS;
    const long long column0 = static_cast<long long>(blockIdx.y) * TILE_COLUMNS;
    if (column0 >= k) {  // the last blocks of the grid: the given columns as rows
        for (int i = t; i < r * TILE_ROWS; i += THREADS) {
            const long long row = row0 + i % TILE_ROWS, column = i / TILE_ROWS;
            if (row < rows) out[(k + column) * rows + row] = columns[row * r + column];
        }
        return;
    }

    const long long column = column0 + warp * SHARE;
    uint4 codes[ROWS];
    NF4Scales::Stored stored[ROWS];
#pragma unroll
    for (int h = 0; h < ROWS; ++h) {
        const long long row = row0 + lane * ROWS + h;
        const bool inside = row < rows && column < k;
        const long long weight = inside ? first + row * k + column : first;
        codes[h] = __ldg(reinterpret_cast<const uint4*>(packed + weight / 2));
        stored[h] = scales.load(weight);
    }
    const float mean = scales.mean();
    map[t] = DYNAMIC_MAP_VALUES[t];
    table.fill(t, THREADS);
    __syncthreads();

    float scale[ROWS];
    u32* words = reinterpret_cast<u32*>(turned) + warp * SHARE * TILE_WORDS + lane;
#pragma unroll
    for (int h = 0; h < ROWS; ++h) scale[h] = scales.decode(stored[h], mean, map);
#pragma unroll
    for (int i = 0; i < SHARE / 2; ++i) {
        float v[2][ROWS];
#pragma unroll
        for (int h = 0; h < ROWS; ++h) {
            const u32 four[4] = {codes[h].x, codes[h].y, codes[h].z, codes[h].w};
            const float2 two = table.pair(four[i / 4], i % 4, lane);
            v[0][h] = __fmul_rn(two.x, scale[h]);
            v[1][h] = __fmul_rn(two.y, scale[h]);
        }
        words[(2 * i) * TILE_WORDS] = Word<T>::round(v[0]);
        words[(2 * i + 1) * TILE_WORDS] = Word<T>::round(v[1]);
    }
    __syncthreads();

    // Eight threads write the 128 bytes of one column.
#pragma unroll
    for (int i = t; i < TILE_COLUMNS * 8; i += THREADS) {
        const long long row = row0 + i % 8 * PIECE, at = column0 + i / 8;
        if (row < rows && at < k)
            *reinterpret_cast<uint4*>(out + at * rows + row) = turned[i / 8][i % 8];
    }
}

// One element of the result per thread and step, wherever it lies.
template <typename T>
__device__ __forceinline__ void anywhere(const u8* packed, const NF4Scales& scales,
                                         const typename Word<T>::Element* columns,
                                         typename Word<T>::Element* out, long long first,
                                         long long rows, long long k, long long r, bool turn) {
    __shared__ float map[256];
    __shared__ NF4Table table;
    const int t = threadIdx.x, lane = t & 31;
    const float mean = scales.mean();
    map[t] = DYNAMIC_MAP_VALUES[t];
    table.fill(t, THREADS);
    __syncthreads();
    const long long width = k + r, stride = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + t; i < rows * width;
         i += stride) {
        const long long row = turn ? i % rows : i / width;
        const long long column = turn ? i / rows : i % width;
        if (column >= k) {
            out[i] = columns[row * r + column - k];
            continue;
        }
        const long long weight = first + row * k + column;
        const float2 two = table.pair(packed[weight / 2], 0, lane);
        const float scale = scales.decode(scales.load(weight), mean, map);
        Output<T>::store_one(out, i, __fmul_rn(weight & 1 ? two.y : two.x, scale));
    }
}

#define NF4_DEQUANTIZE_LAYOUTS(NAME, T)                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) nf4_dequantize_##NAME##_transposed(     \
        const u8* packed, const void* absmax, const float* nested, const float* offset,           \
        const void* columns, void* out, long long first, long long rows, long long k,             \
        long long r, long long block_shift) {                                                     \
        typedef Word<T>::Element Element;                                                         \
        const NF4Scales scales{absmax, nested, offset, static_cast<int>(block_shift)};            \
        transposed<T>(packed, scales, static_cast<const Element*>(columns),                       \
                      static_cast<Element*>(out), first, rows, k, r);                             \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) nf4_dequantize_##NAME##_any(            \
        const u8* packed, const void* absmax, const float* nested, const float* offset,           \
        const void* columns, void* out, long long first, long long rows, long long k,             \
        long long r, long long block_shift, long long turn) {                                     \
        typedef Word<T>::Element Element;                                                         \
        const NF4Scales scales{absmax, nested, offset, static_cast<int>(block_shift)};            \
        anywhere<T>(packed, scales, static_cast<const Element*>(columns),                         \
                    static_cast<Element*>(out), first, rows, k, r, turn != 0);                    \
    }

NF4_DEQUANTIZE_LAYOUTS(bfloat16, BFloat16)
NF4_DEQUANTIZE_LAYOUTS(float16, Float16)
NF4_DEQUANTIZE_LAYOUTS(float32, Float32)

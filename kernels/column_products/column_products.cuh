// out = sum of a * b over the rows of a strip, column by column.
// Shapes    a, b (rows, n) in one dtype of bf16/fp16/f32, row i at i * stride; out (strips, n) f32
// Requires  sm_80+, rows 16-byte aligned, n whole pieces of 16 bytes; checked in
//           qlora_kit/ops/column_products/cuda.py, which sends all else to torch
// Tile      32 pieces of columns and one strip of rows per block: a warp reads 512 bytes of a row of
//           each, four rows at a time, and 8 warps take turns
// Numerics  f32 products and sums in a fixed order: repeatable
// Truth     qlora_kit/ops/column_products/reference.py
#include "common/piece.cuh"

constexpr int WARPS = 8;
constexpr int AHEAD = 4;

template <typename T>
__device__ __forceinline__ void add_products(const uint4& a, const uint4& b,
                                             float (&sums)[Piece<T>::COUNT]) {
    float v[Piece<T>::COUNT], w[Piece<T>::COUNT];
    Piece<T>::read(a, v);
    Piece<T>::read(b, w);
#pragma unroll
    for (int i = 0; i < Piece<T>::COUNT; ++i) sums[i] = __fmaf_rn(v[i], w[i], sums[i]);
}

template <typename T>
__device__ __forceinline__ void column_products(const void* a, const void* b, float* out,
                                                long long rows, long long n, long long stride_a,
                                                long long stride_b, long long strip) {
    constexpr int COUNT = Piece<T>::COUNT;
    __shared__ float parts[WARPS][32 * COUNT];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const long long column = (static_cast<long long>(blockIdx.x) * 32 + lane) * COUNT;
    const long long begin = blockIdx.y * strip;
    const long long end = begin + strip < rows ? begin + strip : rows;
    float sums[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] = 0.f;
    if (column < n) {
        const auto of = [&](const void* base, long long stride, long long row) {
            return __ldg(static_cast<const uint4*>(row_at<T>(base, row * stride + column)));
        };
        long long row = begin + warp;
        for (; row + (AHEAD - 1) * WARPS < end; row += AHEAD * WARPS) {
            uint4 x[AHEAD], y[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                x[i] = of(a, stride_a, row + i * WARPS);
                y[i] = of(b, stride_b, row + i * WARPS);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) add_products<T>(x[i], y[i], sums);
        }
        for (; row < end; row += WARPS)
            add_products<T>(of(a, stride_a, row), of(b, stride_b, row), sums);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) parts[warp][lane * COUNT + i] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * COUNT; i += WARPS * 32) {
        const long long at = static_cast<long long>(blockIdx.x) * 32 * COUNT + i;
        if (at >= n) continue;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum = __fadd_rn(sum, parts[w][i]);
        out[blockIdx.y * n + at] = sum;
    }
}

#define COLUMN_PRODUCTS(NAME, T)                                                                  \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) column_products_##NAME(           \
        const void* a, const void* b, float* out, long long rows, long long n,                    \
        long long stride_a, long long stride_b, long long strip) {                                \
        column_products<T>(a, b, out, rows, n, stride_a, stride_b, strip);                        \
    }

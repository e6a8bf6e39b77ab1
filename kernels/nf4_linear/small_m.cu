// Y = X @ dequant(W)^T + (XA)(sB)^T + bias for few rows of X: the weight is read once, in 4 bits.
// Shapes    x (M,K) | packed (N*K/2) u8 | xa (M,r) | lora_b (N,r) | y (M,N); row-major, M <= 16
// Format    qlora_kit/quant/nf4.py and double_quant.py
// Requires  sm_80+, K % 64 == 0, r % 16 == 0, block size >= 32, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/cuda.py
// Tile      16 rows of W per block; 8 warps share K, 128 (or 64) columns a step each; their sums
//           meet in shared memory. W is the 16-row operand of mma.m16n8k16, X the 8-column one.
//           The same permutation of k on both sides lets a thread read 16 bytes of W at once.
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      swapped operands for skinny products: FLUTE, arXiv:2407.10960; Machete (vLLM)
#include "common/convert.cuh"
#include "common/mma.cuh"
#include "common/nf4.cuh"

constexpr int WARPS = 8;
constexpr int ROWS = 16;

// What one thread needs for one step of K: its share of two rows of W, and of COLUMNS rows of X.
template <int TILES, int SHARE>
struct Step {
    u32 w[2][SHARE / 8];
    NF4Scales::Stored stored[2];
    u32 x[TILES][SHARE / 2];

    __device__ __forceinline__ void load(const u16* x_rows, const u8* packed,
                                         const NF4Scales& scales,
                                         const long long (&row)[2], long long m, long long k_total,
                                         long long k, int g) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long weight = row[h] * k_total + k;
            const u8* from = packed + weight / 2;
            if constexpr (SHARE == 32) {
                *reinterpret_cast<uint4*>(w[h]) = __ldg(reinterpret_cast<const uint4*>(from));
            } else {
                *reinterpret_cast<uint2*>(w[h]) = __ldg(reinterpret_cast<const uint2*>(from));
            }
            stored[h] = scales.load(weight);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const long long column = tile * 8 + g;
            const uint4* from = reinterpret_cast<const uint4*>(x_rows + column * k_total + k);
#pragma unroll
            for (int i = 0; i < SHARE / 8; ++i) {
                const uint4 part = column < m ? __ldg(from + i) : uint4{0, 0, 0, 0};
                *reinterpret_cast<uint4*>(&x[tile][4 * i]) = part;
            }
        }
    }

    template <typename T>
    __device__ __forceinline__ void multiply(float (&c)[TILES][4], const NF4Table& table,
                                             const NF4Scales& scales, float mean,
                                             const float* map, int lane) const {
        const float scale[2] = {scales.decode(stored[0], mean, map),
                                scales.decode(stored[1], mean, map)};
#pragma unroll
        for (int j = 0; j < SHARE / 4; ++j) {  // four weights of each row per product
            u32 a[4];
#pragma unroll
            for (int part = 0; part < 2; ++part) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int i = 4 * j + 2 * part;
                    const float low = table.at(w[h][i / 8], i % 8, lane);
                    const float high = table.at(w[h][i / 8], i % 8 + 1, lane);
                    a[2 * part + h] =
                        T::pack(__fmul_rn(low, scale[h]), __fmul_rn(high, scale[h]));
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                Mma::run<T>(c[tile], a, x[tile][2 * j], x[tile][2 * j + 1]);
        }
    }
};

// The low-rank product of 16 rows of W's B with all columns: c = B (XA)^T, r a multiple of 16.
template <typename T, int TILES>
__device__ __forceinline__ void low_rank(float (&c)[TILES][4], const u16* xa, const u16* lora_b,
                                         const long long (&row)[2], long long m, int rank, int g,
                                         int q) {
    for (int r = 2 * q; r < rank; r += 16) {
        u32 a[4];
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                a[2 * part + h] =
                    *reinterpret_cast<const u32*>(lora_b + row[h] * rank + r + 8 * part);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const long long column = tile * 8 + g;
            const u32* from = reinterpret_cast<const u32*>(xa + column * rank + r);
            const u32 b0 = column < m ? from[0] : 0, b1 = column < m ? from[4] : 0;
            Mma::run<T>(c[tile], a, b0, b1);
        }
    }
}

template <typename T, int TILES, int SHARE>
__device__ __forceinline__ void small_m(const u16* x, const u8* packed, const NF4Scales& scales,
                                        const u16* bias, const u16* xa, const u16* lora_b, u16* y,
                                        long long m, long long n, long long k_total, int rank,
                                        float lora_scale) {
    __shared__ float map[256];
    __shared__ NF4Table table;
    __shared__ float sums[WARPS][ROWS][TILES * 8 + 1];
    const int t = threadIdx.x, lane = t & 31, warp = t / 32;
    const int g = lane / 4, q = lane % 4;

    const long long first = static_cast<long long>(blockIdx.x) * ROWS;
    const long long last = n - 1;
    const long long row[2] = {first + g < last ? first + g : last,
                              first + g + 8 < last ? first + g + 8 : last};
    constexpr int WIDTH = 4 * SHARE;
    const long long stride = static_cast<long long>(WARPS) * WIDTH;
    long long k = static_cast<long long>(warp) * WIDTH + q * SHARE;
    // The first reads are on their way while the tables are made.
    Step<TILES, SHARE> now, next;
    if (k < k_total) now.load(x, packed, scales, row, m, k_total, k, g);
    const float mean = scales.mean();
    map[t] = DYNAMIC_MAP_VALUES[t];
    table.fill(t, WARPS * 32);
    float c[TILES][4] = {};
    if (warp == WARPS - 1) {  // the warp with the least of K to do
        low_rank<T, TILES>(c, xa, lora_b, row, m, rank, g, q);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[tile][i] *= lora_scale;
    }
    __syncthreads();

    for (; k < k_total; k += stride) {
        const bool more = k + stride < k_total;
        if (more) next.load(x, packed, scales, row, m, k_total, k + stride, g);
        now.template multiply<T>(c, table, scales, mean, map, lane);
        if (more) now = next;
    }

#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[warp][g + (i / 2) * 8][tile * 8 + 2 * q + (i & 1)] = c[tile][i];
    __syncthreads();

    for (int i = t; i < ROWS * TILES * 8; i += WARPS * 32) {
        const int r = i % ROWS, column = i / ROWS;
        const long long out = first + r;
        if (out >= n || column >= m) continue;
        float sum = bias != nullptr ? T::read(bias[out]) : 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][r][column];
        y[column * n + out] = static_cast<u16>(T::pack(sum, 0.f));
    }
}

#define SMALL_M(NAME, T, TILES, SHARE)                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                      \
        NAME(const u16* x, const u8* packed, const void* absmax, const float* nested,            \
             const float* offset, const u16* bias, const u16* xa, const u16* lora_b, u16* y,     \
             long long m, long long n, long long k, long long block_shift, long long rank,       \
             float lora_scale) {                                                                 \
        const NF4Scales scales{absmax, nested, offset, static_cast<int>(block_shift)};           \
        small_m<T, TILES, SHARE>(x, packed, scales, bias, xa, lora_b, y, m, n, k,                \
                                 static_cast<int>(rank), lora_scale);                            \
    }

SMALL_M(nf4_small_m_bfloat16_8_wide, BFloat16, 1, 32)
SMALL_M(nf4_small_m_bfloat16_16_wide, BFloat16, 2, 32)
SMALL_M(nf4_small_m_bfloat16_8, BFloat16, 1, 16)
SMALL_M(nf4_small_m_bfloat16_16, BFloat16, 2, 16)
SMALL_M(nf4_small_m_float16_8_wide, Float16, 1, 32)
SMALL_M(nf4_small_m_float16_16_wide, Float16, 2, 32)
SMALL_M(nf4_small_m_float16_8, Float16, 1, 16)
SMALL_M(nf4_small_m_float16_16, Float16, 2, 16)

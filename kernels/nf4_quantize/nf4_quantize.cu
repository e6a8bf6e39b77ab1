// Weights to packed NF4 codes and one f32 scale per block, read once; and those scales to 8 bits.
// Shapes    weight (n) bf16/fp16/f32 | packed (ceil(n/2)) u8 | absmax (ceil(n/block)) f32;
//           then codes (blocks) u8 | nested (ceil(blocks/256)) f32, given offset () f32
// Format    qlora_kit/quant/nf4.py and double_quant.py; NF4_VALUES and DYNAMIC_MAP_VALUES are
//           generated from there and put before this file
// Requires  sm_80+, weight 16-byte and packed 4-byte aligned, block a power of two from 32 to 4096;
//           checked in qlora_kit/ops/nf4_quantize/cuda.py
// Tile      4096 weights per step of a block: whole blocks of any size. A thread owns two runs of 8
//           weights: 16 bytes (or 32) in, 4 out; the next tile is read while this one is coded
// Numerics  a block's weights are multiplied by the rounded reciprocal of its scale, those of a
//           last partial block divided by it; ties go to the lower code: the reference's bits
// Truth     qlora_kit/quant/nf4.py: quantize_nf4; qlora_kit/quant/double_quant.py: code_absmax
//
// The nearest of 16 values is the number of midpoints below. As the reference does on a CPU, bins
// with at most one midpoint each turn the search into one look-up and one comparison.
// Magnitudes are compared as integers: a NaN is then the largest, and shows in the scale.
#include "common/convert.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int RUN = 8;   // weights per thread and run
constexpr int RUNS = 2;  // per tile
constexpr int TILE = THREADS * RUN * RUNS;
constexpr float TINY = 1e-38f;  // smallest divisor, as the reference's
constexpr u32 ALL = 0xffffffffu;

struct Float32;

// Eight weights as they lie in memory, and as f32.
template <typename T>
struct Input {
    uint4 words;

    __device__ __forceinline__ void load(const void* weight, long long at) {
        words = __ldcs(reinterpret_cast<const uint4*>(static_cast<const u16*>(weight) + at));
    }
    __device__ __forceinline__ void load_part(const void* weight, long long at, long long n) {
        const u16* from = static_cast<const u16*>(weight) + at;
        u32 v[RUN / 2] = {};
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (at + i < n) v[i / 2] |= static_cast<u32>(from[i]) << 16 * (i & 1);
        words = {v[0], v[1], v[2], v[3]};
    }
    __device__ __forceinline__ void read(float (&v)[RUN]) const {
        const u32 w[RUN / 2] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < RUN / 2; ++i) {
            v[2 * i] = T::read(static_cast<u16>(w[i]));
            v[2 * i + 1] = T::read(static_cast<u16>(w[i] >> 16));
        }
    }
};

template <>
struct Input<Float32> {
    float4 low, high;

    __device__ __forceinline__ void load(const void* weight, long long at) {
        const float* first = static_cast<const float*>(weight) + at;
        const float4* from = reinterpret_cast<const float4*>(first);
        low = __ldg(from);  // the lines are shared by both reads: they stay cached
        high = __ldg(from + 1);
    }
    __device__ __forceinline__ void load_part(const void* weight, long long at, long long n) {
        const float* from = static_cast<const float*>(weight) + at;
        float v[RUN];
#pragma unroll
        for (int i = 0; i < RUN; ++i) v[i] = at + i < n ? from[i] : 0.f;
        low = {v[0], v[1], v[2], v[3]};
        high = {v[4], v[5], v[6], v[7]};
    }
    __device__ __forceinline__ void read(float (&v)[RUN]) const {
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};

// Bins of [-1, 1], 1/16 wide around multiples of 1/16: how many midpoints lie in lower bins, and
// the midpoint in the bin, or infinity. 16 copies keep 64-bit look-ups free of bank conflicts.
struct Bins {
    static constexpr int COUNT = 33;
    static constexpr int ROWS = 64;  // a power of two: whatever the value, the look-up stays inside
    float2 bins[ROWS][16];

    // 16 v + 16 rounded to an integer, in the lowest bits; never decreases with v.
    static __device__ __forceinline__ u32 bin(float v) {
        return __float_as_uint(__fmaf_rn(v, 16.f, 8388608.f + 16.f));
    }

    // All threads of the block call this, then synchronize.
    __device__ __forceinline__ void fill(int thread, int threads) {
        for (int i = thread; i < ROWS * 16; i += threads) {
            float midpoint = __uint_as_float(0x7f800000u);
            u32 below = 0;
            for (int m = 0; m < 15; ++m) {
                const float middle =
                    __fmul_rn(__fadd_rn(NF4_VALUES[m], NF4_VALUES[m + 1]), 0.5f);
                const int at = static_cast<int>(bin(middle) & (ROWS - 1));
                if (at < i / 16) ++below;
                if (at == i / 16) midpoint = middle;
            }
            bins[i / 16][i % 16] = {midpoint, __uint_as_float(below)};
        }
    }

    // Index of the nearest value, ties to the lower.
    __device__ __forceinline__ u32 code(float v, int lane) const {
        const u32 at = (bin(v) << 7 & (ROWS - 1) << 7) | (lane & 15) * 8;
        const float2 found =
            *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(bins) + at);
        return __float_as_uint(found.y) + (v > found.x ? 1u : 0u);
    }
};

// Largest magnitude of a block's weights, from that of each thread's run: as bits, which grow with
// the magnitude. `runs` of 8 weights make a block; blocks of more than a warp's 32 runs meet in
// shared memory.
__device__ __forceinline__ void reduce(u32 (&largest)[RUNS], int block_shift,
                                       u32 (&shared)[RUNS * WARPS], int lane, int warp) {
    const int runs = 1 << (block_shift - 3);
    for (int step = 1; step < runs && step < 32; step *= 2)
#pragma unroll
        for (int s = 0; s < RUNS; ++s)
            largest[s] = max(largest[s], __shfl_xor_sync(ALL, largest[s], step));
    const int warps = runs / 32;  // per block
    if (warps < 2) return;
    if (lane == 0)
#pragma unroll
        for (int s = 0; s < RUNS; ++s) shared[s * WARPS + warp] = largest[s];
    __syncthreads();
#pragma unroll
    for (int s = 0; s < RUNS; ++s) {
        const int start = (s * WARPS + warp) & ~(warps - 1);
#pragma unroll 1
        for (int i = 0; i < warps; ++i) largest[s] = max(largest[s], shared[start + i]);
    }
    __syncthreads();
}

template <typename T>
__device__ __forceinline__ void quantize(const void* weight, u8* packed, float* absmax,
                                         long long n, int block_shift) {
    __shared__ Bins bins;
    __shared__ u32 shared[RUNS * WARPS];
    const int t = threadIdx.x, lane = t & 31;
    __builtin_assume(t < THREADS);
    const int block_mask = (1 << block_shift) - 1;
    const long long whole = n >> block_shift << block_shift;  // weights in whole blocks
    const u32 tiles = static_cast<u32>((n + TILE - 1) / TILE);

    const auto load = [&](Input<T> (&input)[RUNS], u32 tile) {
#pragma unroll
        for (int s = 0; s < RUNS; ++s) {
            const long long at = static_cast<long long>(tile) * TILE + (s * THREADS + t) * RUN;
            if (at + RUN <= n)
                input[s].load(weight, at);
            else
                input[s].load_part(weight, at, n);
        }
    };
    const auto code = [&](const Input<T> (&input)[RUNS], u32 tile) {
        u32 largest[RUNS];
#pragma unroll
        for (int s = 0; s < RUNS; ++s) {
            float v[RUN];
            input[s].read(v);
            largest[s] = 0;
#pragma unroll
            for (int i = 0; i < RUN; ++i)
                largest[s] = max(largest[s], __float_as_uint(v[i]) & 0x7fffffffu);
        }
        reduce(largest, block_shift, shared, lane, t / 32);
#pragma unroll
        for (int s = 0; s < RUNS; ++s) {
            const long long at = static_cast<long long>(tile) * TILE + (s * THREADS + t) * RUN;
            if (at >= n) continue;
            float v[RUN];
            input[s].read(v);
            const float found = __uint_as_float(largest[s]);
            const float divisor = found < TINY ? TINY : found;
            float inverse = __frcp_rn(divisor);
            const bool partial = at >= whole;
            if (partial) {  // quotients already: times one
                inverse = 1.f;
#pragma unroll
                for (int i = 0; i < RUN; ++i) v[i] = __fdiv_rn(v[i], divisor);
            }
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < RUN; ++i)
                word |= bins.code(__fmul_rn(v[i], inverse), lane) << (4 * (i ^ 1));
            if ((at & block_mask) == 0) absmax[at >> block_shift] = partial ? divisor : found;
            if (at + RUN <= n) {
                *reinterpret_cast<u32*>(packed + at / 2) = word;
            } else {
                for (int i = 0; at + 2 * i < n; ++i)
                    packed[at / 2 + i] = static_cast<u8>(word >> 8 * i);
            }
        }
    };

    u32 tile = blockIdx.x;
    // The first reads are on their way while the table is made; then two tiles take turns.
    Input<T> even[RUNS], odd[RUNS];
    if (tile < tiles) load(even, tile);
    bins.fill(t, THREADS);
    __syncthreads();
    while (tile < tiles) {
        if (tile + gridDim.x < tiles) load(odd, tile + gridDim.x);
        code(even, tile);
        tile += gridDim.x;
        if (tile >= tiles) break;
        if (tile + gridDim.x < tiles) load(even, tile + gridDim.x);
        code(odd, tile);
        tile += gridDim.x;
    }
}

#define NF4_QUANTIZE(NAME, T)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) nf4_quantize_##NAME(                    \
        const void* weight, u8* packed, float* absmax, long long n, long long block_shift) {      \
        quantize<T>(weight, packed, absmax, n, static_cast<int>(block_shift));                    \
    }

NF4_QUANTIZE(bfloat16, BFloat16)
NF4_QUANTIZE(float16, Float16)
NF4_QUANTIZE(float32, Float32)

// One group of 256 scales per block of threads and step: their distance from the offset, divided by
// the largest in the group, as the index of the nearest value of the dynamic map.
extern "C" __global__ void __launch_bounds__(THREADS)
    nf4_quantize_scales(const float* absmax, const float* offset, u8* codes, float* nested,
                        long long blocks) {
    __shared__ float midpoints[THREADS];
    __shared__ u32 shared[WARPS];
    const int t = threadIdx.x, lane = t & 31, warp = t / 32;
    if (t < 255)
        midpoints[t] =
            __fmul_rn(__fadd_rn(DYNAMIC_MAP_VALUES[t], DYNAMIC_MAP_VALUES[t + 1]), 0.5f);
    const float mean = *offset;
    const long long groups = (blocks + 255) / 256;
    for (long long group = blockIdx.x; group < groups; group += gridDim.x) {
        const long long at = group * 256 + t;
        const float centred = at < blocks ? __fsub_rn(absmax[at], mean) : 0.f;
        u32 largest = __float_as_uint(centred) & 0x7fffffffu;
        for (int step = 1; step < 32; step *= 2)
            largest = max(largest, __shfl_xor_sync(ALL, largest, step));
        __syncthreads();  // the midpoints are there, and the last group is done with `shared`
        if (lane == 0) shared[warp] = largest;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < WARPS; ++w) largest = max(largest, shared[w]);
        const float scale = __uint_as_float(largest);
        if (t == 0) nested[group] = scale;
        const float unit = __fmul_rn(centred, __frcp_rn(scale));
        int below = 0;  // midpoints below; comparisons as in torch's search, NaN included
#pragma unroll
        for (int step = 128; step > 0; step /= 2)
            if (!(midpoints[below + step - 1] >= unit)) below += step;
        if (at < blocks) codes[at] = static_cast<u8>(scale == 0.f ? 0 : below);
    }
}

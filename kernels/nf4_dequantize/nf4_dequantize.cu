// W = dtype(NF4 value x scale), the nested 8-bit scales decoded on the way: one launch, one pass.
// Shapes    packed (ceil(n/2)) u8 | absmax (blocks) u8 or f32 | out (n) bf16/fp16/f32
// Format    qlora_kit/quant/nf4.py and double_quant.py; NF4_VALUES and DYNAMIC_MAP_VALUES are
//           generated from there and put before this file
// Requires  sm_80+, packed 4-byte and out 16-byte aligned; checked in
//           qlora_kit/ops/nf4_dequantize/cuda.py
// Tile      8 weights per thread and step, 4 steps in flight, 256 threads, grid-stride
// Numerics  f32 product per scale, f32 sum, f32 product per weight, one rounding: the reference's bits
// Truth     qlora_kit/quant/nf4.py: dequantize_nf4
#include "common/convert.cuh"
#include "common/nf4.cuh"

constexpr int THREADS = 256;
constexpr int STEPS = 4;
constexpr int WEIGHTS = 8;  // per thread and step: 4 bytes in, 16 (or 32) bytes out

template <typename T>
__device__ __forceinline__ void store(void* out, long long weight, const float (&v)[WEIGHTS]) {
    uint4 packed = {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]),
                    T::pack(v[6], v[7])};
    *reinterpret_cast<uint4*>(static_cast<u16*>(out) + weight) = packed;
}

struct Float32 {};

template <>
__device__ __forceinline__ void store<Float32>(void* out, long long weight,
                                               const float (&v)[WEIGHTS]) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(out) + weight);
    to[0] = {v[0], v[1], v[2], v[3]};
    to[1] = {v[4], v[5], v[6], v[7]};
}

template <typename T>
__device__ __forceinline__ void store_one(void* out, long long weight, float v) {
    static_cast<u16*>(out)[weight] = static_cast<u16>(T::pack(v, 0.f));
}

template <>
__device__ __forceinline__ void store_one<Float32>(void* out, long long weight, float v) {
    static_cast<float*>(out)[weight] = v;
}

template <typename T>
__device__ __forceinline__ void dequantize(const u8* packed, const NF4Scales& scales, void* out,
                                           long long n) {
    __shared__ float map[256];
    __shared__ NF4Table table;
    const int t = threadIdx.x, lane = t & 31;
    map[t] = DYNAMIC_MAP_VALUES[t];
    table.fill(t, THREADS);
    const float mean = scales.mean();
    __syncthreads();

    const long long chunks = n / WEIGHTS;
    const long long stride = static_cast<long long>(gridDim.x) * THREADS * STEPS;
    for (long long base = static_cast<long long>(blockIdx.x) * THREADS * STEPS + t; base < chunks;
         base += stride) {
        u32 bytes[STEPS];
        NF4Scales::Stored stored[STEPS];
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const long long chunk = base + s * THREADS;
            if (chunk < chunks) {
                bytes[s] = __ldg(reinterpret_cast<const u32*>(packed) + chunk);
                stored[s] = scales.load(chunk * WEIGHTS);
            }
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const long long chunk = base + s * THREADS;
            if (chunk < chunks) {
                const float scale = scales.decode(stored[s], mean, map);
                float v[WEIGHTS];
#pragma unroll
                for (int i = 0; i < WEIGHTS; ++i)
                    v[i] = __fmul_rn(table.at(bytes[s], i, lane), scale);
                store<T>(out, chunk * WEIGHTS, v);
            }
        }
    }

    // The last few weights of an odd size.
    if (blockIdx.x == 0 && t < n % WEIGHTS) {
        const long long weight = chunks * WEIGHTS + t;
        const float value = table.at(packed[weight / 2], weight & 1, lane);
        const float scale = scales.decode(scales.load(weight), mean, map);
        store_one<T>(out, weight, __fmul_rn(value, scale));
    }
}

#define NF4_DEQUANTIZE(NAME, T)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        NAME(const u8* packed, const void* absmax, const float* nested, const float* offset,     \
             void* out, long long n, long long block_shift) {                                          \
        dequantize<T>(packed, NF4Scales{absmax, nested, offset, static_cast<int>(block_shift)}, out, n);              \
    }

NF4_DEQUANTIZE(nf4_dequantize_bfloat16, BFloat16)
NF4_DEQUANTIZE(nf4_dequantize_float16, Float16)
NF4_DEQUANTIZE(nf4_dequantize_float32, Float32)

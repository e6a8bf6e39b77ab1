// The low-rank factor's own product, small = scale * activations F, made by a warp of its own in
// each of the first blocks while the other warps multiply W.
// Shapes    activations (m,C), m <= 16 | factor (r,C) | partial, f32 (MOST_MAKERS,16,r) |
//           out (m,r) | state: three words, zero before and after each launch
// Requires  C % 8 == 0, r % 8 == 0, 16-byte alignment
// How       16 tokens x 16 ranks at a time, 32 of the contraction a step: tokens are the 16-row
//           operand of mma.m16n8k16, ranks the 8-column one. A lane takes 8 neighbours of a row on
//           both sides.
// Meeting   the last warp to add its part sums all parts in their order, writes the result and says
//           so. Blocks that make parts may not all have found room beside other kernels: who has
//           waited for long makes everything itself, to the same bits. Whoever is done last sets
//           the words back to zero.
// Truth     qlora_kit/ops/nf4_linear/reference.py: scaled_product
#pragma once
#include "common/counters.cuh"
#include "nf4_linear/gemv/parts.cuh"

constexpr int MOST_MAKERS = 32;

struct Small {
    const u16* factor;  // null: none
    float* partial;
    u16* out;
    u32* state;  // parts added, result ready, warps and blocks done
    float scale;
    int makers;  // of the parts
};

constexpr long long PATIENCE = 1 << 17;  // cycles

struct Operands {
    uint4 x[2];  // tokens g and g+8
    uint4 f[2];  // ranks g and g+8
};

// Elements k..k+31 of the contraction: lane 4g+q takes 8q..8q+7.
__device__ __forceinline__ Operands load_small(const u16* x, const u16* factor, int m,
                                               int contraction, int rank, int first, int k, int g,
                                               int q) {
    Operands o;
    const int at = k + 8 * q;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int token = g + 8 * h, r = first + g + 8 * h;
        const u16* from = x + static_cast<long long>(token) * contraction + at;
        const u16* line = factor + static_cast<long long>(r) * contraction + at;
        const bool inside = at < contraction;
        o.x[h] = inside && token < m ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
        o.f[h] = inside && r < rank ? *reinterpret_cast<const uint4*>(line) : uint4{0, 0, 0, 0};
    }
    return o;
}

template <typename T>
__device__ __forceinline__ void multiply_small(float (&c)[2][4], const Operands& o) {
    const uint4 low = o.x[0], high = o.x[1];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint4 f = o.f[h];
        Mma::run<T>(c[h], {low.x, high.x, low.y, high.y}, f.x, f.y);
        Mma::run<T>(c[h], {low.z, high.z, low.w, high.w}, f.z, f.w);
    }
}

__device__ __forceinline__ float2 read_pair(const float* from) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
    return v;
}

// Part `maker`, by one warp, with so many steps on their way.
template <typename T, int AHEAD>
__device__ __forceinline__ void make_part(const Small& s, const u16* x, int m, int contraction,
                                          int rank, int maker) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int all = (contraction + 31) / 32;
    const int begin = all * maker / s.makers, end = all * (maker + 1) / s.makers;
#pragma unroll 1
    for (int first = 0; first < rank; first += 16) {
        float c[2][4] = {};
#pragma unroll AHEAD
        for (int step = begin; step < end; ++step)
            multiply_small<T>(
                c, load_small(x, s.factor, m, contraction, rank, first, 32 * step, g, q));
        // Column j of half h is rank 8h + j.
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = g + 8 * i, r = first + 8 * h + 2 * q;
                if (token < m && r < rank)
                    *reinterpret_cast<float2*>(s.partial + (maker * 16 + token) * rank + r) = {
                        c[h][2 * i], c[h][2 * i + 1]};
            }
    }
    __threadfence();
    __syncwarp();
}

// The parts' sum, by one warp.
template <typename T, int AHEAD>
__device__ __forceinline__ void add_parts(const Small& s, int m, int rank) {
    for (int i = 2 * (threadIdx.x % 32); i < m * rank; i += 64) {
        float2 sum = {0.f, 0.f};
        const float* from = s.partial + i;  // token i / rank, rank i % rank
#pragma unroll AHEAD
        for (int part = 0; part < s.makers; ++part) {
            const float2 add = read_pair(from + part * 16 * rank);
            sum.x += add.x;
            sum.y += add.y;
        }
        *reinterpret_cast<u32*>(s.out + i) = T::pack(sum.x * s.scale, sum.y * s.scale);
    }
    __threadfence();
    __syncwarp();
}

// Each block's warps that multiply W once, and each warp that makes a part: it is done.
__device__ __forceinline__ void leave_small(const Small& s) {
    if (add_in_order(s.state + 2) != gridDim.x + s.makers - 1) return;
    s.state[0] = s.state[1] = s.state[2] = 0;
}

// The warp beside those that multiply W.
template <typename T>
__device__ __forceinline__ void make_small(const Small& s, const u16* x, int m, int contraction,
                                           int rank) {
    const int lane = threadIdx.x % 32;
    if (blockIdx.x >= s.makers) return;
    make_part<T, 2>(s, x, m, contraction, rank, blockIdx.x);
    const u32 before = __shfl_sync(0xffffffffu, lane == 0 ? add_in_order(s.state) : 0u, 0);
    if (before == s.makers - 1) {
        __threadfence();
        add_parts<T, 16>(s, m, rank);
        if (lane == 0) write_released(s.state + 1, 1);
    }
    if (lane == 0) leave_small(s);
}

// One warp of each block: until the result is there.
template <typename T>
__device__ __forceinline__ void wait_for_small(const Small& s, const u16* x, int m, int contraction,
                                               int rank) {
    int ready = 0;
    if (threadIdx.x % 32 == 0) {
        const long long start = clock64();
        do ready = read_acquired(s.state + 1);
        while (!ready && clock64() - start < PATIENCE);
    }
    if (__shfl_sync(0xffffffffu, ready, 0)) return;
#pragma unroll 1
    for (int maker = 0; maker < s.makers; ++maker)
        make_part<T, 1>(s, x, m, contraction, rank, maker);
    add_parts<T, 1>(s, m, rank);
}

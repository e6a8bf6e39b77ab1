// What the product for few rows is made of: the table of pairs, loads of W, and how blocks meet
// other kernels and other blocks. See forward.cuh.
#pragma once
#include "common/convert.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/nf4.cuh"

constexpr int TABLE_BYTES = 256 * 32 * 8;
constexpr int MAP_BYTES = 256 * 4;

struct Problem {
    const u16* x;  // (m,k)
    const u8* packed;
    NF4Scales scales;
    const u16* bias;    // null: none
    const u16* small;   // (m,rank) of the low-rank product; null: none
    const u16* factor;  // (n,rank)
    u16* out;
    int m, n, k, rank;
};

// One of the 16 values, chosen without memory: it would be far away when a kernel begins.
__device__ __forceinline__ float nf4_value(int code) {
    float value = NF4_VALUES[0];
#pragma unroll
    for (int i = 1; i < 16; ++i) value = code == i ? NF4_VALUES[i] : value;
    return value;
}

// Entry b, 256 bytes: the values of byte b's high and low nibble, once for each lane. Threads begin
// at different pieces of their entries, so that a warp's stores meet no bank twice.
template <int THREADS>
__device__ __forceinline__ void fill_table(u8* table, int t) {
    for (int half = t; half < 512; half += THREADS) {
        const int entry = half % 256;
        const float high = nf4_value(entry >> 4), low = nf4_value(entry & 15);
        float4* to = reinterpret_cast<float4*>(table + entry * 256 + half / 256 * 128);
#pragma unroll
        for (int i = 0; i < 8; ++i) to[(i + t) % 8] = {high, low, high, low};
    }
}

// And the map of the 8-bit scales.
template <int THREADS>
__device__ __forceinline__ void fill_tables(u8* table, u8* map, int t) {
    for (int i = t; i < 256; i += THREADS) reinterpret_cast<float*>(map)[i] = DYNAMIC_MAP_VALUES[i];
    fill_table<THREADS>(table, t);
}

// Registers of a thread: with the warp that makes the small product, they fill a processor.
template <int WARPS>
constexpr int REGISTERS = WARPS < 8    ? 224
                          : WARPS < 12 ? 168
                                       : 128;

// The warps that multiply W meet; the one beside them does not.
template <int THREADS>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ __forceinline__ float2 look_up(const u8* table, u32 word, int byte, u32 lane_offset) {
    const u32 at = __byte_perm(word, lane_offset, 0x5504u + 0x10u * byte);
    return *reinterpret_cast<const float2*>(table + at);
}

// Bytes of W are read once: they pass by L1.
__device__ __forceinline__ uint4 stream16(const u8* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// What memory holds for a block's scale, by the same two loads with and without double
// quantization: loads of which one or the other happens would wait for each other.
__device__ __forceinline__ NF4Scales::Stored stream_scale(const NF4Scales& scales, u32 block) {
    const u8* codes = static_cast<const u8*>(scales.absmax) + block;
    const float* group = scales.nested != nullptr
                             ? scales.nested + (block >> 8)
                             : static_cast<const float*>(scales.absmax) + block;
    return {__ldg(group), __ldg(codes)};
}

__device__ __forceinline__ void prefetch_l2(const void* from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// What another kernel may just have written, past the caches that assume it is constant.
__device__ __forceinline__ u16 read_fresh(const u16* from) {
    u16 v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ uint4 read_fresh16(const u16* from) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    wait_for_previous_kernel();
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    launch_next_kernel();
#endif
}

// Blocks that share a contraction are a cluster; before Hopper each is alone.
__device__ __forceinline__ int peers() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cluster_size());
#else
    return 1;
#endif
}
__device__ __forceinline__ int own_rank() {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cluster_rank());
#else
    return 0;
#endif
}
__device__ __forceinline__ void meet_peers() {
#if __CUDA_ARCH__ >= 900
    sync_cluster();
#endif
}
// When they have only read since.
__device__ __forceinline__ void leave_peers() {
#if __CUDA_ARCH__ >= 900
    meet_cluster();
#endif
}
__device__ __forceinline__ float peer_value(const float* own, int rank) {
#if __CUDA_ARCH__ >= 900
    return read_peer_one(shared_address(own), static_cast<u32>(rank));
#else
    return *own;
#endif
}

// low . factor over the ranks, of one row each.
template <typename T>
__device__ __forceinline__ float low_rank_dot(const u16* low, const u16* factor, int rank) {
    float sum = 0.f;
    const bool wide =
        rank % 8 == 0 && ((reinterpret_cast<u64>(low) | reinterpret_cast<u64>(factor)) & 15) == 0;
    if (!wide) {
        for (int r = 0; r < rank; ++r) sum += T::read(read_fresh(low + r)) * T::read(factor[r]);
        return sum;
    }
#pragma unroll 2
    for (int r = 0; r < rank; r += 8) {
        const uint4 a = *reinterpret_cast<const uint4*>(factor + r), b = read_fresh16(low + r);
        const u32 v[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum += T::read(static_cast<u16>(v[i])) * T::read(static_cast<u16>(w[i]));
            sum += T::read(static_cast<u16>(v[i] >> 16)) * T::read(static_cast<u16>(w[i] >> 16));
        }
    }
    return sum;
}

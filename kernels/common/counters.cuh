// Words of global memory by which warps of different blocks meet: the memory model's orders, one PTX
// line each. The words are the PTX manual's.
#pragma once
#include "common/convert.cuh"

__device__ __forceinline__ u32 read_relaxed(const u32* from) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
__device__ __forceinline__ u32 read_acquired(const u32* from) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
__device__ __forceinline__ void write_released(u32* to, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void add_one_released(u32* to) {
    asm volatile("red.add.release.gpu.global.u32 [%0], 1;" ::"l"(to) : "memory");
}
// Adds one, acquired and released; what was there before.
__device__ __forceinline__ u32 add_in_order(u32* to) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(to) : "memory");
    return before;
}
// The same without order, by one lane of a warp. `atom.inc` and not `atom.add`: the compiler merges a
// warp's additions into one and passes its answer round at once, so that the lane would wait for it
// here instead of where it is used.
__device__ __forceinline__ u32 take_one(u32* from) {
    u32 before;
    asm volatile("atom.inc.relaxed.gpu.global.u32 %0, [%1], 0x7fffffff;"
                 : "=r"(before)
                 : "l"(from)
                 : "memory");
    return before;
}

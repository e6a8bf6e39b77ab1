// What this op asks of the hardware beyond common/mma.cuh, one PTX line each.
#pragma once
#include "common/mma.cuh"

typedef unsigned long long u64;

// How the L2 cache keeps lines that nobody reads again soon: they leave it first.
__device__ __forceinline__ u64 keep_shortly() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ u64 keep_normally() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// copy_async without reading ahead, where rows end and another block's begin; and under a policy.
__device__ __forceinline__ void copy_exactly(u32 to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_exactly(u32 to, const void* from, bool present, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
                 "l"(from), "r"(present ? 16 : 0), "l"(policy)
                 : "memory");
}

// The stream's next kernel, if launched to overlap, may take its place; `wait_for_sums` in it
// returns once this one has ended. Before Hopper there is no such launch.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

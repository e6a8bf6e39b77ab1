// Ampere's asynchronous copies, fragment loads and tensor-core product, one PTX line each. They
// run on every architecture since. Needs common/convert.cuh for BFloat16 and Float16.
#pragma once
#include "common/convert.cuh"

// c (16 x 8, f32) += a (16 x 16) b (16 x 8). Lane 4g+q holds, of c: rows g, g+8, columns 2q, 2q+1;
// of a: rows g, g+8 alternating, columns 2q, 2q+1, then 2q+8, 2q+9; of b: the same k, column g.
struct Mma {
    template <typename T>
    static __device__ __forceinline__ void run(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);
};

template <>
__device__ __forceinline__ void Mma::run<BFloat16>(float (&c)[4], const u32 (&a)[4], u32 b0,
                                                   u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void Mma::run<Float16>(float (&c)[4], const u32 (&a)[4], u32 b0,
                                                  u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The 32-bit address of something in shared memory.
__device__ __forceinline__ u32 to_shared(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros instead of what `present` denies.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(present ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's latest groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8. Lane 4g+q gets of
// each row g, columns 2q and 2q+1, or, transposed, column g, rows 2q and 2q+1.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(from)
                     : "memory");
    }
}

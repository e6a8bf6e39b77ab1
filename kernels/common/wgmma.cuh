// wgmma with its left operand in registers and its right one in shared memory, and what it waits
// for. PTX only, for sm_90a. The words are the PTX manual's.
#pragma once
#include "common/hopper.cuh"

// Describes a tile of [rows][64] 16-bit values, permuted over 128 bytes, to wgmma.
__device__ __forceinline__ u64 tile_descriptor(const void* tile) {
    constexpr u64 SWIZZLE_128 = 1ull << 62;
    constexpr u64 EIGHT_ROWS = static_cast<u64>(1024 >> 4) << 32;
    constexpr u64 UNUSED = 1ull << 16;
    return SWIZZLE_128 | EIGHT_ROWS | UNUSED | ((shared_address(tile) & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps a register, in the compiler's eyes, in use up to here.
__device__ __forceinline__ void keep(u32& value) {
    asm volatile("" : "+r"(value)::"memory");
}
__device__ __forceinline__ void keep(float& value) {
    asm volatile("" : "+f"(value)::"memory");
}

// A thread's sums in PTX, and as operands from d[i] on.
#define QK_REGISTERS_4 "%0, %1, %2, %3"
#define QK_REGISTERS_8 QK_REGISTERS_4 ", %4, %5, %6, %7"
#define QK_REGISTERS_16 QK_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QK_REGISTERS_32 QK_REGISTERS_16                                                \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QK_REGISTERS_64 QK_REGISTERS_32                                                \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QK_REGISTERS_128 QK_REGISTERS_64               \
    ", %64, %65, %66, %67, %68, %69, %70, %71"         \
    ", %72, %73, %74, %75, %76, %77, %78, %79"         \
    ", %80, %81, %82, %83, %84, %85, %86, %87"         \
    ", %88, %89, %90, %91, %92, %93, %94, %95"         \
    ", %96, %97, %98, %99, %100, %101, %102, %103"     \
    ", %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119" \
    ", %120, %121, %122, %123, %124, %125, %126, %127"
#define QK_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QK_SUMS_8(d, i) QK_SUMS_4(d, i), QK_SUMS_4(d, i + 4)
#define QK_SUMS_16(d, i) QK_SUMS_8(d, i), QK_SUMS_8(d, i + 8)
#define QK_SUMS_32(d, i) QK_SUMS_16(d, i), QK_SUMS_16(d, i + 16)
#define QK_SUMS_64(d, i) QK_SUMS_32(d, i), QK_SUMS_32(d, i + 32)
#define QK_SUMS_128(d, i) QK_SUMS_64(d, i), QK_SUMS_64(d, i + 64)

// d (64 x N, f32) += a (64 x 16, registers) x b (16 x N, shared memory: [N][64], or, if TRANSPOSED,
// [16][64] of several tiles).
template <typename T, int N, bool TRANSPOSED = false>
struct Wgmma;

#define QK_WGMMA_OF(T, TYPE, N, SUMS, A, B, TRANSPOSED, TURNED)                                   \
    template <>                                                                                   \
    struct Wgmma<T, N, TRANSPOSED> {                                                              \
        static __device__ __forceinline__ void run(float (&d)[SUMS], const u32 (&a)[4], u64 b) {  \
            asm volatile(                                                                         \
                "{ .reg .pred add; setp.eq.u32 add, 0, 0; "                                       \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                   \
                " {" QK_REGISTERS_##SUMS "}, {" A "}, " B ", add, 1, 1, " TURNED "; }"            \
                : QK_SUMS_##SUMS(d, 0)                                                            \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
        }                                                                                         \
    };
#define QK_WGMMA(N, SUMS, A, B)                              \
    QK_WGMMA_OF(BFloat16, "bf16", N, SUMS, A, B, false, "0") \
    QK_WGMMA_OF(BFloat16, "bf16", N, SUMS, A, B, true, "1")  \
    QK_WGMMA_OF(Float16, "f16", N, SUMS, A, B, false, "0")   \
    QK_WGMMA_OF(Float16, "f16", N, SUMS, A, B, true, "1")

QK_WGMMA(8, 4, "%4, %5, %6, %7", "%8")
QK_WGMMA(16, 8, "%8, %9, %10, %11", "%12")
QK_WGMMA(32, 16, "%16, %17, %18, %19", "%20")
QK_WGMMA(64, 32, "%32, %33, %34, %35", "%36")
QK_WGMMA(128, 64, "%64, %65, %66, %67", "%68")
QK_WGMMA(256, 128, "%128, %129, %130, %131", "%132")

// wgmma with both operands in shared memory, 64 x N of the result. See common/wgmma.cuh.
#pragma once
#include "common/wgmma.cuh"

// Describes a tile of [contraction][64 columns] 16-bit values, permuted over 128 bytes, of which
// several lie behind one another, `distance` bytes apart: wgmma's transposed right operand.
__device__ __forceinline__ u64 transposed_tile_descriptor(const void* tile, u32 distance) {
    constexpr u64 SWIZZLE_128 = 1ull << 62;
    constexpr u64 EIGHT_ROWS = static_cast<u64>(1024 >> 4) << 32;
    const u64 next = static_cast<u64>(distance >> 4) << 16;
    return SWIZZLE_128 | EIGHT_ROWS | next | ((shared_address(tile) & 0x3FFFF) >> 4);
}

// The same of 16 columns alone, permuted over 32 bytes.
__device__ __forceinline__ u64 transposed_narrow_descriptor(const void* tile) {
    constexpr u64 SWIZZLE_32 = 3ull << 62;
    constexpr u64 EIGHT_ROWS = static_cast<u64>(256 >> 4) << 32;
    constexpr u64 UNUSED = 1ull << 16;
    return SWIZZLE_32 | EIGHT_ROWS | UNUSED | ((shared_address(tile) & 0x3FFFF) >> 4);
}

// d (64 x N, f32) = a (64 x 16) x b (16 x N), added to d unless `fresh`; b stored [N][16] or, if
// TRANSPOSED, [16][N].
template <typename T, int N, bool TRANSPOSED>
struct WgmmaShared;

// A, B and FRESH are the operands behind the SUMS of a thread.
#define QK_WGMMA_SHARED_OF(T, TYPE, N, SUMS, A, B, FRESH, TRANSPOSED, TURNED)                     \
    template <>                                                                                   \
    struct WgmmaShared<T, N, TRANSPOSED> {                                                        \
        static __device__ __forceinline__ void run(float (&d)[SUMS], u64 a, u64 b, u32 fresh) {   \
            asm volatile(                                                                         \
                "{ .reg .pred add; setp.eq.u32 add, " FRESH ", 0; "                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                   \
                " {" QK_REGISTERS_##SUMS "}, " A ", " B ", add, 1, 1, 0, " TURNED "; }"           \
                : QK_SUMS_##SUMS(d, 0)                                                            \
                : "l"(a), "l"(b), "r"(fresh));                                                    \
        }                                                                                         \
    };
#define QK_WGMMA_SHARED(N, SUMS, A, B, FRESH)                                         \
    QK_WGMMA_SHARED_OF(BFloat16, "bf16", N, SUMS, A, B, FRESH, false, "0")            \
    QK_WGMMA_SHARED_OF(BFloat16, "bf16", N, SUMS, A, B, FRESH, true, "1")             \
    QK_WGMMA_SHARED_OF(Float16, "f16", N, SUMS, A, B, FRESH, false, "0")              \
    QK_WGMMA_SHARED_OF(Float16, "f16", N, SUMS, A, B, FRESH, true, "1")

QK_WGMMA_SHARED(16, 8, "%8", "%9", "%10")
QK_WGMMA_SHARED(128, 64, "%64", "%65", "%66")
QK_WGMMA_SHARED(256, 128, "%128", "%129", "%130")

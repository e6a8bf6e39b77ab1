// Rounding float32 to the compute dtypes, two values at a time, without CUDA's headers:
// NVRTC comes without them, and PTX says the same in one line.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct BFloat16 {
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ __forceinline__ float read(u16 bits) {
        return __uint_as_float(static_cast<u32>(bits) << 16);
    }
};

struct Float16 {
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ __forceinline__ float read(u16 bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
};

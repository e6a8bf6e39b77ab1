// Rounding decoded weights to the dtype that is stored, 16 bytes at a time or one by one.
#pragma once
#include "common/convert.cuh"

// Rounding the weights of 16 bytes of output.
template <typename T>
struct Output {
    static constexpr int WEIGHTS = 8;
    typedef u32 Word;  // their codes

    static __device__ __forceinline__ uint4 round(const float (&v)[WEIGHTS]) {
        return {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7])};
    }
    static __device__ __forceinline__ void store_one(void* out, long long at, float v) {
        static_cast<u16*>(out)[at] = static_cast<u16>(T::pack(v, 0.f));
    }
};

struct Float32;

template <>
struct Output<Float32> {
    static constexpr int WEIGHTS = 4;
    typedef u16 Word;

    static __device__ __forceinline__ uint4 round(const float (&v)[WEIGHTS]) {
        return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                __float_as_uint(v[3])};
    }
    static __device__ __forceinline__ void store_one(void* out, long long at, float v) {
        static_cast<float*>(out)[at] = v;
    }
};

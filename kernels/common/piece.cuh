// Sixteen bytes of a row as f32 and back, and one value alike: what kernels that stream rows read
// and write. A null pointer's row is never touched.
#pragma once
#include "common/convert.cuh"

template <typename T>
struct Piece {
    static constexpr int COUNT = 8;  // values
    static constexpr int BYTES = 2;  // per value

    static __device__ __forceinline__ void read(const uint4& words, float (&v)[COUNT]) {
        const u32 w[COUNT / 2] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            v[2 * i] = T::read(static_cast<u16>(w[i]));
            v[2 * i + 1] = T::read(static_cast<u16>(w[i] >> 16));
        }
    }
    static __device__ __forceinline__ uint4 round(const float (&v)[COUNT]) {
        return {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7])};
    }
    static __device__ __forceinline__ float read_one(const void* row, long long at) {
        return T::read(static_cast<const u16*>(row)[at]);
    }
    static __device__ __forceinline__ void write_one(void* row, long long at, float v) {
        static_cast<u16*>(row)[at] = static_cast<u16>(T::pack(v, 0.f));
    }
};

struct Float32;

template <>
struct Piece<Float32> {
    static constexpr int COUNT = 4;
    static constexpr int BYTES = 4;

    static __device__ __forceinline__ void read(const uint4& words, float (&v)[COUNT]) {
        v[0] = __uint_as_float(words.x), v[1] = __uint_as_float(words.y);
        v[2] = __uint_as_float(words.z), v[3] = __uint_as_float(words.w);
    }
    static __device__ __forceinline__ uint4 round(const float (&v)[COUNT]) {
        return {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                __float_as_uint(v[3])};
    }
    static __device__ __forceinline__ float read_one(const void* row, long long at) {
        return static_cast<const float*>(row)[at];
    }
    static __device__ __forceinline__ void write_one(void* row, long long at, float v) {
        static_cast<float*>(row)[at] = v;
    }
};

// The address of a row that starts `values` of T after the first.
template <typename T>
__device__ __forceinline__ const void* row_at(const void* base, long long values) {
    return static_cast<const char*>(base) + values * Piece<T>::BYTES;
}
template <typename T>
__device__ __forceinline__ void* row_at(void* base, long long values) {
    return static_cast<char*>(base) + values * Piece<T>::BYTES;
}

// Values that many rows use again, stored as T or as f32.
template <typename T>
struct Repeated {
    static constexpr int COUNT = Piece<T>::COUNT;
    const void* base;
    bool wide;  // f32

    __device__ __forceinline__ void read(long long at, float (&v)[COUNT]) const {
        if (wide) {
            const float* first = static_cast<const float*>(base) + at;
            const float4* from = reinterpret_cast<const float4*>(first);
#pragma unroll
            for (int i = 0; i < COUNT / 4; ++i) {
                const float4 four = __ldg(from + i);
                v[4 * i] = four.x, v[4 * i + 1] = four.y;
                v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
            }
        } else {
            Piece<T>::read(__ldg(static_cast<const uint4*>(row_at<T>(base, at))), v);
        }
    }
    __device__ __forceinline__ float read_one(long long at) const {
        return wide ? static_cast<const float*>(base)[at] : Piece<T>::read_one(base, at);
    }
};

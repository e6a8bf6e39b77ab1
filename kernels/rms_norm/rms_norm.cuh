// out = [residual +] x * rsqrt(mean(x^2) + eps) * gain per row, and its gradient in x; gain is the
// weight or one plus the weight.
// Shapes    x, residual, out, dy, dx, normalized (rows, h) in one dtype of bf16/fp16/f32, row i at
//           (i / heads) * stride_row + (i % heads) * stride_head; weight (h) in that dtype or f32
// Requires  sm_80+. `_1`, `_2`, `_4` (pieces of 16 bytes per thread): all rows and the weight
//           16-byte aligned, h whole pieces, no more than the threads of a row hold; `_any`:
//           nothing. Checked in qlora_kit/ops/rms_norm/cuda.py
// Tile      one row per block, in registers from the sum to the result; short rows take 32 threads
//           or a smaller power of two each, many to a block. `_any` reads each row twice
// Numerics  f32, sums in a fixed order: repeatable; one final rounding. With the same launch shape
//           the backward's `normalized` has the bits of the forward's result
// Truth     qlora_kit/ops/rms_norm/reference.py
//
// Outputs may be inputs: a value is written by the thread that read it, after it was read, and rows
// are not read through the read-only cache.
#include "common/piece.cuh"

constexpr u32 ALL = 0xffffffffu;
constexpr int MOST_THREADS = 512;

// Which row a thread works on, and from which piece or value on.
struct Place {
    u32 width;  // threads per row: a power of two up to 32, or the block
    u32 first;
    long long row, head;
    bool inside;

    __device__ __forceinline__ Place(long long rows, long long heads, long long threads) {
        width = static_cast<u32>(threads);
        const u32 local = threadIdx.x / width;
        first = threadIdx.x - local * width;
        const u32 index = blockIdx.x * (blockDim.x / width) + local;
        inside = index < rows;
        const u32 of_head = static_cast<u32>(heads);
        row = index / of_head;
        head = index % of_head;
    }
    __device__ __forceinline__ long long at(long long stride_row, long long stride_head) const {
        return row * stride_row + head * stride_head;
    }
};

// What each column is multiplied by.
template <typename T>
struct Gain {
    Repeated<T> weight;
    bool offset;

    __device__ __forceinline__ void read(long long at, float (&v)[Piece<T>::COUNT]) const {
        weight.read(at, v);
        if (offset)
#pragma unroll
            for (int i = 0; i < Piece<T>::COUNT; ++i) v[i] = __fadd_rn(1.f, v[i]);
    }
    __device__ __forceinline__ float read_one(long long at) const {
        const float v = weight.read_one(at);
        return offset ? __fadd_rn(1.f, v) : v;
    }
};

// Adds up N sums over the threads of each row; every thread of the row gets the same bits.
template <int N>
__device__ __forceinline__ void add_up(float (&sums)[N], u32 width) {
    for (u32 step = (width < 32 ? width : 32) / 2; step; step /= 2)
#pragma unroll
        for (int i = 0; i < N; ++i)
            sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(ALL, sums[i], step));
    if (width <= 32) return;
    __shared__ float parts[N][32];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    if (lane == 0)
#pragma unroll
        for (int i = 0; i < N; ++i) parts[i][warp] = sums[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = lane < width / 32 ? parts[i][lane] : 0.f;
#pragma unroll
    for (int step = 16; step; step /= 2)
#pragma unroll
        for (int i = 0; i < N; ++i)
            sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(ALL, sums[i], step));
}

// One over the root of the mean square.
__device__ __forceinline__ float scale_of(float squares, long long h, float eps) {
    return __frsqrt_rn(__fadd_rn(__fdiv_rn(squares, static_cast<float>(h)), eps));
}

// One value of the result, and of the gradient: x * scale is the unit row.
__device__ __forceinline__ float normed(float x, float scale, float gain) {
    return __fmul_rn(__fmul_rn(x, scale), gain);
}
__device__ __forceinline__ float gradient(float x, float dy, float scale, float gain, float mean) {
    const float unit = __fmul_rn(x, scale);
    return __fmul_rn(scale, __fmaf_rn(-unit, mean, __fmul_rn(dy, gain)));
}

// A thread's pieces of one row, as they lie in memory; zeros past its end.
template <int PIECES>
__device__ __forceinline__ void load(uint4 (&words)[PIECES], const void* row, const Place& place,
                                     u32 pieces) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const u32 i = place.first + p * place.width;
        words[p] = {0, 0, 0, 0};
        if (place.inside && i < pieces) words[p] = __ldcs(static_cast<const uint4*>(row) + i);
    }
}

template <typename T, int PIECES>
__device__ __forceinline__ void forward(const void* x, const Gain<T>& gain, const void* residual,
                                        void* out, const Place& place, long long h, float eps) {
    constexpr int COUNT = Piece<T>::COUNT;
    const u32 pieces = static_cast<u32>(h) / COUNT;
    uint4 of_x[PIECES], of_residual[PIECES];
    load(of_x, x, place, pieces);
    if (residual) load(of_residual, residual, place, pieces);
    float sums[1] = {0.f}, v[COUNT];
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        Piece<T>::read(of_x[p], v);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) sums[0] = __fmaf_rn(v[i], v[i], sums[0]);
    }
    add_up(sums, place.width);
    const float scale = scale_of(sums[0], h, eps);
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const u32 piece = place.first + p * place.width;
        if (!place.inside || piece >= pieces) break;
        float factors[COUNT];
        gain.read(static_cast<long long>(piece) * COUNT, factors);
        Piece<T>::read(of_x[p], v);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) v[i] = normed(v[i], scale, factors[i]);
        if (residual) {
            Piece<T>::read(of_residual[p], factors);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) v[i] = __fadd_rn(factors[i], v[i]);
        }
        static_cast<uint4*>(out)[piece] = Piece<T>::round(v);
    }
}

template <typename T>
__device__ __forceinline__ void forward_any(const void* x, const Gain<T>& gain,
                                            const void* residual, void* out, const Place& place,
                                            long long h, float eps) {
    typedef Piece<T> P;
    const long long end = place.inside ? h : 0;
    float sums[1] = {0.f};
    for (long long i = place.first; i < end; i += place.width) {
        const float v = P::read_one(x, i);
        sums[0] = __fmaf_rn(v, v, sums[0]);
    }
    add_up(sums, place.width);
    const float scale = scale_of(sums[0], h, eps);
    for (long long i = place.first; i < end; i += place.width) {
        float v = normed(P::read_one(x, i), scale, gain.read_one(i));
        if (residual) v = __fadd_rn(P::read_one(residual, i), v);
        P::write_one(out, i, v);
    }
}

template <typename T, int PIECES>
__device__ __forceinline__ void backward(const void* dy, const void* x, const Gain<T>& gain,
                                         const void* residual, void* dx, void* normalized,
                                         const Place& place, long long h, float eps) {
    constexpr int COUNT = Piece<T>::COUNT;
    const u32 pieces = static_cast<u32>(h) / COUNT;
    uint4 of_x[PIECES], of_dy[PIECES], of_residual[PIECES];
    load(of_x, x, place, pieces);
    load(of_dy, dy, place, pieces);
    if (residual) load(of_residual, residual, place, pieces);
    float sums[2] = {0.f, 0.f}, v[COUNT], d[COUNT], factors[COUNT];
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const u32 piece = place.first + p * place.width;
        if (piece >= pieces) break;
        gain.read(static_cast<long long>(piece) * COUNT, factors);
        Piece<T>::read(of_x[p], v);
        Piece<T>::read(of_dy[p], d);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            sums[0] = __fmaf_rn(v[i], v[i], sums[0]);
            sums[1] = __fmaf_rn(__fmul_rn(d[i], factors[i]), v[i], sums[1]);
        }
    }
    add_up(sums, place.width);
    const float scale = scale_of(sums[0], h, eps);
    const float mean = __fmul_rn(__fdiv_rn(sums[1], static_cast<float>(h)), scale);
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        const u32 piece = place.first + p * place.width;
        if (!place.inside || piece >= pieces) break;
        gain.read(static_cast<long long>(piece) * COUNT, factors);
        Piece<T>::read(of_x[p], v);
        Piece<T>::read(of_dy[p], d);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            d[i] = gradient(v[i], d[i], scale, factors[i], mean);
            v[i] = normed(v[i], scale, factors[i]);
        }
        if (normalized) static_cast<uint4*>(normalized)[piece] = Piece<T>::round(v);
        if (residual) {
            Piece<T>::read(of_residual[p], v);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) d[i] = __fadd_rn(v[i], d[i]);
        }
        static_cast<uint4*>(dx)[piece] = Piece<T>::round(d);
    }
}

template <typename T>
__device__ __forceinline__ void backward_any(const void* dy, const void* x, const Gain<T>& gain,
                                             const void* residual, void* dx, void* normalized,
                                             const Place& place, long long h, float eps) {
    typedef Piece<T> P;
    const long long end = place.inside ? h : 0;
    float sums[2] = {0.f, 0.f};
    for (long long i = place.first; i < end; i += place.width) {
        const float v = P::read_one(x, i);
        sums[0] = __fmaf_rn(v, v, sums[0]);
        sums[1] = __fmaf_rn(__fmul_rn(P::read_one(dy, i), gain.read_one(i)), v, sums[1]);
    }
    add_up(sums, place.width);
    const float scale = scale_of(sums[0], h, eps);
    const float mean = __fmul_rn(__fdiv_rn(sums[1], static_cast<float>(h)), scale);
    for (long long i = place.first; i < end; i += place.width) {
        const float v = P::read_one(x, i), factor = gain.read_one(i);
        float d = gradient(v, P::read_one(dy, i), scale, factor, mean);
        if (residual) d = __fadd_rn(P::read_one(residual, i), d);
        if (normalized) P::write_one(normalized, i, normed(v, scale, factor));
        P::write_one(dx, i, d);
    }
}

// Arguments in the order of qlora_kit/ops/rms_norm/cuda.py.
#define RMS_NORM(NAME, T, KIND, FORWARD, BACKWARD)                                                \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) rms_norm_##NAME##_##KIND(          \
        const void* x, const void* residual, void* out, const void* weight, long long wide,       \
        long long offset, float eps, long long rows, long long heads, long long h,                \
        long long threads, long long x_row, long long x_head, long long residual_row,             \
        long long residual_head, long long out_row, long long out_head) {                         \
        const Place place(rows, heads, threads);                                                  \
        const Gain<T> gain{{weight, wide != 0}, offset != 0};                                     \
        if (residual) residual = row_at<T>(residual, place.at(residual_row, residual_head));      \
        FORWARD(row_at<T>(x, place.at(x_row, x_head)), gain, residual,                            \
                row_at<T>(out, place.at(out_row, out_head)), place, h, eps);                      \
    }                                                                                             \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) rms_norm_##NAME##_backward_##KIND( \
        const void* dy, const void* x, const void* residual, void* dx, void* normalized,          \
        const void* weight, long long wide, long long offset, float eps, long long rows,          \
        long long heads, long long h, long long threads, long long dy_row, long long dy_head,     \
        long long x_row, long long x_head, long long residual_row, long long residual_head,       \
        long long dx_row, long long dx_head, long long normalized_row,                            \
        long long normalized_head) {                                                              \
        const Place place(rows, heads, threads);                                                  \
        const Gain<T> gain{{weight, wide != 0}, offset != 0};                                     \
        if (residual) residual = row_at<T>(residual, place.at(residual_row, residual_head));      \
        if (normalized)                                                                           \
            normalized = row_at<T>(normalized, place.at(normalized_row, normalized_head));        \
        BACKWARD(row_at<T>(dy, place.at(dy_row, dy_head)), row_at<T>(x, place.at(x_row, x_head)), \
                 gain, residual, row_at<T>(dx, place.at(dx_row, dx_head)), normalized, place, h,  \
                 eps);                                                                            \
    }

#define RMS_NORM_ALL(NAME, T)                               \
    RMS_NORM(NAME, T, 1, (forward<T, 1>), (backward<T, 1>)) \
    RMS_NORM(NAME, T, 2, (forward<T, 2>), (backward<T, 2>)) \
    RMS_NORM(NAME, T, 4, (forward<T, 4>), (backward<T, 4>)) \
    RMS_NORM(NAME, T, any, (forward_any<T>), (backward_any<T>))

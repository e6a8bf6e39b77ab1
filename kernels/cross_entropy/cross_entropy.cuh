// Per row of logits: -log softmax(z)[target] with label smoothing, and its gradient over the row.
// Shapes    logits (rows, v) in bf16/fp16/f32, row i at i * stride, overwritten if `gradient`;
//           targets (rows) i64; losses (rows) f32, written; factor () f32 or null, on the gradient
// Rule      z = scale * raw, or cap * tanh(scale * raw / cap); the gradient is that of raw
// Requires  sm_80+, scale > 0, cap > 0, dynamic shared memory of kept * 16 bytes; checked in
//           qlora_kit/ops/cross_entropy/. Rows may start anywhere and have any length
// Tile      one row per block. The row is read once; its first `kept` pieces of 16 bytes wait in
//           shared memory until the sum is known, the rest is read again, newest first, from L2
// Numerics  f32: running maximum and sum per thread, merged in a fixed order: repeatable. One
//           rounding at the end. At the target p - 1 is expm1(log p): exact near p = 1
// Edges     a target equal to `ignore` gives zeros, one outside of [0, v) gives NaN; NaN in a row
//           reaches all of it, and nothing else
// Truth     qlora_kit/ops/cross_entropy/reference.py
// Idea      running maximum: arXiv:1805.02867
#include "common/piece.cuh"

constexpr u32 ALL = 0xffffffffu;
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;
constexpr int TOGETHER = 4;  // pieces a thread reads at once

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// 2^x with two units of error; results below the smallest normal number are zero.
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The larger value, or NaN if one of them is: of two halves of a word, or of two floats.
__device__ __forceinline__ u32 larger(u32 a, u32 b, BFloat16*) {
    u32 most;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}
__device__ __forceinline__ u32 larger(u32 a, u32 b, Float16*) {
    u32 most;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    return most;
}
__device__ __forceinline__ u32 larger(u32 a, u32 b, Float32*) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;"
        : "=f"(most)
        : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    return __float_as_uint(most);
}

template <typename T>
__device__ __forceinline__ float largest(u32 word) {
    const float low = T::read(static_cast<u16>(word)), high = T::read(static_cast<u16>(word >> 16));
    return low > high || low != low ? low : high;
}
template <>
__device__ __forceinline__ float largest<Float32>(u32 word) {
    return __uint_as_float(word);
}
template <typename T, int N>
__device__ __forceinline__ float largest(const uint4 (&words)[N]) {
    T* const kind = nullptr;
    u32 most = words[0].x;
#pragma unroll
    for (int p = 0; p < N; ++p) {
        const u32 low = larger(words[p].x, words[p].y, kind);
        most = larger(most, larger(low, larger(words[p].z, words[p].w, kind), kind), kind);
    }
    return largest<T>(most);
}

// Tanh and its slope for 16-bit inputs: an absolute error of 2^-23 in one, relative in the other.
template <typename T>
__device__ __forceinline__ float tanh_of(float x, float& slope) {
    const float small = power_of_2(-2.f * LOG2_E * fabsf(x));
    const float share = inverse(1.f + small);
    slope = 4.f * small * share * share;
    return copysignf((1.f - small) * share, x);
}
template <>
__device__ __forceinline__ float tanh_of<Float32>(float x, float& slope) {
    const float y = tanhf(x), small = power_of_2(-2.f * LOG2_E * fabsf(x));
    const float share = __frcp_rn(1.f + small);
    slope = 4.f * small * share * share;
    return y;
}

// What turns a raw value into the exponent of 2 that stands for its logit: `by` times the value,
// or times the hyperbolic tangent of `inner` times the value.
template <typename T, bool CAPPED>
struct Rule {
    float by, inner, scale;

    __device__ __forceinline__ Rule(float scale, float cap)
        : by((CAPPED ? cap : scale) * LOG2_E), inner(CAPPED ? scale / cap : 1.f), scale(scale) {}

    // The value to multiply with `by`, and how fast the logit grows with the raw value.
    __device__ __forceinline__ float bend(float raw, float& slope) const {
        slope = 1.f;
        return CAPPED ? tanh_of<T>(raw * inner, slope) : raw;
    }
    __device__ __forceinline__ float exponent(float raw) const {
        float slope;
        return by * bend(raw, slope);
    }
};

// Of the values seen so far: the largest and its exponent, the sum of 2^(exponent - shift), and
// the sum of the values, bent.
template <typename T, bool CAPPED>
struct Running {
    float top, shift, sum, total;

    __device__ __forceinline__ explicit Running(const Rule<T, CAPPED>& rule)
        : top(-infinity()), shift(rule.exponent(-infinity())), sum(0.f), total(0.f) {}

    __device__ __forceinline__ void raise(float largest, const Rule<T, CAPPED>& rule) {
        if (largest <= top) return;  // not so for NaN, which is let in
        const float before = shift;
        top = largest;
        shift = rule.exponent(top);
        sum *= power_of_2(before - shift);
    }
    // Values none of which is above `top`.
    template <int N>
    __device__ __forceinline__ void add(const float (&v)[N], const Rule<T, CAPPED>& rule) {
        // Nothing but -inf so far: -inf - -inf would be NaN.
        const float less = !CAPPED && top == -infinity() ? 0.f : shift;
        float ignored;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float bent = rule.bend(v[i], ignored);
            total += bent;
            sum += power_of_2(__fmaf_rn(bent, rule.by, -less));
        }
    }
    __device__ __forceinline__ void merge(const Running& other) {
        const Running& high = other.top > top ? other : *this;
        const float own = top == high.top ? 1.f : power_of_2(shift - high.shift);
        const float theirs = other.top == high.top ? 1.f : power_of_2(other.shift - high.shift);
        sum = __fadd_rn(__fmul_rn(sum, own), __fmul_rn(other.sum, theirs));
        total = __fadd_rn(total, other.total);
        const float new_top = high.top, new_shift = high.shift;
        top = new_top, shift = new_shift;
    }
};

// A row in memory: values before the first 16-byte boundary, whole pieces, values after them.
template <typename T>
struct Row {
    void* base;
    uint4* pieces;
    u32 head, whole, ends;  // values, pieces, values at both ends

    __device__ __forceinline__ Row(void* base, u32 v) : base(base) {
        constexpr u32 BYTES = Piece<T>::BYTES, COUNT = Piece<T>::COUNT;
        const u32 past = static_cast<u32>(reinterpret_cast<unsigned long long>(base) & 15);
        head = past ? (16 - past) / BYTES : 0;
        head = head < v ? head : v;
        whole = (v - head) / COUNT;
        ends = v - whole * COUNT;
        pieces = static_cast<uint4*>(row_at<T>(base, head));
    }
    // The index of one of the `ends`.
    __device__ __forceinline__ u32 end(u32 i) const {
        return i < head ? i : i + whole * Piece<T>::COUNT;
    }
};

// Adds pieces [first, last) of a row to a thread's sums; KEEP puts them into shared memory.
template <typename T, bool CAPPED, bool KEEP>
__device__ __forceinline__ void absorb(Running<T, CAPPED>& seen, const Rule<T, CAPPED>& rule,
                                       const uint4* row, u32 first, u32 last, uint4* shared) {
    float v[Piece<T>::COUNT];
    const u32 step = blockDim.x;
    u32 i = first + threadIdx.x;
    for (; i + (TOGETHER - 1) * step < last; i += TOGETHER * step) {
        uint4 words[TOGETHER];
#pragma unroll
        for (int p = 0; p < TOGETHER; ++p)
            words[p] = KEEP ? __ldcs(row + i + p * step) : row[i + p * step];
        seen.raise(largest<T>(words), rule);
#pragma unroll
        for (int p = 0; p < TOGETHER; ++p) {
            if (KEEP) shared[i + p * step] = words[p];
            Piece<T>::read(words[p], v);
            seen.add(v, rule);
        }
    }
    for (; i < last; i += step) {
        const uint4 words[1] = {KEEP ? __ldcs(row + i) : row[i]};
        if (KEEP) shared[i] = words[0];
        seen.raise(largest<T>(words), rule);
        Piece<T>::read(words[0], v);
        seen.add(v, rule);
    }
}

// Merges the sums of a block's threads; every thread gets the same bits.
template <typename T, bool CAPPED>
__device__ __forceinline__ void merge_block(Running<T, CAPPED>& seen) {
    __shared__ float parts[4][32];
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (u32 step = 16; step; step /= 2) {
            Running<T, CAPPED> other = seen;
            other.top = __shfl_xor_sync(ALL, seen.top, step);
            other.shift = __shfl_xor_sync(ALL, seen.shift, step);
            other.sum = __shfl_xor_sync(ALL, seen.sum, step);
            other.total = __shfl_xor_sync(ALL, seen.total, step);
            // The lower lane's comes first in both, so that both get the same bits.
            if (lane & step) {
                other.merge(seen);
                seen = other;
            } else {
                seen.merge(other);
            }
        }
        if (round) return;
        if (lane == 0) {
            parts[0][warp] = seen.top, parts[1][warp] = seen.shift;
            parts[2][warp] = seen.sum, parts[3][warp] = seen.total;
        }
        __syncthreads();
        const u32 from = lane < warps ? lane : 0;
        seen.top = parts[0][from], seen.shift = parts[1][from];
        seen.sum = lane < warps ? parts[2][from] : 0.f;
        seen.total = lane < warps ? parts[3][from] : 0.f;
    }
}

// What all of a row's gradients share: 2^(exponent - shift) * by - less, times the slope.
struct Gradient {
    float shift, by, less;

    template <typename T, bool CAPPED>
    __device__ __forceinline__ float of(float raw, const Rule<T, CAPPED>& rule) const {
        float slope;
        const float bent = rule.bend(raw, slope);
        const float value = __fmaf_rn(power_of_2(__fmaf_rn(bent, rule.by, -shift)), by, -less);
        return CAPPED ? value * slope : value;
    }
    template <typename T, bool CAPPED>
    __device__ __forceinline__ uint4 of(uint4 words, const Rule<T, CAPPED>& rule) const {
        float v[Piece<T>::COUNT];
        Piece<T>::read(words, v);
#pragma unroll
        for (int i = 0; i < Piece<T>::COUNT; ++i) v[i] = of(v[i], rule);
        return Piece<T>::round(v);
    }
};

template <typename T, bool CAPPED>
__device__ __forceinline__ void overwrite(const Row<T>& row, const Gradient& gradient,
                                          const Rule<T, CAPPED>& rule, u32 kept,
                                          const uint4* shared) {
    const u32 step = blockDim.x;
    u32 i = kept + threadIdx.x;
    for (; i + (TOGETHER - 1) * step < row.whole; i += TOGETHER * step) {
        uint4 words[TOGETHER];
#pragma unroll
        for (int p = 0; p < TOGETHER; ++p) words[p] = row.pieces[i + p * step];
#pragma unroll
        for (int p = 0; p < TOGETHER; ++p)
            __stcs(row.pieces + i + p * step, gradient.of(words[p], rule));
    }
    for (; i < row.whole; i += step) __stcs(row.pieces + i, gradient.of(row.pieces[i], rule));
    for (i = threadIdx.x; i < kept; i += step)
        __stcs(row.pieces + i, gradient.of(shared[i], rule));
    if (threadIdx.x < row.ends) {
        const u32 at = row.end(threadIdx.x);
        Piece<T>::write_one(row.base, at, gradient.of(Piece<T>::read_one(row.base, at), rule));
    }
}

template <typename T>
__device__ __forceinline__ void clear(const Row<T>& row) {
    for (u32 i = threadIdx.x; i < row.whole; i += blockDim.x)
        __stcs(row.pieces + i, make_uint4(0, 0, 0, 0));
    if (threadIdx.x < row.ends) Piece<T>::write_one(row.base, row.end(threadIdx.x), 0.f);
}

template <typename T, bool CAPPED>
__device__ __forceinline__ void cross_entropy(void* logits, const long long* targets,
                                              float* losses, const float* factor, u32 v,
                                              long long stride, long long ignore, bool gradient,
                                              float scale, float cap, float smoothing,
                                              u32 most_kept) {
    extern __shared__ uint4 shared[];
    const Row<T> row(row_at<T>(logits, blockIdx.x * stride), v);
    const long long target = targets[blockIdx.x];
    if (target == ignore) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
        if (gradient) clear(row);
        return;
    }
    const Rule<T, CAPPED> rule(scale, cap);
    const bool exists = target >= 0 && target < v;
    const float nan = __uint_as_float(0x7fffffffu);
    const float raw = exists ? Piece<T>::read_one(row.base, target) : nan;
    // Without a gradient as well: the order of a thread's sums, and so their bits, hang on it.
    const u32 kept = row.whole < most_kept ? row.whole : most_kept;

    Running<T, CAPPED> seen(rule);
    if (threadIdx.x < row.ends) {
        const float one[1] = {Piece<T>::read_one(row.base, row.end(threadIdx.x))};
        seen.raise(one[0], rule);
        seen.add(one, rule);
    }
    absorb<T, CAPPED, true>(seen, rule, row.pieces, 0, kept, shared);
    absorb<T, CAPPED, false>(seen, rule, row.pieces, kept, row.whole, shared);
    merge_block(seen);

    // In units of log 2: -log p of the target, and the mean of -log p.
    const float log_sum = log2f(seen.sum), each = smoothing / static_cast<float>(v);
    float slope;
    const float difference = log_sum - __fmaf_rn(rule.bend(raw, slope), rule.by, -seen.shift);
    const float hard = difference < 0.f ? 0.f : difference;  // not below by a rounding; NaN stays
    if (threadIdx.x == 0) {
        const float mean = log_sum + (seen.shift - rule.by * (seen.total / static_cast<float>(v)));
        const float mixed = smoothing == 0.f ? hard : (1.f - smoothing) * hard + smoothing * mean;
        losses[blockIdx.x] = mixed * LN_2;
    }
    if (!gradient) return;
    const float outer = (factor ? *factor : 1.f) * scale;
    const Gradient all{seen.shift, exists ? __fdiv_rn(outer, seen.sum) : nan, outer * each};
    overwrite(row, all, rule, kept, shared);
    __syncthreads();  // its own value replaces what the target's thread wrote
    if (threadIdx.x == 0 && exists) {
        const float at_target = expm1f(-hard * LN_2) + (smoothing - each);
        Piece<T>::write_one(row.base, target, outer * slope * at_target);
    }
}

// Arguments in the order of qlora_kit/ops/cross_entropy/cuda.py. The number at the end is how many
// blocks share a processor, which divides its registers.
#define CROSS_ENTROPY(NAME, T, KIND, CAPPED, THREADS, BLOCKS)                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                 \
        cross_entropy_##NAME##_##KIND##_##BLOCKS(                                                 \
            void* logits, const void* targets, void* losses, const void* factor, long long v,     \
            long long stride, long long ignore, long long gradient, float scale, float cap,       \
            float smoothing, long long kept) {                                                    \
        cross_entropy<T, CAPPED>(logits, static_cast<const long long*>(targets),                  \
                                 static_cast<float*>(losses), static_cast<const float*>(factor),  \
                                 static_cast<u32>(v), stride, ignore, gradient != 0, scale, cap,  \
                                 smoothing, static_cast<u32>(kept));                              \
    }

#define CROSS_ENTROPY_ALL(NAME, T)                \
    CROSS_ENTROPY(NAME, T, plain, false, 1024, 1) \
    CROSS_ENTROPY(NAME, T, plain, false, 512, 2)  \
    CROSS_ENTROPY(NAME, T, capped, true, 1024, 1) \
    CROSS_ENTROPY(NAME, T, capped, true, 512, 2)

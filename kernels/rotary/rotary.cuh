// Rotary position embeddings, in place or from elsewhere: (a, b) -> (a cos - b sin, b cos + a sin) for values j and
// j + half of each head, or the other way round.
// Shapes    values (tokens, heads, >= 2 half) bf16/fp16/f32, token m and head g at
//           m * stride_token + g * stride_head, source likewise by strides of its own; cos, sin (angles, >= half) in that dtype or f32,
//           row m % angles, their rows stride_cos and stride_sin apart
// Requires  sm_80+; `_pieces`: half whole pieces of 16 bytes, all rows 16-byte aligned; `_ones`:
//           nothing. Checked in qlora_kit/ops/rotary/cuda.py
// Tile      a thread turns a piece of the first half and its partner, or one pair. A block takes
//           `together` tokens or, where heads are many, a part of one
// Numerics  f32, one final rounding: repeatable
// Truth     qlora_kit/ops/rotary/reference.py
//
// Heads of a token read the same angles: neighbours in a block, so all but the first find them in
// the cache.
#include "common/piece.cuh"

template <typename T>
struct Turn {
    static constexpr int COUNT = Piece<T>::COUNT;
    const void* from_first;
    const void* from_second;
    void* first;
    void* second;
    Repeated<T> cos, sin;
    long long cos_at, sin_at;
    bool inverse;

    static __device__ __forceinline__ void turn(float& a, float& b, float c, float s) {
        const float turned = __fmaf_rn(a, c, -__fmul_rn(b, s));
        b = __fmaf_rn(b, c, __fmul_rn(a, s));
        a = turned;
    }
    __device__ __forceinline__ void pieces(u32 j) const {
        const uint4 words_a = __ldcs(static_cast<const uint4*>(from_first) + j);
        const uint4 words_b = __ldcs(static_cast<const uint4*>(from_second) + j);
        float a[COUNT], b[COUNT], c[COUNT], s[COUNT];
        cos.read(cos_at + static_cast<long long>(j) * COUNT, c);
        sin.read(sin_at + static_cast<long long>(j) * COUNT, s);
        Piece<T>::read(words_a, a);
        Piece<T>::read(words_b, b);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) turn(a[i], b[i], c[i], inverse ? -s[i] : s[i]);
        static_cast<uint4*>(first)[j] = Piece<T>::round(a);
        static_cast<uint4*>(second)[j] = Piece<T>::round(b);
    }
    __device__ __forceinline__ void one(u32 j) const {
        float a = Piece<T>::read_one(from_first, j), b = Piece<T>::read_one(from_second, j);
        const float s = sin.read_one(sin_at + j);
        turn(a, b, cos.read_one(cos_at + j), inverse ? -s : s);
        Piece<T>::write_one(first, j, a);
        Piece<T>::write_one(second, j, b);
    }
};

template <typename T, bool PIECES>
__device__ __forceinline__ void rotate(void* values, const void* source, const void* cos, const void* sin, bool wide,
                                       bool inverse, u32 tokens, u32 heads, u32 half, u32 angles,
                                       u32 together, long long stride_token, long long stride_head,
                                       long long source_token, long long source_head,
                                       long long stride_cos, long long stride_sin) {
    const u32 steps = PIECES ? half / Piece<T>::COUNT : half;
    const u32 of_token = heads * steps;
    const u32 item = blockIdx.y * blockDim.x + threadIdx.x;
    const u32 local = item / of_token;
    const u32 token = blockIdx.x * together + local;
    if (local >= together || token >= tokens) return;
    const u32 rest = item - local * of_token;
    const u32 head = rest / steps, j = rest - head * steps, angle = token % angles;
    void* row = row_at<T>(values, token * stride_token + head * stride_head);
    const void* from = row_at<T>(source, token * source_token + head * source_head);
    const Turn<T> turn{from,
                       row_at<T>(from, half),
                       row,
                       row_at<T>(row, half),
                       {cos, wide},
                       {sin, wide},
                       angle * stride_cos,
                       angle * stride_sin,
                       inverse};
    if constexpr (PIECES)
        turn.pieces(j);
    else
        turn.one(j);
}

// Arguments in the order of qlora_kit/ops/rotary/cuda.py.
#define ROTARY(NAME, T, KIND, PIECES)                                                           \
    extern "C" __global__ void __launch_bounds__(256) rotary_##NAME##_##KIND(                   \
        void* values, const void* source, const void* cos, const void* sin, long long wide,     \
        long long inverse, long long tokens, long long heads, long long half, long long angles, \
        long long together, long long stride_token, long long stride_head,                      \
        long long source_token, long long source_head, long long stride_cos,                    \
        long long stride_sin) {                                                                 \
        rotate<T, PIECES>(values, source, cos, sin, wide != 0, inverse != 0,                    \
                          static_cast<u32>(tokens), static_cast<u32>(heads),                    \
                          static_cast<u32>(half), static_cast<u32>(angles),                     \
                          static_cast<u32>(together), stride_token, stride_head, source_token,  \
                          source_head, stride_cos, stride_sin);                                 \
    }

#define ROTARY_ALL(NAME, T)       \
    ROTARY(NAME, T, pieces, true) \
    ROTARY(NAME, T, ones, false)

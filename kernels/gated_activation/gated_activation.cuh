// act(gate) * up, and its gradients in gate and up; act is silu or gelu, by tanh or by erf.
// Shapes    gate_up, d_gate_up (rows, 2 f) = [gate | up]; out, dact, act (rows, f); all in one
//           dtype of bf16/fp16/f32, rows any distance apart
// Requires  sm_80+; `_pieces`: f whole pieces of 16 bytes, all rows 16-byte aligned; `_ones`:
//           nothing. Checked in qlora_kit/ops/gated_activation/cuda.py
// Tile      a thread takes a piece of gate and its partner in up, or one value of each. A block
//           takes `together` rows or, where they are long, a part of one
// Numerics  f32 with expf and erff of full precision, one final rounding: repeatable
// Truth     qlora_kit/ops/gated_activation/reference.py
//
// Outputs may be inputs: a thread reads its values of all inputs before it writes.
#include "common/piece.cuh"

constexpr float HALF_ROOT = 0.70710678118654752440f;  // sqrt(1/2)
constexpr float DENSITY = 0.39894228040143267794f;    // 1/sqrt(2 pi)
constexpr float TWICE = 1.59576912160573071176f;      // 2 sqrt(2/pi)
constexpr float CUBIC = 0.044715f;

// 1 / (1 + e^-v): exact at both ends, for the reciprocal of infinity is zero.
__device__ __forceinline__ float sigmoid(float v) {
    return __frcp_rn(__fadd_rn(1.f, expf(-v)));
}

// act(gate) = gate * share(gate), and the derivative of act. 1 - sigmoid(v) is sigmoid(v) * e^-v,
// but the difference is as good here: it is multiplied by sigmoid(v).
struct Silu {
    static __device__ __forceinline__ float share(float g) { return sigmoid(g); }
    static __device__ __forceinline__ float slope(float g, float s) {
        return __fmul_rn(s, __fmaf_rn(g, __fadd_rn(1.f, -s), 1.f));
    }
};

// (1 + tanh z) / 2 = sigmoid(2 z): no cancellation where g is negative.
struct GeluTanh {
    static __device__ __forceinline__ float share(float g) {
        return sigmoid(__fmul_rn(__fmul_rn(TWICE, g), __fmaf_rn(CUBIC, __fmul_rn(g, g), 1.f)));
    }
    static __device__ __forceinline__ float slope(float g, float s) {
        const float inner = __fmul_rn(TWICE, __fmaf_rn(3.f * CUBIC, __fmul_rn(g, g), 1.f));
        return __fmaf_rn(__fmul_rn(g, s), __fmul_rn(__fadd_rn(1.f, -s), inner), s);
    }
};

struct Gelu {
    static __device__ __forceinline__ float share(float g) {
        return __fmul_rn(0.5f, __fadd_rn(1.f, erff(__fmul_rn(g, HALF_ROOT))));
    }
    static __device__ __forceinline__ float slope(float g, float s) {
        return __fmaf_rn(g, __fmul_rn(DENSITY, expf(__fmul_rn(-0.5f * g, g))), s);
    }
};

// Which row and which piece or value of it a thread takes.
struct Item {
    u32 row, at;
    bool inside;

    __device__ __forceinline__ Item(u32 rows, u32 steps, u32 together) {
        const u32 item = blockIdx.y * blockDim.x + threadIdx.x;
        const u32 local = item / steps;
        row = blockIdx.x * together + local;
        at = item - local * steps;
        inside = local < together && row < rows;
    }
};

template <typename T, typename ACT, bool PIECES>
__device__ __forceinline__ void forward(const void* gate_up, void* out, u32 rows, u32 f,
                                        u32 together, long long gate_up_row, long long out_row) {
    typedef Piece<T> P;
    const Item item(rows, PIECES ? f / P::COUNT : f, together);
    if (!item.inside) return;
    const void* gate = row_at<T>(gate_up, item.row * gate_up_row);
    const void* up = row_at<T>(gate, f);
    out = row_at<T>(out, item.row * out_row);
    if constexpr (PIECES) {
        const uint4 of_gate = __ldcs(static_cast<const uint4*>(gate) + item.at);
        const uint4 of_up = __ldcs(static_cast<const uint4*>(up) + item.at);
        float g[P::COUNT], u[P::COUNT];
        P::read(of_gate, g);
        P::read(of_up, u);
#pragma unroll
        for (int i = 0; i < P::COUNT; ++i)
            g[i] = __fmul_rn(__fmul_rn(g[i], ACT::share(g[i])), u[i]);
        static_cast<uint4*>(out)[item.at] = P::round(g);
    } else {
        const float g = P::read_one(gate, item.at), u = P::read_one(up, item.at);
        P::write_one(out, item.at, __fmul_rn(__fmul_rn(g, ACT::share(g)), u));
    }
}

// Gradients and the forward's result for one pair of values, in the place of the pair and of d.
template <typename ACT>
__device__ __forceinline__ void differentiate(float& g, float& u, float& d) {
    const float share = ACT::share(g), slope = ACT::slope(g, share), value = __fmul_rn(g, share);
    const float d_gate = __fmul_rn(__fmul_rn(d, u), slope), d_up = __fmul_rn(d, value);
    d = __fmul_rn(value, u);
    g = d_gate;
    u = d_up;
}

template <typename T, typename ACT, bool PIECES>
__device__ __forceinline__ void backward(const void* dact, const void* gate_up, void* d_gate_up,
                                         void* act, u32 rows, u32 f, u32 together,
                                         long long dact_row, long long gate_up_row,
                                         long long d_gate_up_row, long long act_row) {
    typedef Piece<T> P;
    const Item item(rows, PIECES ? f / P::COUNT : f, together);
    if (!item.inside) return;
    dact = row_at<T>(dact, item.row * dact_row);
    const void* gate = row_at<T>(gate_up, item.row * gate_up_row);
    const void* up = row_at<T>(gate, f);
    void* d_gate = row_at<T>(d_gate_up, item.row * d_gate_up_row);
    void* d_up = row_at<T>(d_gate, f);
    if (act) act = row_at<T>(act, item.row * act_row);
    if constexpr (PIECES) {
        const uint4 of_gate = __ldcs(static_cast<const uint4*>(gate) + item.at);
        const uint4 of_up = __ldcs(static_cast<const uint4*>(up) + item.at);
        const uint4 of_dact = __ldcs(static_cast<const uint4*>(dact) + item.at);
        float g[P::COUNT], u[P::COUNT], d[P::COUNT];
        P::read(of_gate, g);
        P::read(of_up, u);
        P::read(of_dact, d);
#pragma unroll
        for (int i = 0; i < P::COUNT; ++i) differentiate<ACT>(g[i], u[i], d[i]);
        static_cast<uint4*>(d_gate)[item.at] = P::round(g);
        static_cast<uint4*>(d_up)[item.at] = P::round(u);
        if (act) static_cast<uint4*>(act)[item.at] = P::round(d);
    } else {
        float g = P::read_one(gate, item.at), u = P::read_one(up, item.at);
        float d = P::read_one(dact, item.at);
        differentiate<ACT>(g, u, d);
        P::write_one(d_gate, item.at, g);
        P::write_one(d_up, item.at, u);
        if (act) P::write_one(act, item.at, d);
    }
}

// Arguments in the order of qlora_kit/ops/gated_activation/cuda.py.
#define GATED_ACTIVATION(NAME, T, ACT_NAME, ACT, KIND, PIECES)                                 \
    extern "C" __global__ void __launch_bounds__(256)                                          \
        gated_activation_##NAME##_##ACT_NAME##_##KIND(                                         \
            const void* gate_up, void* out, long long rows, long long f, long long together,   \
            long long gate_up_row, long long out_row) {                                        \
        forward<T, ACT, PIECES>(gate_up, out, static_cast<u32>(rows), static_cast<u32>(f),     \
                                static_cast<u32>(together), gate_up_row, out_row);             \
    }                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                          \
        gated_activation_##NAME##_backward_##ACT_NAME##_##KIND(                                \
            const void* dact, const void* gate_up, void* d_gate_up, void* act, long long rows, \
            long long f, long long together, long long dact_row, long long gate_up_row,        \
            long long d_gate_up_row, long long act_row) {                                      \
        backward<T, ACT, PIECES>(dact, gate_up, d_gate_up, act, static_cast<u32>(rows),        \
                                 static_cast<u32>(f), static_cast<u32>(together), dact_row,    \
                                 gate_up_row, d_gate_up_row, act_row);                         \
    }

#define GATED_ACTIVATION_BOTH(NAME, T, ACT_NAME, ACT)      \
    GATED_ACTIVATION(NAME, T, ACT_NAME, ACT, pieces, true) \
    GATED_ACTIVATION(NAME, T, ACT_NAME, ACT, ones, false)

#define GATED_ACTIVATION_ALL(NAME, T)                   \
    GATED_ACTIVATION_BOTH(NAME, T, silu, Silu)          \
    GATED_ACTIVATION_BOTH(NAME, T, gelu_tanh, GeluTanh) \
    GATED_ACTIVATION_BOTH(NAME, T, gelu, Gelu)

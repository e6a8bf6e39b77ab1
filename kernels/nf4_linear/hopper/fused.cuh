// Hopper's fused product: Y = X W^T + XA B^T + bias, and its transpose dX = dY W + dYB A, from the
// 4-bit bytes of W, each in one pass over the result.
// Shapes    activations (M,C) | packed (N*K/2) u8 | small (M,r) | factor (N,r) or (r,K) | out (M,R)
//           C, the contraction, is K and R, the result's columns, is N; in the transpose N and K
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_90a, K % 256 == 0, N % 8 == 0, r % 8 == 0, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/hopper.py
// Tile      256 columns of the result x TOKENS rows of the activations per block, 64 of the
//           contraction per stage. W is wgmma's register operand, the activations its shared one.
//           Warpgroup 0 brings tiles in with the copy engine and decodes the nested scales; each
//           other warpgroup decodes weights of 128 columns while its last product runs. For few
//           tokens there are four of them, two sharing each stage, to hide the look-ups.
//           Blocks of a cluster share the contraction; their sums meet in shared memory.
// Decode    one look-up per byte: 256 pairs of f32 in shared memory, once per lane (no conflicts);
//           a permute makes the address, two products, one rounding: 2.5 instructions per weight
// Transpose a byte holds two neighbours along K, which are rows of the result there: rows of a
//           tile may come in any order, so each byte feeds two rows; ldmatrix.trans hands them out
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      register-fed wgmma with swapped operands: Machete (vLLM), quack
#pragma once
#include "common/convert.cuh"
#include "common/hopper.cuh"
#include "common/nf4.cuh"

constexpr int COLUMNS = 256;  // of the result, per block
constexpr int DEPTH = 64;     // of the contraction, per stage: one block of scales
constexpr int QUAD = 4;  // stages whose scales are read at once: four bytes of a row

constexpr int TABLE_BYTES = 256 * 32 * 8;
constexpr int PACKED_BYTES = COLUMNS * DEPTH / 2;
constexpr int MAP_BYTES = 1024;
constexpr int PITCH = COLUMNS + 4;  // floats per token when sums meet: no bank conflicts

template <int TOKENS>
struct Stage {
    u8 activations[TOKENS * DEPTH * 2];
    u8 packed[PACKED_BYTES];
    float scales[COLUMNS];
};

// One matrix product as the blocks see it.
struct Problem {
    const u8* packed;
    NF4Scales scales;
    const u16* bias;    // null without
    const u16* factor;  // null without LoRA
    u16* out;
    int m, n, k, rank;
};

__device__ __forceinline__ float2 look_up(u32 table, u32 word, u32 lane_offset, u32 selector) {
    u32 offset;
    float2 pair;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(offset) : "r"(word), "r"(lane_offset), "r"(selector));
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(table + offset));
    return pair;
}

// Entry b: the values of byte b's high and low nibble, at lane's own pair of banks.
template <int CONSUMERS>
__device__ __forceinline__ void fill_table(float4* table, int consumer) {
    constexpr int EACH = 16 * 256 / CONSUMERS;
    const int thread = consumer % 256, part = consumer / 256;
    const float low = NF4_VALUES[thread >> 4];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const float high = NF4_VALUES[part * EACH + i];
        table[(part * EACH + i) * 256 + thread] = {high, low, high, low};
    }
}

// The decoded weights of one product: two tiles of 64 columns of the result, 16 of contraction.
struct Fragments {
    u32 a[2][4];

    __device__ __forceinline__ void keep_all() {
#pragma unroll
        for (int i = 0; i < 8; ++i) keep(a[i / 4][i % 4]);
    }
};

// What the table gave for one product, before scaling.
typedef float2 Pairs[8];

// Y = X W^T: contraction along a row of W. A thread's row j of four is
// 32 warp + 16 (j / 2) + 8 (j % 2) + g; its byte for columns 2q, 2q+1 is byte q of a word.
template <typename T>
struct Forward {
    static constexpr bool TRANSPOSED = false;
    u32 words[2][4][4];
    float scale[4];
    u32 selector;
    int row, swap;

    __device__ __forceinline__ Forward(int consumer, int lane) {
        const int g = lane / 4;
        row = (consumer / 32) * 32 + g;
        selector = 0x5504u | ((lane % 4) << 4);
        swap = (g >> 2) & 1;  // how the copy engine permuted the 32 bytes of this row
    }
    static __device__ __forceinline__ int column(int consumer, int g, int tile, int half) {
        return (consumer / 32) * 32 + 16 * tile + 8 * half + g;
    }
    // The bytes of half a stage: 32 of the contraction.
    template <int BUFFER>
    __device__ __forceinline__ void load(const u8* packed, int half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u8* from = packed + (row + 8 * j) * 32 + ((half ^ swap) * 16);
            *reinterpret_cast<uint4*>(words[BUFFER][j]) = *reinterpret_cast<const uint4*>(from);
        }
    }
    __device__ __forceinline__ void load_scales(const float* scales) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scale[j] = scales[row + 8 * j];
    }
    // The first or second product of the half in a buffer.
    template <int BUFFER, int WHICH>
    __device__ __forceinline__ void look_up_pairs(Pairs& pairs, u32 table,
                                                  u32 lane_offset) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pairs[i] =
                look_up(table, words[BUFFER][i / 2][2 * WHICH + i % 2], lane_offset, selector);
    }
    __device__ __forceinline__ void round(Fragments& f, const Pairs& pairs, const float*,
                                          int) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int j = i / 2;
            f.a[j / 2][2 * (i % 2) + (j & 1)] =
                T::pack(__fmul_rn(pairs[i].x, scale[j]), __fmul_rn(pairs[i].y, scale[j]));
        }
    }
    // 16 columns of B (N, r) from `column` of r on.
    static __device__ __forceinline__ void low_rank(Fragments& f, const Problem& p, int first,
                                                    int consumer, int lane, int column) {
        const int g = lane / 4, q = lane % 4;
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const long long n = first + Forward::column(consumer, g, j / 2, j & 1);
                const int r = column + 2 * q + 8 * part;
                const bool inside = n < p.n && r < p.rank;
                f.a[j / 2][2 * part + (j & 1)] =
                    inside ? *reinterpret_cast<const u32*>(p.factor + n * p.rank + r) : 0u;
            }
    }
};

// dX = dY W: contraction down the rows of W. ldmatrix.trans gives a thread, for rows 2q and 2q+1,
// the two bytes at 2g: columns 4g .. 4g+3 of the result.
template <typename T>
struct Backward {
    static constexpr bool TRANSPOSED = true;
    u32 words[2][4];
    u32 address;
    int scale_row;

    __device__ __forceinline__ Backward(int consumer, int lane) {
        const u32 piece = consumer / 32;  // which 16 of a row's 128 bytes
        address = lane * 128 + ((piece ^ (lane & 7)) * 16);
        scale_row = (consumer / 64) * DEPTH + 2 * (lane % 4);
    }
    static __device__ __forceinline__ int column(int consumer, int g, int tile, int half) {
        return (consumer / 32) * 32 + 4 * g + 2 * tile + half;
    }
    template <int BUFFER>
    __device__ __forceinline__ void load(const u8* packed, int half) {
        u32* to = words[BUFFER];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(packed) + address + half * 32 * 128)
                     : "memory");
    }
    __device__ __forceinline__ void load_scales(const float*) {}
    template <int BUFFER, int WHICH>
    __device__ __forceinline__ void look_up_pairs(Pairs& pairs, u32 table,
                                                  u32 lane_offset) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pairs[i] = look_up(table, words[BUFFER][2 * WHICH + i / 4], lane_offset,
                               0x5504u + 0x10u * (i % 4));
    }
    // Pair i is byte i % 4: of row 2q for 0 and 1, of row 2q + 1 for 2 and 3.
    __device__ __forceinline__ void round(Fragments& f, const Pairs& pairs, const float* scales,
                                          int step) const {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const float2 scale =
                *reinterpret_cast<const float2*>(scales + scale_row + 16 * step + 8 * part);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                const float2 v = pairs[4 * part + tile], w = pairs[4 * part + tile + 2];
                f.a[tile][2 * part] = T::pack(__fmul_rn(v.x, scale.x), __fmul_rn(w.x, scale.y));
                f.a[tile][2 * part + 1] =
                    T::pack(__fmul_rn(v.y, scale.x), __fmul_rn(w.y, scale.y));
            }
        }
    }
    // 16 rows of A (r, K) from `column` of r on.
    static __device__ __forceinline__ void low_rank(Fragments& f, const Problem& p, int first,
                                                    int consumer, int lane, int column) {
        const int g = lane / 4, q = lane % 4;
        const long long k = first + Backward::column(consumer, g, 0, 0);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int r = column + 2 * q + 8 * part;
            const bool inside = k < p.k && r < p.rank;
            const u16* from = p.factor + r * static_cast<long long>(p.k) + k;
            const uint2 v = inside ? *reinterpret_cast<const uint2*>(from) : uint2{0, 0};
            const uint2 w = inside ? *reinterpret_cast<const uint2*>(from + p.k) : uint2{0, 0};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u32 pick = half ? 0x7632u : 0x5410u;
                f.a[0][2 * part + half] = __byte_perm(v.x, w.x, pick);
                f.a[1][2 * part + half] = __byte_perm(v.y, w.y, pick);
            }
        }
    }
};

// What memory holds for the scales of four stages, and which of them a thread decodes. Forward: of
// rows t and t + 128, a byte for each stage. Transposed: of row t / 2 of each stage, two bytes.
template <bool TRANSPOSED>
struct StoredScales {
    static constexpr int ROWS = TRANSPOSED ? QUAD : 2;
    u32 codes[ROWS];
    float group[ROWS];

    static __device__ __forceinline__ int row(int first, int depth, int i) {
        const int t = threadIdx.x;
        return TRANSPOSED ? depth + DEPTH * i + t / 2 : first + t + 128 * i;
    }
    static __device__ __forceinline__ int block(int first, int depth) {
        return TRANSPOSED ? first / DEPTH + threadIdx.x % 2 * 2 : depth / DEPTH;
    }
    __device__ __forceinline__ void load(const Problem& p, int first, int depth) {
        const int blocks = p.k / DEPTH, column = block(first, depth);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int n = row(first, depth, i);
            const u32 at = static_cast<u32>(n) * blocks + column;
            const u8* from = static_cast<const u8*>(p.scales.absmax) + at;
            const bool inside = n < p.n && column < blocks && p.scales.nested != nullptr;
            codes[i] = 0;
            if (inside)
                codes[i] = TRANSPOSED ? __ldg(reinterpret_cast<const u16*>(from))
                                      : __ldg(reinterpret_cast<const u32*>(from));
            group[i] = inside ? __ldg(p.scales.nested + at / 256) : 0.f;
        }
    }
    // Scales without a nest are read only now.
    static __device__ __forceinline__ float plain(const Problem& p, int n, int column) {
        const int blocks = p.k / DEPTH;
        if (n >= p.n || column >= blocks) return 0.f;
        return __ldg(static_cast<const float*>(p.scales.absmax) + static_cast<u32>(n) * blocks +
                     column);
    }
    // The two scales of stage s: (row t, row t + 128), or (block, block + 1) of row t / 2.
    __device__ __forceinline__ void store(float* scales, const Problem& p, float mean,
                                          const float* map, int first, int depth, int s) const {
        const int t = threadIdx.x;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int i = TRANSPOSED ? s : h, byte = TRANSPOSED ? h : s;
            const u32 code = (codes[i] >> (8 * byte)) & 255;
            const float scale =
                p.scales.nested != nullptr
                    ? __fadd_rn(__fmul_rn(map[code], group[i]), mean)
                    : plain(p, row(first, depth, i), block(first, depth) + byte);
            scales[TRANSPOSED ? (t % 2 * 2 + h) * DEPTH + t / 2 : t + 128 * h] = scale;
        }
    }
};

// What a block brings in: its tile, and its share of the contraction.
struct Work {
    int first, token, begin, steps, low_rank_steps;
};

template <bool TRANSPOSED, int TOKENS>
__device__ __forceinline__ void bring_tiles(const TensorMap& activations, const TensorMap& packed,
                                            const TensorMap& small, const Work& w,
                                            Stage<TOKENS>& stage, Barrier& full, int step) {
    const int depth = (w.begin + step) * DEPTH;
    if (step < w.steps) {
        full.arrive_expecting(TOKENS * DEPTH * 2 + PACKED_BYTES);
        if (TRANSPOSED)
            copy_box(stage.packed, packed, depth, w.first / 2, full);
        else
            copy_box(stage.packed, packed, w.first, depth / 2, full);
        copy_box(stage.activations, activations, w.token, depth, full);
    } else {
        if (step == w.steps) wait_for_previous_kernel();  // which made `small`
        full.arrive_expecting(TOKENS * DEPTH * 2);
        copy_box(stage.activations, small, w.token, (step - w.steps) * DEPTH, full);
    }
}

// Warpgroup 0: one thread keeps the copy engine busy, all of them decode two scales a stage.
template <bool TRANSPOSED, int TOKENS, int STAGES>
__device__ __forceinline__ void produce(const TensorMap& activations, const TensorMap& packed,
                                        const TensorMap& small, const Problem& p, const Work& w,
                                        Stage<TOKENS>* stages, Barrier* full, Barrier* empty,
                                        float* map) {
    const int t = threadIdx.x, total = w.steps + w.low_rank_steps;
    const int at_once = min(STAGES, w.steps);
    if (t == 0)
        for (int step = 0; step < at_once; ++step)
            bring_tiles<TRANSPOSED>(activations, packed, small, w, stages[step], full[step], step);
    StoredScales<TRANSPOSED> now, next;
    now.load(p, w.first, w.begin * DEPTH);
    map[t] = DYNAMIC_MAP_VALUES[t];
    map[t + 128] = DYNAMIC_MAP_VALUES[t + 128];
    const float mean = p.scales.mean();
    sync_threads<2, 128>();
    for (int base = 0; base < total; base += QUAD) {
        const int depth = (w.begin + base) * DEPTH;
        if (base + QUAD < w.steps) next.load(p, w.first, depth + QUAD * DEPTH);
#pragma unroll
        for (int s = 0; s < QUAD; ++s) {
            const int step = base + s, slot = step % STAGES;
            if (step >= total) break;
            empty[slot].wait(((step / STAGES) & 1) ^ 1);
            if (t == 0 && step >= at_once)
                bring_tiles<TRANSPOSED>(activations, packed, small, w, stages[slot], full[slot],
                                        step);
            now.store(stages[slot].scales, p, mean, map, w.first, depth, s);
            __syncwarp();
            if (t % 32 == 0) full[slot].arrive();
        }
        now = next;
    }
}

template <typename T, typename Way, int TOKENS, int STAGES, int GROUPS>
struct Consumer {
    static constexpr int PARTS = GROUPS / 2;  // warpgroups that share a stage
    static constexpr int PRODUCTS = 4 / PARTS;
    static constexpr int THREADS = 128 * GROUPS;
    float c[2][TOKENS / 2];
    Fragments f[2];
    Pairs pairs[PARTS == 1 ? 2 : 1];  // with two warpgroups to a stage, warps hide the look-ups
    Way way;
    const u32 table, lane_offset;
    const int consumer, part, lane;

    __device__ __forceinline__ Consumer(u32 table)
        : way((threadIdx.x - 128) % 256, threadIdx.x % 32),
          table(table),
          lane_offset(threadIdx.x % 32 * 8),
          consumer((threadIdx.x - 128) % 256),
          part((threadIdx.x - 128) / 256),
          lane(threadIdx.x % 32) {}

    template <int BUFFER, int WHICH>
    __device__ __forceinline__ void look_up(Pairs& to) {
        way.template look_up_pairs<BUFFER, WHICH>(to, table, lane_offset);
    }

    __device__ __forceinline__ void multiply(int which, u64 b) {
        wgmma_fence();
        Wgmma<T, TOKENS>::run(c[0], f[which].a[0], b);
        Wgmma<T, TOKENS>::run(c[1], f[which].a[1], b);
        wgmma_commit();
        wgmma_wait<1>();
        f[which ^ 1].keep_all();
    }

    // Rounds and multiplies product s of this warpgroup, whose table entries have arrived, and
    // looks the following one up: the entries of the half in BUFFER, its first or second product.
    template <int BUFFER, int WHICH>
    __device__ __forceinline__ void product(const Stage<TOKENS>& stage, u64 b, int s) {
        const int step = PARTS == 1 ? s : 2 * part + s;
        if (PARTS == 1) look_up<BUFFER, WHICH>(pairs[(s + 1) % (3 - PARTS)]);
        way.round(f[s & 1], pairs[s % (3 - PARTS)], stage.scales, step);
        if (PARTS == 2) look_up<BUFFER, WHICH>(pairs[0]);
        multiply(s & 1, b + 2 * step);
    }

    // While a product runs, the next one's weights are rounded and those after it looked up.
    __device__ __forceinline__ void run(const Problem& p, const Work& w, Stage<TOKENS>* stages,
                                        Barrier* full, Barrier* empty) {
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) c[i & 1][i / 2] = 0.f;
        int waiting = -1;  // the stage to give back once its products are done
        if (w.steps > 0) {
            full[0].wait(0);
            way.template load<0>(stages[0].packed, PARTS == 1 ? 0 : part);
            look_up<0, 0>(pairs[0]);
        }
#pragma unroll 1
        for (int step = 0; step < w.steps; ++step) {
            const int slot = step % STAGES, after = (step + 1) % STAGES;
            const Stage<TOKENS>& stage = stages[slot];
            const u64 b = tile_descriptor(stage.activations);
            if (PARTS == 1) way.template load<1>(stage.packed, 1);
            way.load_scales(stage.scales);

            product<0, 1>(stage, b, 0);
            if (waiting >= 0 && lane == 0) empty[waiting].arrive();
            if (PARTS == 1) product<1, 0>(stage, b, 1);
            if (step + 1 < w.steps) full[after].wait(((step + 1) / STAGES) & 1);
            way.template load<0>(stages[after].packed, PARTS == 1 ? 0 : part);
            if (PARTS == 1) product<1, 1>(stage, b, 2);
            product<0, 0>(stage, b, PRODUCTS - 1);
            waiting = slot;
        }
        wgmma_wait<0>();
        f[0].keep_all();
        f[1].keep_all();
#pragma unroll 1
        for (int step = 0; step < w.low_rank_steps; ++step) {
            const int slot = (w.steps + step) % STAGES;
            full[slot].wait(((w.steps + step) / STAGES) & 1);
            const u64 b = tile_descriptor(stages[slot].activations);
#pragma unroll
            for (int i = 0; i < PRODUCTS; ++i) {
                const int s = PARTS == 1 ? i : 2 * part + i;
                Fragments e;
                Way::low_rank(e, p, w.first, consumer, lane, step * DEPTH + 16 * s);
                wgmma_fence();
                Wgmma<T, TOKENS>::run(c[0], e.a[0], b + 2 * s);
                Wgmma<T, TOKENS>::run(c[1], e.a[1], b + 2 * s);
                wgmma_commit();
                wgmma_wait<0>();
                e.keep_all();
            }
            if (waiting >= 0 && lane == 0) empty[waiting].arrive();
            waiting = slot;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) keep(c[i & 1][i / 2]);
    }

    // Sums to shared memory as [part][token][column].
    __device__ __forceinline__ void store(float* sums) {
        const int g = lane / 4, q = lane % 4;
        sums += part * TOKENS * PITCH;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float* to = sums + (8 * j + 2 * q + i) * PITCH;
#pragma unroll
                for (int tile = 0; tile < 2; ++tile)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        to[Way::column(consumer, g, tile, h)] = c[tile][4 * j + 2 * h + i];
            }
    }

    // This block's share of the tokens: the cluster's sums in order, bias, one rounding.
    __device__ __forceinline__ void write_out(const Problem& p, const float* sums, const Work& w,
                                              int columns, u32 rank, u32 ranks) {
        const int share = (TOKENS + ranks - 1) / ranks, first_row = rank * share;
        const int rows = min(min(share, TOKENS - first_row), p.m - w.token - first_row);
        for (int i = threadIdx.x - 128; i < rows * (COLUMNS / 8); i += THREADS) {
            const int row = first_row + i / (COLUMNS / 8), column = (i % (COLUMNS / 8)) * 8;
            if (w.first + column >= columns) continue;
            float v[8] = {};
            if (p.bias != nullptr)
#pragma unroll
                for (int e = 0; e < 8; ++e) v[e] = T::read(p.bias[w.first + column + e]);
#pragma unroll
            for (u32 r = 0; r < 8; ++r) {
                if (r >= ranks) break;
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const float* own =
                            sums + (part * TOKENS + row) * PITCH + column + 4 * h;
                        const float4 add = ranks == 1 ? *reinterpret_cast<const float4*>(own)
                                                      : read_peer(shared_address(own), r);
                        v[4 * h] += add.x;
                        v[4 * h + 1] += add.y;
                        v[4 * h + 2] += add.z;
                        v[4 * h + 3] += add.w;
                    }
            }
            const uint4 packed = {T::pack(v[0], v[1]), T::pack(v[2], v[3]),
                                  T::pack(v[4], v[5]), T::pack(v[6], v[7])};
            u16* to = p.out + static_cast<long long>(w.token + row) * columns + w.first + column;
            *reinterpret_cast<uint4*>(to) = packed;
        }
    }
};

template <typename T, typename Way, int TOKENS, int STAGES, int GROUPS>
__device__ __forceinline__ void fused(const TensorMap& activations, const TensorMap& packed,
                                      const TensorMap& small, const Problem& p) {
    typedef Consumer<T, Way, TOKENS, STAGES, GROUPS> Consumers;
    extern __shared__ __align__(1024) u8 memory[];
    float4* table = reinterpret_cast<float4*>(memory);
    Stage<TOKENS>* stages = reinterpret_cast<Stage<TOKENS>*>(memory + TABLE_BYTES);
    u8* after = memory + TABLE_BYTES + STAGES * sizeof(Stage<TOKENS>);
    float* map = reinterpret_cast<float*>(after);
    Barrier* full = reinterpret_cast<Barrier*>(after + MAP_BYTES);
    Barrier* empty = full + STAGES;
    float* sums = reinterpret_cast<float*>(stages);  // once the stages have done their work
    static_assert(STAGES * sizeof(Stage<TOKENS>) >= Consumers::PARTS * TOKENS * PITCH * 4,
                  "sums need the room");

    const u32 rank = cluster_rank(), ranks = cluster_size();
    const int contraction = Way::TRANSPOSED ? p.n : p.k, columns = Way::TRANSPOSED ? p.k : p.n;
    // Tiles in groups of eight along the tokens: neighbours in time share both operands.
    const int rows = (columns + COLUMNS - 1) / COLUMNS, tokens = (p.m + TOKENS - 1) / TOKENS;
    const int tile = blockIdx.x / ranks, group = tile / (8 * rows);
    const int width = min(8, tokens - 8 * group), inside = tile - group * 8 * rows;
    const int token = (8 * group + inside % width) * TOKENS, first = inside / width * COLUMNS;
    // This block's share of the contraction; the last also adds the low-rank product.
    const int all = (contraction + DEPTH - 1) / DEPTH, quads = (all + QUAD - 1) / QUAD;
    const int begin = QUAD * static_cast<int>(quads * rank / ranks);
    const int end = min(all, QUAD * static_cast<int>(quads * (rank + 1) / ranks));
    const bool adds = p.factor != nullptr && rank == ranks - 1;
    const Work work{first, token, begin, end - begin, adds ? (p.rank + DEPTH - 1) / DEPTH : 0};

    if (threadIdx.x == 0) {
        prefetch_map(activations);
        prefetch_map(packed);
        for (int s = 0; s < STAGES; ++s) {
            full[s].init(5);  // the tiles', and one per warp that decodes scales
            empty[s].init(4 * GROUPS);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<56>();
        produce<Way::TRANSPOSED, TOKENS, STAGES>(activations, packed, small, p, work, stages, full,
                                                 empty, map);
        if (ranks > 1) {
            sync_cluster();
            sync_cluster();
        }
    } else {
        take_registers<GROUPS == 2 ? 224 : 104>();
        fill_table<Consumers::THREADS>(table, threadIdx.x - 128);
        sync_threads<1, Consumers::THREADS>();
        Consumers consumer(shared_address(table));
        consumer.run(p, work, stages, full, empty);
        sync_threads<1, Consumers::THREADS>();  // every stage has been read
        consumer.store(sums);
        if (ranks > 1)
            sync_cluster();
        else
            sync_threads<1, Consumers::THREADS>();
        consumer.write_out(p, sums, work, columns, rank, ranks);
        if (ranks > 1) sync_cluster();  // nobody leaves while its sums are being read
    }
}

#define FUSED(NAME, T, WAY, TOKENS, STAGES, GROUPS)                                               \
    extern "C" __global__ void __launch_bounds__(128 + 128 * GROUPS, 1)                           \
        NAME(const __grid_constant__ TensorMap activations,                                       \
             const __grid_constant__ TensorMap packed_map,                                        \
             const __grid_constant__ TensorMap small, const u8* packed, const void* absmax,       \
             const float* nested, const float* offset, const u16* bias, const u16* factor,        \
             u16* out, long long m, long long n, long long k, long long rank) {                   \
        const Problem p{packed,                                                                   \
                        NF4Scales{absmax, nested, offset, 6},                                     \
                        bias,                                                                     \
                        factor,                                                                   \
                        out,                                                                      \
                        static_cast<int>(m),                                                      \
                        static_cast<int>(n),                                                      \
                        static_cast<int>(k),                                                      \
                        static_cast<int>(rank)};                                                  \
        fused<T, WAY<T>, TOKENS, STAGES, GROUPS>(activations, packed_map, small, p);              \
    }

// One source file for each dtype and TOKENS: a call compiles only what it needs.
#define NF4_FUSED(T, TOKENS, STAGES, GROUPS)                                                      \
    FUSED(nf4_fused, T, Forward, TOKENS, STAGES, GROUPS)                                          \
    FUSED(nf4_fused_transposed, T, Backward, TOKENS, STAGES, GROUPS)

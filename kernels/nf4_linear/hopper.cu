// Hopper's fused product: Y = X W^T + XA B^T + bias, and its transpose dX = dY W + dYB A, from the
// 4-bit bytes of W, each in one pass over the result.
// Shapes    activations (M,C) | packed (N*K/2) u8 | small (M,r) | factor (N,r) or (r,K) | out (M,R)
//           C, the contraction, is K and R, the result's columns, is N; in the transpose N and K
// Format    qlora_kit/quant/nf4.py and double_quant.py, block size 64
// Requires  sm_90a, K % 256 == 0, N % 8 == 0, r % 8 == 0, 16-byte alignment; checked in
//           qlora_kit/ops/nf4_linear/hopper.py
// Tile      256 columns of the result x TOKENS rows of the activations per block, 64 of the
//           contraction per stage. W is wgmma's register operand, the activations its shared one.
//           Warpgroup 0 brings tiles in with the copy engine (warp 0) and decodes scales (1-3);
//           warpgroups 1 and 2 decode 128 x 64 weights a stage while the last product runs.
//           Blocks of a cluster share the contraction; their sums meet in shared memory.
// Decode    one look-up per byte: 256 pairs of f32 in shared memory, once per lane (no conflicts);
//           a permute makes the address, two products, one rounding: 2.5 instructions per weight
// Transpose a byte holds two neighbours along K, which are rows of the result there: rows of a
//           tile may come in any order, so each byte feeds two rows; ldmatrix.trans hands them out
// Numerics  W rounded to the compute dtype as everywhere, f32 accumulate, fixed order: repeatable
// Truth     qlora_kit/ops/nf4_linear/reference.py
// Idea      register-fed wgmma with swapped operands: Machete (vLLM), quack
#include "common/convert.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/nf4.cuh"

constexpr int COLUMNS = 256;  // of the result, per block
constexpr int DEPTH = 64;     // of the contraction, per stage: one block of scales
constexpr int CONSUMERS = 256;
constexpr int THREADS = 384;
constexpr int QUAD = 4;  // stages whose scales a warp reads at once: four bytes of a row
constexpr int SCALE_WARPS = 3;

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
__device__ __forceinline__ void fill_table(float4* table, int thread) {
    const float low = NF4_VALUES[thread >> 4];
#pragma unroll
    for (int high = 0; high < 16; ++high)
        table[high * 256 + thread] = {NF4_VALUES[high], low, NF4_VALUES[high], low};
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
    __device__ __forceinline__ void load(const u8* packed, int half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u8* from = packed + (row + 8 * j) * 32 + ((half ^ swap) * 16);
            *reinterpret_cast<uint4*>(words[half][j]) = *reinterpret_cast<const uint4*>(from);
        }
    }
    __device__ __forceinline__ void load_scales(const float* scales) {
#pragma unroll
        for (int j = 0; j < 4; ++j) scale[j] = scales[row + 8 * j];
    }
    // Product `step` of four in a stage.
    __device__ __forceinline__ void look_up_pairs(Pairs& pairs, u32 table, u32 lane_offset,
                                                  int step) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pairs[i] = look_up(table, words[step / 2][i / 2][2 * (step % 2) + i % 2], lane_offset,
                               selector);
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
    __device__ __forceinline__ void load(const u8* packed, int half) {
        u32* to = words[half];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(packed) + address + half * 32 * 128)
                     : "memory");
    }
    __device__ __forceinline__ void load_scales(const float*) {}
    __device__ __forceinline__ void look_up_pairs(Pairs& pairs, u32 table, u32 lane_offset,
                                                  int step) const {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            pairs[i] = look_up(table, words[step / 2][2 * (step % 2) + i / 4], lane_offset,
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

// One thread of warp 0 keeps the copy engine busy.
template <bool TRANSPOSED, int TOKENS, int STAGES>
__device__ __forceinline__ void bring_tiles(const TensorMap& activations, const TensorMap& packed,
                                            const TensorMap& small, Stage<TOKENS>* stages,
                                            Barrier* full, Barrier* empty, int first, int token,
                                            int begin, int steps, int low_rank_steps) {
    for (int step = 0; step < steps + low_rank_steps; ++step) {
        const int slot = step % STAGES, depth = (begin + step) * DEPTH;
        Stage<TOKENS>& stage = stages[slot];
        empty[slot].wait(((step / STAGES) & 1) ^ 1);
        if (step < steps) {
            full[slot].arrive_expecting(TOKENS * DEPTH * 2 + PACKED_BYTES);
            if (TRANSPOSED)
                copy_box(stage.packed, packed, depth, first / 2, full[slot]);
            else
                copy_box(stage.packed, packed, first, depth / 2, full[slot]);
            copy_box(stage.activations, activations, token, depth, full[slot]);
        } else {
            if (step == steps) wait_for_previous_kernel();  // which made `small`
            full[slot].arrive();  // in the place of the scales
            full[slot].arrive_expecting(TOKENS * DEPTH * 2);
            copy_box(stage.activations, small, token, (step - steps) * DEPTH, full[slot]);
        }
    }
}

// What memory holds for the scales of four stages: a lane's eight rows of W, four blocks each.
// Forward, row e is `first` + lane + 32 e and the blocks belong to the four stages; transposed, the
// rows belong to the stages, two to each, and the blocks are the four along this tile's columns.
template <bool TRANSPOSED>
struct StoredScales {
    u32 codes[8];
    float group[8];

    static __device__ __forceinline__ int row(int first, int depth, int lane, int e) {
        return (TRANSPOSED ? depth : first) + lane + 32 * e;
    }
    __device__ __forceinline__ void load(const Problem& p, int first, int depth, int lane) {
        const int blocks = p.k / DEPTH, block = (TRANSPOSED ? first : depth) / DEPTH;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int n = row(first, depth, lane, e);
            const u32 at = static_cast<u32>(n) * blocks + block;
            const bool inside = n < p.n && block < blocks && p.scales.nested != nullptr;
            codes[e] = inside ? __ldg(reinterpret_cast<const u32*>(p.scales.absmax) + at / 4) : 0;
            group[e] = inside ? __ldg(p.scales.nested + at / 256) : 0.f;
        }
    }
    // Block b of row e.
    __device__ __forceinline__ float decode(float mean, const float* map, int e, int b) const {
        return __fadd_rn(__fmul_rn(map[(codes[e] >> (8 * b)) & 255], group[e]), mean);
    }
};

// A plain scale: forward, of row `first` + i at `depth`; transposed, of row `depth` + i % 64.
template <bool TRANSPOSED>
__device__ __forceinline__ float plain_scale(const Problem& p, int first, int depth, int i) {
    const int blocks = p.k / DEPTH;
    const int n = TRANSPOSED ? depth + i % DEPTH : first + i;
    const int block = TRANSPOSED ? first / DEPTH + i / DEPTH : depth / DEPTH;
    if (n >= p.n || block >= blocks) return 0.f;
    return __ldg(static_cast<const float*>(p.scales.absmax) + static_cast<u32>(n) * blocks +
                 block);
}

// Warps 1 to 3 decode the scales of four stages in turn.
template <bool TRANSPOSED, int TOKENS, int STAGES>
__device__ __forceinline__ void bring_scales(const Problem& p, Stage<TOKENS>* stages,
                                             Barrier* full, Barrier* empty, float* map, int first,
                                             int begin, int steps) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32 - 1;
    StoredScales<TRANSPOSED> now, next;
    now.load(p, first, (begin + QUAD * warp) * DEPTH, lane);
    for (int i = threadIdx.x - 32; i < 256; i += 32 * SCALE_WARPS) map[i] = DYNAMIC_MAP_VALUES[i];
    const float mean = p.scales.mean();
    sync_threads<2, 32 * SCALE_WARPS>();
    for (int base = QUAD * warp; base < steps; base += QUAD * SCALE_WARPS) {
        const int depth = (begin + base) * DEPTH;
        if (base + QUAD * SCALE_WARPS < steps)
            next.load(p, first, depth + QUAD * SCALE_WARPS * DEPTH, lane);
#pragma unroll
        for (int s = 0; s < QUAD; ++s) {
            const int step = base + s, slot = step % STAGES;
            if (step >= steps) break;
            float* to = stages[slot].scales + lane;
            empty[slot].wait(((step / STAGES) & 1) ^ 1);
            if (p.scales.nested != nullptr) {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    to[32 * i] = TRANSPOSED ? now.decode(mean, map, 2 * s + i % 2, i / 2)
                                            : now.decode(mean, map, i, s);
            } else {
#pragma unroll 1
                for (int i = 0; i < 8; ++i)
                    to[32 * i] =
                        plain_scale<TRANSPOSED>(p, first, depth + s * DEPTH, lane + 32 * i);
            }
            __syncwarp();
            if (lane == 0) full[slot].arrive();
        }
        now = next;
    }
}

template <typename T, typename Way, int TOKENS, int STAGES>
struct Consumer {
    float c[2][TOKENS / 2];
    Fragments f[2];

    __device__ __forceinline__ void multiply(int which, u64 b) {
        wgmma_fence();
        Wgmma<T, TOKENS>::run(c[0], f[which].a[0], b);
        Wgmma<T, TOKENS>::run(c[1], f[which].a[1], b);
        wgmma_commit();
        wgmma_wait<1>();
        f[which ^ 1].keep_all();
    }

    // While a product runs, the next one's weights are rounded and those after it looked up.
    __device__ __forceinline__ void run(const Problem& p, Stage<TOKENS>* stages, Barrier* full,
                                        Barrier* empty, u32 table, int first, int steps,
                                        int low_rank_steps) {
        const int consumer = threadIdx.x - 128, lane = threadIdx.x & 31;
        const u32 lane_offset = lane * 8;
        Way way(consumer, lane);
        Pairs pairs[2];
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) c[i & 1][i / 2] = 0.f;
        int waiting = -1;  // the stage to give back once its products are done
        if (steps > 0) {
            full[0].wait(0);
            way.load(stages[0].packed, 0);
            way.look_up_pairs(pairs[0], table, lane_offset, 0);
        }
        for (int step = 0; step < steps; ++step) {
            const int slot = step % STAGES, after = (step + 1) % STAGES;
            const Stage<TOKENS>& stage = stages[slot];
            const u64 b = tile_descriptor(stage.activations);
            way.load(stage.packed, 1);
            way.load_scales(stage.scales);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                if (s == 2) {
                    if (step + 1 < steps) full[after].wait(((step + 1) / STAGES) & 1);
                    way.load(stages[after].packed, 0);
                }
                way.look_up_pairs(pairs[(s + 1) & 1], table, lane_offset, (s + 1) % 4);
                way.round(f[s & 1], pairs[s & 1], stage.scales, s);
                multiply(s & 1, b + 2 * s);
                if (s == 0 && waiting >= 0 && lane == 0) empty[waiting].arrive();
            }
            waiting = slot;
        }
        for (int step = 0; step < low_rank_steps; ++step) {
            const int slot = (steps + step) % STAGES;
            full[slot].wait(((steps + step) / STAGES) & 1);
            const u64 b = tile_descriptor(stages[slot].activations);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                Way::low_rank(f[s & 1], p, first, consumer, lane, step * DEPTH + 16 * s);
                multiply(s & 1, b + 2 * s);
                if (s == 0 && waiting >= 0 && lane == 0) empty[waiting].arrive();
            }
            waiting = slot;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) keep(c[i & 1][i / 2]);
    }

    // Sums to shared memory as [token][column].
    __device__ __forceinline__ void store(float* sums) {
        const int consumer = threadIdx.x - 128, lane = threadIdx.x & 31;
        const int g = lane / 4, q = lane % 4;
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
};

// This block's share of the tokens: the cluster's sums, in order of rank, bias, one rounding.
template <typename T, int TOKENS>
__device__ __forceinline__ void write_out(const Problem& p, const float* sums, int first,
                                          int columns, int token, u32 rank, u32 ranks) {
    const int share = TOKENS / ranks;
    for (int i = threadIdx.x; i < share * (COLUMNS / 8); i += THREADS) {
        const int row = rank * share + i / (COLUMNS / 8), column = (i % (COLUMNS / 8)) * 8;
        if (token + row >= p.m || first + column >= columns) continue;
        float v[8] = {};
        if (p.bias != nullptr)
#pragma unroll
            for (int e = 0; e < 8; ++e) v[e] = T::read(p.bias[first + column + e]);
        const float* own = sums + row * PITCH + column;
        for (u32 r = 0; r < ranks; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float4 part = ranks == 1
                                        ? *reinterpret_cast<const float4*>(own + 4 * h)
                                        : read_peer(shared_address(own + 4 * h), r);
                v[4 * h] += part.x;
                v[4 * h + 1] += part.y;
                v[4 * h + 2] += part.z;
                v[4 * h + 3] += part.w;
            }
        const uint4 packed = {T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]),
                              T::pack(v[6], v[7])};
        u16* to = p.out + static_cast<long long>(token + row) * columns + first + column;
        *reinterpret_cast<uint4*>(to) = packed;
    }
}

template <typename T, typename Way, int TOKENS, int STAGES>
__device__ __forceinline__ void fused(const TensorMap& activations, const TensorMap& packed,
                                      const TensorMap& small, const Problem& p) {
    extern __shared__ __align__(1024) u8 memory[];
    float4* table = reinterpret_cast<float4*>(memory);
    Stage<TOKENS>* stages = reinterpret_cast<Stage<TOKENS>*>(memory + TABLE_BYTES);
    u8* after = memory + TABLE_BYTES + STAGES * sizeof(Stage<TOKENS>);
    float* map = reinterpret_cast<float*>(after);
    Barrier* full = reinterpret_cast<Barrier*>(after + MAP_BYTES);
    Barrier* empty = full + STAGES;
    float* sums = reinterpret_cast<float*>(stages);  // once the stages have done their work
    static_assert(STAGES * sizeof(Stage<TOKENS>) >= TOKENS * PITCH * 4, "sums need the room");

    const u32 rank = cluster_rank(), ranks = cluster_size();
    const int contraction = Way::TRANSPOSED ? p.n : p.k, columns = Way::TRANSPOSED ? p.k : p.n;
    // Tiles in groups of eight along the tokens: neighbours in time share both operands.
    const int rows = (columns + COLUMNS - 1) / COLUMNS, tokens = (p.m + TOKENS - 1) / TOKENS;
    const int tile = blockIdx.x / ranks, group = tile / (8 * rows);
    const int width = min(8, tokens - 8 * group), inside = tile - group * 8 * rows;
    const int token = (8 * group + inside % width) * TOKENS, first = inside / width * COLUMNS;
    // This block's share of the contraction; the last also adds the low-rank product.
    const int all = (contraction + DEPTH - 1) / DEPTH;
    const int quads = (all + QUAD - 1) / QUAD;
    const int begin = QUAD * static_cast<int>(quads * rank / ranks);
    const int end = min(all, QUAD * static_cast<int>(quads * (rank + 1) / ranks));
    const int low_rank_steps =
        p.factor != nullptr && rank == ranks - 1 ? (p.rank + DEPTH - 1) / DEPTH : 0;

    if (threadIdx.x == 0) {
        prefetch_map(activations);
        prefetch_map(packed);
        for (int s = 0; s < STAGES; ++s) {
            full[s].init(2);  // the tiles' and the scales'
            empty[s].init(CONSUMERS / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<72>();
        if (threadIdx.x == 0)
            bring_tiles<Way::TRANSPOSED, TOKENS, STAGES>(activations, packed, small, stages, full,
                                                         empty, first, token, begin, end - begin,
                                                         low_rank_steps);
        else if (threadIdx.x >= 32)
            bring_scales<Way::TRANSPOSED, TOKENS, STAGES>(p, stages, full, empty, map, first,
                                                          begin, end - begin);
    } else {
        take_registers<216>();
        fill_table(table, threadIdx.x - 128);
        sync_threads<1, CONSUMERS>();
        Consumer<T, Way, TOKENS, STAGES> consumer;
        consumer.run(p, stages, full, empty, shared_address(table), first, end - begin,
                     low_rank_steps);
        sync_threads<1, CONSUMERS>();  // every stage has been read
        consumer.store(sums);
    }
    if (ranks == 1)
        __syncthreads();
    else
        sync_cluster();
    write_out<T, TOKENS>(p, sums, first, columns, token, rank, ranks);
    if (ranks > 1) sync_cluster();  // nobody leaves while its sums are being read
}

constexpr int SMALL = 16;  // tokens and ranks per block of the low-rank product
constexpr int SMALL_WARPS = 8;

// small (M, r) = scale * activations (M, C) F, with F = factor^T of A (r, C) or factor B (C, r).
// A cluster's warps share the contraction, 32 a step each; a thread takes 8 neighbours of a row on
// both sides, which is the same permutation of the sum's order for both operands of mma.
template <typename T, bool TRANSPOSED>
__device__ __forceinline__ void low_rank_product(const u16* x, const u16* factor, u16* small,
                                                 int m, int contraction, int rank, float scale) {
    __shared__ float sums[SMALL_WARPS + 1][SMALL][SMALL + 4];
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    const u32 block = cluster_rank(), blocks = cluster_size();
    const int token = blockIdx.x / blocks * SMALL, first = blockIdx.y * SMALL;
    launch_next_kernel();
    float c[2][4] = {};
    const int stride = 32 * SMALL_WARPS * blocks;
#pragma unroll 2
    for (int k = 32 * (warp + SMALL_WARPS * block) + 8 * q; k < contraction; k += stride) {
        uint4 a[2], b[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const long long row = token + g + 8 * h;
            a[h] = row < m ? __ldg(reinterpret_cast<const uint4*>(x + row * contraction + k))
                           : uint4{0, 0, 0, 0};
            const long long r = first + g + 8 * h;
            if (!TRANSPOSED) {
                b[h] = r < rank ? __ldg(reinterpret_cast<const uint4*>(factor + r * contraction + k))
                                : uint4{0, 0, 0, 0};
            } else {
                u32 column[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    column[i] = r < rank ? __ldg(factor + (k + i) * static_cast<long long>(rank) + r)
                                         : u16(0);
                b[h] = {column[0] | column[1] << 16, column[2] | column[3] << 16,
                        column[4] | column[5] << 16, column[6] | column[7] << 16};
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Mma::run<T>(c[h], {a[0].x, a[1].x, a[0].y, a[1].y}, b[h].x, b[h].y);
            Mma::run<T>(c[h], {a[0].z, a[1].z, a[0].w, a[1].w}, b[h].z, b[h].w);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[warp][g + 8 * (i / 2)][8 * h + 2 * q + i % 2] = c[h][i];
    __syncthreads();
    const int row = threadIdx.x / SMALL, column = threadIdx.x % SMALL;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < SMALL_WARPS; ++w) sum += sums[w][row][column];
    float& own = sums[SMALL_WARPS][row][column];
    own = sum;
    sync_cluster();
    if (block == 0) {
        for (u32 r = 1; r < blocks; ++r) sum += read_peer_one(shared_address(&own), r);
        if (token + row < m && first + column < rank)
            small[static_cast<long long>(token + row) * rank + first + column] =
                static_cast<u16>(T::pack(sum * scale, 0.f));
    }
    sync_cluster();  // nobody leaves while its sums are being read
}

#define LOW_RANK(NAME, T, TRANSPOSED)                                                             \
    extern "C" __global__ void __launch_bounds__(32 * SMALL_WARPS)                                \
        NAME(const u16* x, const u16* factor, u16* small, long long m, long long contraction,     \
             long long rank, float scale) {                                                       \
        low_rank_product<T, TRANSPOSED>(x, factor, small, static_cast<int>(m),                    \
                                        static_cast<int>(contraction), static_cast<int>(rank),    \
                                        scale);                                                   \
    }

#define FUSED(NAME, T, WAY, TOKENS, STAGES)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                      \
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
        fused<T, WAY<T>, TOKENS, STAGES>(activations, packed_map, small, p);                      \
    }

// TOKENS and STAGES as in qlora_kit/ops/nf4_linear/hopper.py.
#define FUSED_BOTH(NAME, T, TOKENS, STAGES)                                                       \
    FUSED(nf4_hopper_##NAME##_##TOKENS, T, Forward, TOKENS, STAGES)                               \
    FUSED(nf4_hopper_transposed_##NAME##_##TOKENS, T, Backward, TOKENS, STAGES)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
LOW_RANK(nf4_hopper_low_rank_bfloat16, BFloat16, false)
LOW_RANK(nf4_hopper_low_rank_transposed_bfloat16, BFloat16, true)
LOW_RANK(nf4_hopper_low_rank_float16, Float16, false)
LOW_RANK(nf4_hopper_low_rank_transposed_float16, Float16, true)
FUSED_BOTH(bfloat16, BFloat16, 8, 12)
FUSED_BOTH(bfloat16, BFloat16, 16, 12)
FUSED_BOTH(bfloat16, BFloat16, 32, 10)
FUSED_BOTH(bfloat16, BFloat16, 64, 8)
FUSED_BOTH(bfloat16, BFloat16, 128, 6)
FUSED_BOTH(float16, Float16, 8, 12)
FUSED_BOTH(float16, Float16, 16, 12)
FUSED_BOTH(float16, Float16, 32, 10)
FUSED_BOTH(float16, Float16, 64, 8)
FUSED_BOTH(float16, Float16, 128, 6)
#endif

// Decoding NF4 in a kernel: a table without bank conflicts, and the nested scales.
// NF4_VALUES and DYNAMIC_MAP_VALUES are generated from qlora_kit/quant and put before this file.
#pragma once

// The 16 values once per lane: entry e of lane l lies in bank l, so a warp's 32 look-ups, whatever
// their indices, take one cycle. Random indices into one shared copy would collide.
struct NF4Table {
    float values[16][32];

    // All threads of the block call this, then synchronize.
    __device__ __forceinline__ void fill(int thread, int threads) {
        for (int i = thread; i < 16 * 32; i += threads) values[i / 32][i % 32] = NF4_VALUES[i / 32];
    }

    // Value of nibble i (0..7) of a word, in storage order: the high nibble of each byte first.
    __device__ __forceinline__ float at(u32 word, int i, int lane) const {
        const int bit = (i / 2) * 8 + ((i & 1) ? 0 : 4);
        const u32 row = (bit >= 7 ? word >> (bit - 7) : word << (7 - bit)) & 0x780u;  // index x 128
        const char* base = reinterpret_cast<const char*>(values);
        return *reinterpret_cast<const float*>(base + (row | (lane * 4)));
    }

    // Values of byte `byte` (0..3) of a word, in storage order.
    __device__ __forceinline__ float2 pair(u32 word, int byte, int lane) const {
        return {at(word, 2 * byte, lane), at(word, 2 * byte + 1, lane)};
    }
};

// Both values of a byte in one look-up: 256 entries of two floats. Half the look-ups and address
// arithmetic of NF4Table for a larger table, so for kernels whose blocks live long.
// A 64-bit read is served half a warp at a time: 16 copies (32 KB) already keep the banks apart.
// With 32 copies (64 KB) the entries are 256 bytes apart, and one PRMT makes the address: the byte
// in bits 8 to 15, the lane's copy below.
template <int COPIES>
struct NF4PairTable {
    static_assert(COPIES == 16 || COPIES == 32, "entries are 128 or 256 bytes apart");
    float4 entries[256][COPIES / 2];  // high nibble, low nibble, and the same again

    // All threads of the block call this, then synchronize.
    __device__ __forceinline__ void fill(int thread, int threads) {
        float4* to = &entries[0][0];
        for (int i = thread; i < 256 * COPIES / 2; i += threads) {
            const int byte = i / (COPIES / 2);
            const float high = NF4_VALUES[byte >> 4], low = NF4_VALUES[byte & 15];
            to[i] = {high, low, high, low};
        }
    }

    // Values of byte `byte` (0..3) of a word, in storage order.
    __device__ __forceinline__ float2 pair(u32 word, int byte, int lane) const {
        const u32 copy = (lane & (COPIES - 1)) * 8;
        u32 at;
        if constexpr (COPIES == 32) {
            at = __byte_perm(word, copy, 0x5504 | byte << 4);
        } else {
            const int bit = byte * 8;
            at = ((bit >= 7 ? word >> (bit - 7) : word << (7 - bit)) & 0x7f80u) | copy;
        }
        return *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(entries) + at);
    }
};

struct NF4Scales {
    const void* absmax;   // codes (nested) or float32 scales
    const float* nested;  // per 256 blocks; null without double quantization
    const float* offset;
    int block_shift;  // log2 of the block size

    // What memory holds for the block of a weight, to be decoded once it has arrived.
    struct Stored {
        float group;  // the group's scale, or the scale itself without double quantization
        u8 code;
    };

    __device__ __forceinline__ Stored load(long long weight) const {
        return load_block(weight >> block_shift);
    }

    __device__ __forceinline__ Stored load_block(long long block) const {
        if (nested == nullptr) return {__ldg(static_cast<const float*>(absmax) + block), 0};
        return {__ldg(nested + (block >> 8)), __ldg(static_cast<const u8*>(absmax) + block)};
    }

    // Two roundings, product then sum, as the format says. `mean` is *offset, read once.
    __device__ __forceinline__ float decode(Stored stored, float mean, const float* map) const {
        if (nested == nullptr) return stored.group;
        return __fadd_rn(__fmul_rn(map[stored.code], stored.group), mean);
    }

    __device__ __forceinline__ float mean() const {
        return nested == nullptr ? 0.f : __ldg(offset);
    }
};

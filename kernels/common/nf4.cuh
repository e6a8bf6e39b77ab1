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

// out[i] = table[ids[i]]: rows of any dtype as bytes, from the GPU's memory or from the host's.
// Shapes    table (rows, pieces) of 16 bytes each, row i at i * stride pieces; ids (count,) int64;
//           out (count, pieces)
// Requires  sm_80+, addresses and rows whole pieces of 16 bytes, a table that the GPU can read (its
//           own memory, or page-locked host memory at the same address); checked in
//           qlora_kit/ops/gather_rows/cuda.py, which sends all else to torch
// Tile      4 KiB of a row per warp, 8 pieces a lane in flight: a read from host memory takes
//           microseconds, so that a link is full only with many under way; warps stride over parts
// Numerics  none: bits are copied. A row whose id is not in [0, rows) is not read: all of its bits
//           become ones, which is NaN in every floating dtype
// Truth     qlora_kit/ops/gather_rows/reference.py
constexpr int WARPS = 8;
constexpr int AHEAD = 8;
constexpr int PART = 32 * AHEAD;

extern "C" __global__ void __launch_bounds__(WARPS * 32, 4)
    gather_rows(const uint4* table, const long long* ids, uint4* out, long long rows,
                long long pieces, long long stride, long long count) {
    const int lane = threadIdx.x & 31;
    const long long parts = (pieces + PART - 1) / PART;
    const long long step = static_cast<long long>(gridDim.x) * WARPS;
    long long at = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    for (; at < parts * count; at += step) {
        const long long row = at / parts;
        const long long first = (at - row * parts) * PART + lane;
        const long long id = ids[row];
        const bool inside = id >= 0 && id < rows;
        const uint4* from = table + (inside ? id : 0) * stride;
        uint4 v[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            v[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
            if (inside && first + i * 32 < pieces) v[i] = __ldcs(from + first + i * 32);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (first + i * 32 < pieces) out[row * pieces + first + i * 32] = v[i];
    }
}

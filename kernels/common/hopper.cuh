// Hopper's own instructions: barriers in shared memory, the copy engine (TMA), clusters; its tensor
// cores are in common/wgmma.cuh.
// PTX only, for sm_90a. The words are the PTX manual's.
#pragma once
#include "common/convert.cuh"

typedef unsigned long long u64;

// What cuTensorMapEncodeTiled makes; passed by value.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Lanes of a warp that arrive for it: one, after __syncwarp, speaks for all. A race detector that
// follows only what a thread itself announces asks for every lane (tests/ops/sanitize.py).
#ifdef EVERY_LANE_ARRIVES
constexpr int ARRIVING_LANES = 32;
#else
constexpr int ARRIVING_LANES = 1;
#endif

struct Barrier {
    u64 state;

    __device__ __forceinline__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&state)),
                     "r"(arrivals));
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&state))
                     : "memory");
    }
    // Arrives at the same barrier of another block of the cluster. Not `.release.cluster`: that is
    // a fence of the whole GPU's memory, and what is given back here has only been read, or written
    // for oneself and fenced against the copy engine (ahead's first strips).
    __device__ __forceinline__ void arrive_at(u32 rank) {
        asm volatile(
            "{ .reg .b32 remote;\n"
            "mapa.shared::cluster.u32 remote, %0, %1;\n"
            "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(shared_address(&state)),
            "r"(rank)
            : "memory");
    }
    __device__ __forceinline__ void arrive_expecting(int bytes) {
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&state)),
            "r"(bytes)
            : "memory");
    }
    __device__ __forceinline__ void wait(int parity) {
        asm volatile(
            "{ .reg .pred done;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again; }" ::"r"(shared_address(&state)),
            "r"(parity)
            : "memory");
    }
};

// Makes the barriers' initial state known to the copy engine and the cluster.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Between what threads have read or written in shared memory and what the copy engine writes.
__device__ __forceinline__ void fence_shared_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Between what threads have written in the GPU's memory and what the copy engine reads there.
__device__ __forceinline__ void fence_global_copies() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Copies the box at (row, column) of a matrix to shared memory; `full` counts its bytes.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& from, int row, int column,
                                         Barrier& full) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %2}], [%4];" ::"r"(shared_address(to)),
        "l"(&from), "r"(row), "r"(column), "r"(shared_address(&full.state))
        : "memory");
}

// The same into this block and its neighbour (ranks 2i and 2i + 1), and their barriers.
__device__ __forceinline__ void copy_box_to_pair(void* to, const TensorMap& from, int row,
                                                 int column, Barrier& full) {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const u16 both = static_cast<u16>(3u << (rank & ~1u));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %2}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&from), "r"(row), "r"(column), "r"(shared_address(&full.state)), "h"(both)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The next kernel of the stream, if launched to overlap, may start now.
__device__ __forceinline__ void launch_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// A kernel launched to overlap with the one before it waits here for that one's results.
__device__ __forceinline__ void wait_for_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// One lane of a warp that is together, in a way that the compiler knows for one.
__device__ __forceinline__ bool elected() {
    u32 is;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(is));
    return is != 0;
}

// Which warp of a block a thread is part of, in a way that the compiler knows for uniform.
__device__ __forceinline__ int warp_of_block() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int ID, int THREADS>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ u32 cluster_size() {
    u32 size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// A value of which the compiler does not know that it has seen it before.
__device__ __forceinline__ int anew(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Which cluster of the grid, of how many: read again wherever asked for, instead of kept.
__device__ __forceinline__ u32 own_cluster() {
    u32 which;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(which));
    return which;
}

__device__ __forceinline__ u32 cluster_count() {
    u32 count;
    asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
    return count;
}

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same where blocks have not written for one another since they last met: `.release` waits for
// everything on its way to the GPU's memory, results too.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes a word at the same shared address of another block, whose barrier counts its bytes.
__device__ __forceinline__ void write_to_peer(u32 address, u32 value, u32 rank, u32 barrier) {
    asm volatile(
        "{ .reg .b32 remote, there;\n"
        "mapa.shared::cluster.u32 remote, %0, %2;\n"
        "mapa.shared::cluster.u32 there, %3, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [remote], %1, [there]; }" ::"r"(
            address),
        "r"(value), "r"(rank), "r"(barrier)
        : "memory");
}

// Four floats at the same shared address of another block of the cluster.
__device__ __forceinline__ float4 read_peer(u32 address, u32 rank) {
    u32 remote;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(remote));
    return v;
}

__device__ __forceinline__ float2 read_peer_pair(u32 address, u32 rank) {
    u32 remote;
    float2 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(remote)
                 : "memory");
    return v;
}

__device__ __forceinline__ float read_peer_one(u32 address, u32 rank) {
    u32 remote;
    float v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(remote) : "memory");
    return v;
}

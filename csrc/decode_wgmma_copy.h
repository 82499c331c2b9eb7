// What decode_wgmma.h brings to shared memory while it multiplies: tiles of x, W and A by threads
// of their own, b by a warp.
#pragma once

#include "decode_wgmma_plan.h"

namespace ckf {
namespace {
namespace decode_wgmma {

#ifdef CKF_HAS_WGMMA
#ifdef CKF_HOST_SHIM
inline const bool clusters_in_turn = [] { return ckf_host::together = false, true; }();
#endif

// A tile and where it lies; its turn through the ring, as a barrier's parity.
struct Step {
    int span, depth, stage;
    unsigned parity;
    __device__ __forceinline__ void next(int k, int stages) {
        depth += kRowElements;
        if (depth >= k) depth = 0, ++span;
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// A thread that copies tiles of all spans, as stages become empty. No copy stands under a condition
// within a loop: ptxas 13.0 made of one that was a copy from a place that did not change.
template <typename T, int kTile>
struct Copier {
    const Args<T>& p;
    const Linear<T>& linear;
    const Memory<kTile>& memory;
    int chunks, tiles;  // of a span, of all
    int a_tiles;        // of A, in the first span
    int n, a_row;       // the first of n and of A that this block brings

    __device__ __forceinline__ Copier(const Args<T>& p_, const Block& block,
                                      const Memory<kTile>& memory_)
        : p(p_), linear(p_.linears[block.linear]), memory(memory_) {
        chunks = block.chunks;
        tiles = block.spans * chunks;
        a_tiles = p.share > 0 ? chunks : 0;
        n = block.first_n;
        a_row = linear.first_column + block.first_column;
    }

    // Of W, and the bytes that the stage waits for.
    __device__ __forceinline__ void bring_w(const Step& to) const {
        const uint32_t full = memory.full(to.stage);
        const unsigned of_a = to.span == 0 ? p.share * kRowBytes : 0;
        expect_bytes(full, memory.x_bytes + kTile * kRowBytes + of_a);
        load_tile(memory.w(to.stage), linear.w, full, to.depth, n + to.span * kTile);
    }
    __device__ __forceinline__ void bring_x(const Step& to) const {
        load_tile(memory.x(to.stage), p.x, memory.full(to.stage), to.depth, 0);
    }
    __device__ __forceinline__ void bring_a(const Step& to) const {
        load_tile(memory.a(to.stage), p.a, memory.full(to.stage), to.depth, a_row);
    }

    // One thread for all, while nobody else knows the barriers: what fills the ring.
    __device__ __forceinline__ void begin() const {
        const int ahead = min(tiles, p.stages), of_a = min(a_tiles, p.stages);
        Step step{0, 0, 0, 0};
#pragma unroll 1
        for (int i = 0; i < of_a; ++i, step.next(p.k, p.stages)) {
            bring_w(step);
            bring_x(step);
            bring_a(step);
        }
#pragma unroll 1
        for (int i = of_a; i < ahead; ++i, step.next(p.k, p.stages)) {
            bring_w(step);
            bring_x(step);
        }
    }

    // The tiles of one operand after those, up to `last`.
    template <typename Bring>
    __device__ __forceinline__ void go_on(int last, Bring bring) const {
        const int ahead = min(tiles, p.stages);
        Step step{ahead / chunks, ahead % chunks * kRowElements, 0, 0};
#pragma unroll 1
        for (int i = ahead; i < last; ++i, step.next(p.k, p.stages)) {
            wait_barrier(memory.empty(step.stage), step.parity);
            bring(step);
        }
    }

    // A thread for each role.
    __device__ __forceinline__ void run(int role) const {
        if (role == kCopiesW)
            go_on(tiles, [&](const Step& step) { bring_w(step); });
        else if (role == kCopiesX)
            go_on(tiles, [&](const Step& step) { bring_x(step); });
        else
            go_on(a_tiles, [&](const Step& step) { bring_a(step); });
    }
};

// A warp that brings the block's columns of b for each span and the bias, as float32, while the
// products go on.
template <typename T, int kTile>
__device__ __forceinline__ void ready_b(const Linear<T>& linear, const Block& block,
                                        const Memory<kTile>& memory, Tail<kTile>& tail) {
    constexpr int kPieces = kTile / kVec<T>;
    const int lane = threadIdx.x % kLanes;
#pragma unroll 1
    for (int span = 0; span < block.spans; ++span) {
        if (span > 0) wait_barrier(memory.b_read(), (span - 1) & 1);
        const int first = block.first_n + span * kTile;
        bool wild = false;
#pragma unroll 4
        for (int i = lane; i < linear.rank * kPieces; i += kLanes) {
            const int column = i / kPieces, at = i % kPieces * kVec<T>;
            const int left = linear.n - first - at;
            const T* from = linear.b + static_cast<int64_t>(column) * linear.n + first + at;
            const Pack<T> pack =
                linear.aligned_b ? load<T, true>(from, left) : load<T, false>(from, left);
#pragma unroll
            for (int v = 0; v < kVec<T>; ++v) {
                const float value = to_float(pack.v[v]);
                wild = wild || !is_finite(value);
                tail.b[column][at + v] = is_finite(value) ? value : 0.0f;
            }
        }
        for (int i = lane; i < kTile; i += kLanes)
            tail.bias[i] = linear.bias != nullptr && first + i < linear.n
                               ? to_float(linear.bias[first + i])
                               : 0.0f;
        const bool any = __ballot_sync(kFull, wild) != 0;
        if (lane == 0) tail.wild = any;
        arrive_at(memory.b_ready(), block.rank);
    }
}

#endif

}  // namespace decode_wgmma
}  // namespace
}  // namespace ckf

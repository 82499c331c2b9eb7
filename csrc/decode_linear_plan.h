// What decode_linear.h works on: its plans, its arguments, shared memory, and the share of a block.
#pragma once

#include "device.h"
#include "launchers.h"

namespace ckf {
namespace {
namespace decode_linear {

constexpr int kCluster = 8;              // blocks, each with a part of k: the order of the sum
constexpr int kTile = 8;                 // columns of n, or of A
constexpr int kTiles = 4;                // of a warp in a span
constexpr int kChunk = 32;               // of k: 16 bytes for each of four lanes
constexpr int kAhead = 4;                // lines of every row of W that are asked for at once
constexpr uint32_t kDead = 0x80000000u;  // -0 in h: the gate is zero; a live h is never -0
constexpr int kInvalid = -2;             // the task of a row that becomes NaN; -1: base only

// What is fixed when compiled: up to 16 kRowTiles rows, kTile kMostGroups columns of A, and kDepth
// chunks in flight. Warps so that two blocks fit into the registers.
template <int kRowTiles_, int kMostGroups_, int kWarps_, int kDepth_>
struct Plan {
    static constexpr int kRowTiles = kRowTiles_, kMostGroups = kMostGroups_;
    static constexpr int kWarps = kWarps_, kDepth = kDepth_;
    static constexpr int kRows = 16 * kRowTiles;
    static constexpr int kThreads = kWarps * kLanes;
    static constexpr int kSpan = kWarps * kTiles * kTile;
    static constexpr int kOwn = kSpan / kCluster;  // columns of a span that a block writes
    static constexpr int kPad = kRowTiles > 2 ? 0 : 8;
    static constexpr int kMostRank = kMostGroups * kTile;
    static constexpr int kShare = kMostRank / kCluster;               // columns of S of a block
    static constexpr int kShareOfThread = kShare * kRows / kThreads;  // elements of S
    static_assert(kMostRank <= kSpan, "A is one span");
};
using FewRows = Plan<1, 16, 8, 3>;
using FewRowsWide = Plan<1, 32, 8, 3>;
using SomeRows = Plan<2, 16, 4, 3>;
using ManyRows = Plan<4, 16, 4, 2>;

template <typename T>
struct Linear {
    T* y;
    const T *w, *bias, *b;
    int64_t y_stride, w_stride;
    int n, rank;
    int first_column;   // of a and the gates
    int first_cluster;  // of the grid
    bool aligned_b;     // rows of b begin at 16 bytes
};

template <typename T>
struct Args {
    Linear<T> linears[kCkfMostLinears];
    const T *x, *a;
    const float* gates;
    const int64_t* task_ids;
    int64_t x_stride;
    int m, k, rank, tasks, count;
    int spans;  // of n for each cluster, one after the other
};

template <typename T, typename P>
struct Shared {
    float y_part[kCluster][P::kRows][P::kOwn + P::kPad];    // from each block
    float s_part[kCluster][P::kRows][P::kShare + P::kPad];  // likewise, of this block's share
    float h[P::kMostRank][P::kRows];
    T b[P::kMostRank][P::kOwn];
    float gate[P::kShareOfThread][P::kThreads];
    int task[P::kRows];
};

template <typename T>
struct Block {
    const Linear<T>& linear;
    int first_n, spans;  // of the cluster
    unsigned rank;       // in the cluster, and the part of k
    int first_k, chunks;
    int lane, warp;
    int groups;  // of A's columns
};

template <typename P, typename T>
__device__ __forceinline__ Block<T> find_block(const Args<T>& p) {
    const int cluster = blockIdx.x / kCluster;
    int i_linear = p.count - 1;
    while (cluster < p.linears[i_linear].first_cluster) --i_linear;
    const Linear<T>& linear = p.linears[i_linear];
    const unsigned rank = blockIdx.x % kCluster;
    const int all = (p.k + kChunk - 1) / kChunk, each = (all + kCluster - 1) / kCluster;
    const int first = min(static_cast<int>(rank) * each, all);
    const int first_n = (cluster - linear.first_cluster) * p.spans * P::kSpan;
    return {linear,
            first_n,
            min(p.spans, (linear.n - first_n + P::kSpan - 1) / P::kSpan),
            rank,
            first * kChunk,
            min(each, all - first),
            static_cast<int>(threadIdx.x) % kLanes,
            static_cast<int>(threadIdx.x) / kLanes,
            (linear.rank + kTile - 1) / kTile};
}

}  // namespace decode_linear
}  // namespace
}  // namespace ckf

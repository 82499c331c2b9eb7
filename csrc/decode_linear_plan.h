// What decode_linear.h works on: its plan, its arguments, shared memory, and the share of a block.
#pragma once

#include "decode_rows.h"
#include "launchers.h"

namespace ckf {
namespace {
namespace decode_linear {

constexpr int kRows = 16;                // of x, at most
constexpr int kMostRank = 256;           // of a linear
constexpr int kTile = 8;                 // columns of n, or of A
constexpr int kTiles = 4;                // of W in a span
constexpr int kOwn = kTiles * kTile;     // columns of a span: those of one block
constexpr int kPitch = kOwn + 8;         // of partial sums: no two lanes of a store share a bank
constexpr int kChunk = 32;               // of k: 16 bytes for each of four lanes

// The blocks of a cluster share A's columns; the warps of a block share k, which makes the order of
// the sum, and fill a multiprocessor. On an H100 (us at 1 and 16 rows, cuBLAS's base 16.5 and 16.7)
// this takes 21.2 and 23.1; two blocks of eight warps 21.7 and 24.6; clusters of four 21.6 and 24.6;
// and to ask for more of W while A is multiplied costs 1 to 5.
struct Plan {
    static constexpr int kCluster = 8, kWarps = 16;
    static constexpr int kDepth = 3, kADepth = 2;  // chunks of W and of A in flight
    static constexpr int kThreads = kWarps * kLanes;
    static constexpr int kATiles = 2;               // multiplied at once
    static constexpr int kShare = kATiles * kTile;  // columns of A
    static constexpr int kShareOfThread = (kShare * kRows + kThreads - 1) / kThreads;
    static_assert(kADepth <= kDepth);
    static_assert(kShare <= kOwn, "partial sums of A lie where those of W will");
};

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
    int spans;  // of n for each block, one after the other
};

template <typename T, typename P>
struct Shared {
    float part[P::kWarps][kRows][kPitch];  // from each warp: of S first, then of y
    float h[kMostRank][kRows];
    T b[kMostRank][kOwn];
    float gate[P::kShareOfThread][P::kThreads];
    int task[kRows];
    Arrivals arrivals;  // of h
};

template <typename T>
struct Block {
    const Linear<T>& linear;
    int first_n, spans;
    int first_column, end_column;  // of A's, within the linear
    int lane, warp;
    int first_k, chunks;  // of the warp
    int left_k;           // from the lane's first element on, within the warp's share
};

template <typename P, typename T>
__device__ __forceinline__ Block<T> find_block(const Args<T>& p) {
    const int cluster = blockIdx.x / P::kCluster, rank = blockIdx.x % P::kCluster;
    int i_linear = p.count - 1;
    while (cluster < p.linears[i_linear].first_cluster) --i_linear;
    const Linear<T>& linear = p.linears[i_linear];
    const int place = (cluster - linear.first_cluster) * P::kCluster + rank;
    const int first_n = place * p.spans * kOwn;
    const int columns = (linear.rank + P::kCluster - 1) / P::kCluster;
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    const int warp = static_cast<int>(threadIdx.x / kLanes);
    const int all = (p.k + kChunk - 1) / kChunk, each = (all + P::kWarps - 1) / P::kWarps;
    const int first = min(warp * each, all);
    return {linear,
            first_n,
            max(0, min(p.spans, (linear.n - first_n + kOwn - 1) / kOwn)),
            min(rank * columns, linear.rank),
            min((rank + 1) * columns, linear.rank),
            lane,
            warp,
            first * kChunk,
            min(each, all - first),
            min(min(each, all - first) * kChunk, p.k - first * kChunk) - lane % 4 * 8};
}

}  // namespace decode_linear
}  // namespace
}  // namespace ckf

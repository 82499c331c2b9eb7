// What decode_wgmma.h works on: its arguments, shared memory, and the share of a block.
#pragma once

#include "decode_rows.h"
#include "hopper.h"
#include "launchers.h"
#include "mma.h"

namespace ckf {
namespace {
namespace decode_wgmma {

constexpr int kRows = 64;  // of x, at most: those of one product
constexpr int kCluster = 8;
constexpr int kShare = 16;                    // columns of A, of a block, at most
constexpr int kMostRank = kCluster * kShare;  // of a linear
constexpr int kAtomRows = 8;
constexpr int kTeams = 2;  // warpgroups that multiply
constexpr int kTeamWarps = kGroupThreads / kLanes;
constexpr int kConsumers = kTeams * kGroupThreads;
constexpr int kThreads = kConsumers + kGroupThreads;
// What the warps after those that multiply do: a thread each copies tiles of W, x and A; one warp
// makes b ready.
enum Role : int { kCopiesW, kCopiesX, kCopiesA, kReadiesB };
constexpr int kElements = (kRows * kShare + kConsumers - 1) / kConsumers;  // of S, of a thread
constexpr int kHPitch = kShare + 4;      // floats: rows of h in different banks, 16 bytes each
constexpr uint32_t kTf32 = 0xffffe000u;  // the bits of a float32 that a tensor core reads
constexpr unsigned kMostShared = 227 * 1024;
constexpr unsigned kABytes = kShare * kRowBytes;
constexpr int kMostStages = 16;
constexpr unsigned kBarrierBytes = 512;
static_assert(8 * (2 * kMostStages + 3) <= kBarrierBytes && kMostStages % kTeams == 0);

template <typename T>
struct Linear {
    TensorMap w;
    T* y;
    const T *bias, *b;
    int64_t y_stride;
    int n, rank;
    int first_column;   // of a and the gates
    int first_cluster;  // of the grid
    bool aligned_b;     // rows of b begin at 16 bytes
};

template <typename T>
struct Args {
    Linear<T> linears[kCkfMostLinears];
    TensorMap x, a;
    const float* gates;
    const int64_t* task_ids;
    int m, k, rank, tasks, count;
    int spans;   // of n for each block, one after the other
    int x_rows;  // that one copy brings: m, rounded up to whole atoms
    int stages;  // of the ring
    int share;   // columns of A that one copy brings, 0: there are none
};

// What is not part of the ring.
template <int kTile>
struct alignas(16) Tail {
    static constexpr int kPitch =
        (kTile + 7) / 16 * 16 + 8;      // no two lanes of a store share a bank
    float part[kTeams][kRows][kPitch];  // of S first, then of y
    float h[kCluster][kRows][kHPitch];  // by the block that made it
    float b[kMostRank][kPitch];         // zero for what is not finite
    float bias[kTile];
    int task[kRows];
    int wild;  // whether something of b was not finite
};

template <int kTile>
struct Memory {
    static constexpr unsigned kWBytes = kTile * kRowBytes;
    static constexpr unsigned kOthers = kAtomBytes + sizeof(Tail<kTile>) + kBarrierBytes;
    static constexpr unsigned kRingBytes = (kMostShared - kOthers) / kAtomBytes * kAtomBytes;
    static constexpr unsigned kBytes = kOthers + kRingBytes;

    static __host__ __device__ constexpr unsigned stage_bytes(int x_rows) {
        return x_rows * kRowBytes + kWBytes + kABytes;
    }
    // A product reads kRows of x. Those that are not there are whatever follows in memory, which
    // the rows of y that are not there see alone; the last stage's lie within the ring too.
    // A multiple of kTeams: a stage is then always the same team's within a span, and a team that
    // waits for a tile has seen the one that was there before. A barrier's parity alone cannot tell
    // "there" from "two behind".
    static __host__ __device__ constexpr int stages(int x_rows) {
        const unsigned beyond = (kRows - x_rows) * kRowBytes;
        const unsigned behind = beyond > kWBytes + kABytes ? beyond - kWBytes - kABytes : 0;
        const int fit = static_cast<int>((kRingBytes - behind) / stage_bytes(x_rows));
        return fit < kMostStages ? fit / kTeams * kTeams : kMostStages;
    }

    uint32_t base;
    unsigned x_bytes, step;  // of a stage: of x, of all
    __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * step; }
    __device__ __forceinline__ uint32_t w(int stage) const { return x(stage) + x_bytes; }
    __device__ __forceinline__ uint32_t a(int stage) const { return w(stage) + kWBytes; }
    __device__ __forceinline__ uint32_t full(int stage) const {
        return base + kRingBytes + 8 * stage;
    }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(kMostStages + stage); }
    __device__ __forceinline__ uint32_t arrivals() const { return full(2 * kMostStages); }
    __device__ __forceinline__ uint32_t b_ready() const { return full(2 * kMostStages + 1); }
    __device__ __forceinline__ uint32_t b_read() const { return full(2 * kMostStages + 2); }
    __device__ __forceinline__ uint32_t tail() const { return full(0) + kBarrierBytes; }
};

struct Block {
    int linear, rank;           // rank: in the cluster
    int first_n, spans;         // spans: those of the cluster
    int first_column, columns;  // of A's, within the linear
    int chunks;                 // of k
};

template <int kTile, typename T>
__device__ __forceinline__ Block find_block(const Args<T>& p) {
    const int cluster = blockIdx.x / kCluster, rank = blockIdx.x % kCluster;
    int i_linear = p.count - 1;
    while (cluster < p.linears[i_linear].first_cluster) --i_linear;
    const Linear<T>& linear = p.linears[i_linear];
    const int wide = p.spans * kTile;
    const int first = (cluster - linear.first_cluster) * kCluster * wide;
    const int columns = (linear.rank + kCluster - 1) / kCluster;
    const int first_column = min(rank * columns, linear.rank);
    return {i_linear,
            rank,
            first + rank * wide,
            max(1, min(p.spans, (linear.n - first + kTile - 1) / kTile)),
            first_column,
            min(columns, linear.rank - first_column),
            (p.k + kRowElements - 1) / kRowElements};
}

__device__ __forceinline__ bool is_finite(float v) {
    return (bits_of(v) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace decode_wgmma
}  // namespace
}  // namespace ckf

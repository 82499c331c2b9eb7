// The first half of multi_lora_decode_tile.h: which columns, and h = gate * S of them in shared
// memory.
#pragma once

#include "mma.h"
#include "multi_lora_decode.h"

namespace ckf {
namespace {
namespace tile {

constexpr int kRows = 16;
constexpr int kGroup = 8;                            // rank columns
constexpr int kGroups = 10;                          // of a window: five experts of rank 16
constexpr int kColumns = kGroup * kGroups;           // of a window
constexpr int kPitch = kColumns + 4;                 // rows of eight lanes in different banks
constexpr int kChunk = 32;                           // of k: 16 bytes for each of four lanes
constexpr int kMostGroups = 16384 / kGroup;          // MAX_RANK in ckf/kernels/cuda.py
constexpr int kShare = kRows * kColumns / kThreads;  // elements of S for each thread, at most
constexpr uint32_t kDead = 0x80000000u;  // -0 in h: the gate is zero; a live h is never -0

struct alignas(8) Pair {
    float x, y;
};

struct Shared {
    Pair warp_sum[kWarps / 2][kRows][kPitch / 2];
    float block_sum[kRows][kPitch];
    float h[kRows][kPitch];
    int task[kRows];
    uint16_t group[kMostGroups];  // the live ones in order, where they are listed
    uint8_t live[kMostGroups / 4];
    int count;
};

template <typename T>
struct Block {
    const Linear<T>& linear;
    int64_t first_row;
    int rows;
    unsigned rank;  // in the cluster
    int lane, warp;
};

// The groups [first, first + groups) of shared.group.
struct Window {
    int first, groups;
    __device__ __forceinline__ int group(const Shared& shared, int j) const {
        return j < groups ? shared.group[first + j] : 0;
    }
    // Column i of the window in the linear; one at or past its rank is not there.
    __device__ __forceinline__ int column(const Shared& shared, int i) const {
        const int at = i / kGroup;
        return at < groups ? shared.group[first + at] * kGroup + i % kGroup : 1 << 30;
    }
};

// False where no row of the block has anything to do.
template <typename T>
__device__ __forceinline__ bool publish_tasks(const Args<T>& p, const Block<T>& block, int64_t id,
                                              Shared& shared) {
    if (threadIdx.x < kRows) {
        const bool known = id >= -1 && id < p.tasks;
        shared.task[threadIdx.x] = known ? static_cast<int>(id) : kInvalid;
    }
    return __syncthreads_or(static_cast<int>(threadIdx.x) < block.rows && id != -1) != 0;
}

// How many groups have a gate that is not zero; shared.group lists them.
template <typename T>
__device__ __forceinline__ int list_groups(const Args<T>& p, const Block<T>& block,
                                           Shared& shared) {
    const int rank = block.linear.rank, lane = block.lane;
#pragma unroll 1
    for (int base = block.warp * kLanes; base < rank; base += kThreads) {
        bool live = false;
#pragma unroll 4
        for (int r = 0; r < block.rows; ++r) {
            const int task = shared.task[r];
            if (task >= 0 && base + lane < rank)
                live |= p.gates[static_cast<int64_t>(task) * p.rank + block.linear.first_column +
                                base + lane] != 0.0f;
        }
        const unsigned bits = __ballot_sync(kFull, live);
        constexpr unsigned kOne = (1u << kGroup) - 1;
        unsigned groups = 0;
#pragma unroll
        for (int i = 0; i < kLanes / kGroup; ++i)
            groups |= (bits >> i * kGroup & kOne) != 0 ? 1u << i : 0u;
        if (lane == 0) shared.live[base / kLanes] = static_cast<uint8_t>(groups);
    }
    __syncthreads();
    const int all = (rank + kGroup - 1) / kGroup;
    if (block.warp == 0) {
        int count = 0;
#pragma unroll 1
        for (int base = 0; base < all; base += kLanes) {
            const int group = base + lane;
            const bool live = group < all && (shared.live[group / 4] >> group % 4 & 1) != 0;
            const unsigned bits = __ballot_sync(kFull, live);
            if (live)
                shared.group[count + __popc(bits & ((1u << lane) - 1))] =
                    static_cast<uint16_t>(group);
            count += __popc(bits);
        }
        if (lane == 0) shared.count = count;
    }
    __syncthreads();
    return shared.count;
}

// What a lane reads of x and A in a window. A row or column that is not there has the address of
// one that is: what comes of it is nobody's.
template <typename T>
struct Sources {
    const T* x[2];
    const T* a;
    unsigned offset[kGroups];
};

template <typename T>
__device__ __forceinline__ Sources<T> find_sources(const Args<T>& p, const Block<T>& block,
                                                   const Window& window, const Shared& shared) {
    Sources<T> from;
    from.a = p.a + static_cast<int64_t>(block.linear.first_column) * p.k;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = min(block.lane / 4 + 8 * i, block.rows - 1);
        from.x[i] = p.x + (block.first_row + row) * p.x_stride;
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        const int column = window.group(shared, j) * kGroup + block.lane / 4;
        from.offset[j] = static_cast<unsigned>(min(column, block.linear.rank - 1)) * p.k;
    }
    return from;
}

// A lane's operands of two products: words 0 and 1, words 2 and 3.
struct Chunk {
    Words<4> x[2], a[kGroups];
};

// From i on; past k all are zero.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_chunk(const Sources<T>& from, int i, int groups, bool whole,
                                           int k, Chunk& chunk) {
    if (kAligned && whole) {
#pragma unroll
        for (int h = 0; h < 2; ++h) load_into(chunk.x[h], true, from.x[h] + i);
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
            load_into(chunk.a[j], j < groups, from.a + (from.offset[j] + i));
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) chunk.x[h] = load_words<T, 8, kAligned>(from.x[h] + i, k - i);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        chunk.a[j] =
            load_words<T, 8, kAligned>(from.a + (from.offset[j] + i), j < groups ? k - i : 0);
        if (!kAligned) __syncwarp();  // no more registers for loads in flight
    }
}

template <typename T>
__device__ __forceinline__ void multiply(const Chunk& chunk, int groups, float (&s)[kGroups][4]) {
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
        const uint32_t x[4] = {chunk.x[0].w[step], chunk.x[1].w[step], chunk.x[0].w[step + 1],
                               chunk.x[1].w[step + 1]};
#pragma unroll
        for (int j = 0; j < kGroups; ++j)
            if (j < groups) product<T>(s[j], x, chunk.a[j].w[step], chunk.a[j].w[step + 1]);
    }
}

// block_sum += the warps' sums, in a fixed tree; the first part starts it.
__device__ __forceinline__ void sum_over_block(const float (&s)[kGroups][4], bool first, int rows,
                                               int lane, int warp, Shared& shared) {
    Pair* sums = &shared.warp_sum[warp % (kWarps / 2)][lane / 4][lane % 4];
#pragma unroll
    for (int upper = 1; upper >= 0; --upper) {
        if (warp / (kWarps / 2) == upper) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (half * 8 >= rows) break;
#pragma unroll
                for (int j = 0; j < kGroups; ++j) {
                    Pair& sum = sums[half * 8 * (kPitch / 2) + j * kGroup / 2];
                    const float x = s[j][2 * half], y = s[j][2 * half + 1];
                    sum = upper ? Pair{x, y} : Pair{x + sum.x, y + sum.y};
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int at = static_cast<int>(threadIdx.x) + i * kThreads;
        const int row = at / kColumns, column = at % kColumns;
        if (row >= rows) continue;
        const auto of_warp = [&](int w) {
            const Pair& pair = shared.warp_sum[w][row][column / 2];
            return column % 2 ? pair.y : pair.x;
        };
        const float sum = (of_warp(0) + of_warp(1)) + (of_warp(2) + of_warp(3));
        shared.block_sum[row][column] = (first ? 0.0f : shared.block_sum[row][column]) + sum;
    }
}

// The elements of S (rows, kColumns) that this block adds up over the cluster: all, for itself, or
// with many rows its share, for everybody.
struct Share {
    int begin, end;
    bool for_all;
};

// gate[i]: of this thread's elements.
template <typename T>
__device__ __forceinline__ void read_gates(const Args<T>& p, const Block<T>& block,
                                           const Window& window, const Share& share,
                                           const Shared& shared, float (&gate)[kShare]) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        gate[i] = 0.0f;
        const int at = share.begin + static_cast<int>(threadIdx.x) + i * kThreads;
        if (at >= share.end) continue;
        const int task = shared.task[at / kColumns];
        const int column = window.column(shared, at % kColumns);
        if (task >= 0 && column < block.linear.rank)
            gate[i] =
                p.gates[static_cast<int64_t>(task) * p.rank + block.linear.first_column + column];
    }
}

template <int kCluster>
__device__ __forceinline__ void write_h(const Share& share, const float (&gate)[kShare],
                                        Shared& shared) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int at = share.begin + static_cast<int>(threadIdx.x) + i * kThreads;
        if (at >= share.end) continue;
        const int row = at / kColumns, column = at % kColumns;
        float s = 0.0f;
#pragma unroll
        for (int from = 0; from < kCluster; ++from)
            s += read_block<kCluster>(&shared.block_sum[row][column], from);
        const float h = gate[i] != 0.0f ? without_sign_of_zero(gate[i] * s) : float_of(kDead);
        if (share.for_all) {
#pragma unroll
            for (int to = 0; to < kCluster; ++to)
                write_block<kCluster>(&shared.h[row][column], h, to);
        } else {
            shared.h[row][column] = h;
        }
    }
}

// Columns of n of a block, of a warp; the first of this warp's.
template <int kN>
constexpr int kWarpN = 8 * kN;
template <int kN>
constexpr int kSpanN = kWarps * kWarpN<kN>;

// A hint for the rows of b that the block will want.
template <typename T, int kN>
__device__ __forceinline__ void prefetch_b(const Block<T>& block, const Window& window, int start,
                                           const Shared& shared) {
    constexpr int kLine = 128 / sizeof(T), kLines = kSpanN<kN> / kLine;
#pragma unroll 1
    for (int i = threadIdx.x; i < window.groups * kGroup * kLines; i += kThreads) {
        const int column = window.column(shared, i / kLines), at = start + i % kLines * kLine;
        if (column < block.linear.rank && at < block.linear.n)
            prefetch(block.linear.b + static_cast<int64_t>(column) * block.linear.n + at);
    }
}

// The sum of S over this block, and the gates of this thread's elements. `publish`: the tasks as
// well; false where no row has anything to do.
template <typename T, int kN, int kCluster, bool kAligned, bool kMany>
__device__ __forceinline__ bool shrink(const Args<T>& p, const Block<T>& block,
                                       const Window& window, const Share& share, bool publish,
                                       int64_t id, int start, Shared& shared,
                                       float (&gate)[kShare]) {
    constexpr int kPasses = kParts / kCluster, kPair = 2 * kChunk;
    constexpr int kStride = kParts * kWarps * kPair;
    const Sources<T> from = find_sources(p, block, window, shared);
    const auto load = [&](int at, Chunk& chunk) {
        load_chunk<T, kAligned>(from, at + block.lane % 4 * 8, window.groups, at + kChunk <= p.k,
                                p.k, chunk);
    };
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        const int part = static_cast<int>(block.rank) * kPasses + pass;
        int pair = (part * kWarps + block.warp) * kPair;
        constexpr int kDepth = kMany || kCluster == 1 ? 1 : 2;  // chunks in flight
        Chunk ring[kDepth];
#pragma unroll
        for (int i = 0; i < kDepth; ++i) load(pair + i * kChunk, ring[i]);
        if (pass == 0) {
            if (publish && !publish_tasks(p, block, id, shared)) return false;
            read_gates(p, block, window, share, shared, gate);
            prefetch_b<T, kN>(block, window, start, shared);
        }
        float s[kGroups][4];
#pragma unroll
        for (int i = 0; i < kGroups * 4; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll 1
        for (; pair < p.k; pair += kStride) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (pair + i * kChunk < p.k) multiply<T>(ring[i % kDepth], window.groups, s);
                const int next =
                    i + kDepth < 2 ? pair + kChunk : pair + kStride + (i + kDepth - 2) * kChunk;
                if (next < p.k) load(next, ring[i % kDepth]);
            }
        }
        if (pass > 0) __syncthreads();  // everybody has read the last pass's sums
        sum_over_block(s, pass == 0, block.rows, block.lane, block.warp, shared);
    }
    __syncwarp();
    cluster_arrive<kCluster>();
    return true;
}

// shared.h after the block's sums.
template <int kCluster>
__device__ __forceinline__ void finish_h(const Share& share, const float (&gate)[kShare],
                                         Shared& shared) {
    cluster_wait<kCluster>();
    write_h<kCluster>(share, gate, shared);
    cluster_arrive<kCluster>();  // the partial sums of the others are no longer needed
    if (share.for_all)
        cluster_wait<kCluster>();
    else
        __syncthreads();
}

}  // namespace tile
}  // namespace
}  // namespace ckf

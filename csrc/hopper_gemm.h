// A matrix product with the Multi-LoRA update inside, for sm_90a: written once, rounded once.
//   forward  y (m, n) = x W^T + bias + H B^T   x (m, k), W (n, k), H (m, r), B^T (r, n)
//   dx       y (m, n) = mask (H B) + x W [+ y]  the same shapes but W (k, n): x is dy, H is dS
// H may be made by the same launch: H = gates * (x A^T), for dx dS = gates * (dy B).
//
// Persistent pairs of blocks (a cluster) take pairs of tiles of 128 x 256, one below the other, so
// that each loads half of W's tile and multicasts it to both: 32 KB from L2 a block for 4.2 MFLOP.
// In a block one thread copies tiles (TMA, 128-byte swizzle) through four stages of shared memory;
// two warpgroups multiply (WGMMA 64 x 256 x 16), each 64 rows of the tile. The loop over depth runs
// through (x, W) and through (H, B) as one; the update's last tile stops at the last 16 of r. In dx
// the update comes first and the dropout mask acts on the accumulators in between.
// A batch of products stays in flight while the next tile is waited for; a stage is given back by
// every warp of both blocks, as the copies go to both. Accumulators leave through registers: four
// lanes exchange their pairs so that each holds eight neighbours of a row, 16 bytes a store.
// Tiles of H (128 x 128 at half the cost, or 128 x 256) go to the first clusters, which have the fewest tiles of y,
// before all else; who needs rows of H waits until all warps that write them are counted. Blocks are
// started in order, so the clusters that others wait for are running whenever anybody waits.
#pragma once

#include <algorithm>

#include "hopper_fragments.h"
#include "launchers.h"

namespace ckf {
namespace {

constexpr int kTileM = 128, kTileK = 64;
constexpr int kStages = 4;
constexpr int kPair = 2;       // blocks of a cluster
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kGroupWarps = kGroupThreads / kLanes;
constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kGroupPairs = 8;  // pairs of row tiles that take their column tiles in turn
constexpr unsigned kXBytes = kTileM * kRowBytes, kWBytes = kTileN * kRowBytes;
constexpr unsigned kStageBytes = kXBytes + kWBytes;
constexpr unsigned kChunkBytes = kTileK * kRowBytes;  // 64 columns of an operand in rows of n
constexpr unsigned kSharedBytes = kAtomBytes + kStages * (kStageBytes + 16);  // two barriers each
// 168 a thread at the start: what the copying warpgroup gives up the other two take.
constexpr int kCopyRegisters = 40, kProductRegisters = 232;

struct Tile {
    int pair, column;
};

// Neighbours in time share columns of W, and kGroupPairs pairs of row tiles share the L2 cache.
__host__ __device__ inline Tile tile_at(int index, int pairs, int columns) {
    const int group = index / (kGroupPairs * columns), within = index % (kGroupPairs * columns);
    const int left = pairs - group * kGroupPairs;
    const int height = left < kGroupPairs ? left : kGroupPairs;
    return {group * kGroupPairs + within % height, within / height};
}

// How many clusters shrink: those with one tile of y less than others, unless that takes longer than
// sharing it among all. A tile of H costs as many `halves` of one of y.
inline int shrinkers(int pairs, int64_t tiles, int clusters, int halves) {
    const auto ceil = [](int64_t size, int64_t by) { return (size + by - 1) / by; };
    const int64_t light = std::min<int64_t>(pairs, clusters - tiles % clusters);
    const int64_t all = std::min(pairs, clusters);
    const int64_t whole = 2 * ceil(tiles, clusters);
    const int64_t by_light =
        std::max(whole, 2 * (tiles / clusters) + halves * ceil(pairs, light));
    return static_cast<int>(by_light <= whole + halves * ceil(pairs, all) ? light : all);
}

#ifdef CKF_HAS_WGMMA

// The stages in turn, and how often the round was made, as a barrier's parity.
struct Ring {
    int stage;
    unsigned parity;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Memory {
    uint32_t base;
    __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * kStageBytes; }
    __device__ __forceinline__ uint32_t w(int stage) const { return x(stage) + kXBytes; }
    __device__ __forceinline__ uint32_t full(int stage) const {
        return base + kStages * kStageBytes + 8 * stage;
    }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
};

// One thread: copies the tiles of depth [0, depth) of both operands, as stages become empty.
template <bool kRowsOfN, int kColumns = kTileN>
__device__ __forceinline__ void copy_tiles(const TensorMap& left, const TensorMap& right,
                                           int depth, int row, int column, int rank,
                                           const Memory& memory, Ring& ring) {
    constexpr unsigned kBoth = (1u << kPair) - 1;
#pragma unroll 1
    for (int start = 0; start < depth; start += kTileK) {
        const uint32_t full = memory.full(ring.stage);
        wait_barrier(memory.empty(ring.stage), ring.parity);
        expect_bytes(full, kXBytes + kColumns * kRowBytes);
        load_tile(memory.x(ring.stage), left, full, start, row);
        const uint32_t to = memory.w(ring.stage) + rank * (kColumns / kPair * kRowBytes);
        const int own = column + rank * (kColumns / kPair);
        if constexpr (kRowsOfN) {
#pragma unroll
            for (int i = 0; i < kColumns / kPair / kRowElements; ++i)
                load_tile_for(kBoth, to + i * kChunkBytes, right, full, own + i * kRowElements,
                              start);
        } else {
            load_tile_for(kBoth, to, right, full, start, own);
        }
        ring.next();
    }
}

// A warpgroup's side of it: acc += left right over the same tiles.
struct Products {
    Memory memory;
    Ring ring;
    int lane;
    uint32_t x_offset;  // of this warpgroup's rows in the tile
    int held;           // a stage whose products may be in flight, -1: none
    bool add;           // false: the next product starts the sum

    __device__ __forceinline__ void release(int stage) {
        if (lane < kPair) arrive_at(memory.empty(stage), lane);
    }

    // kStop: whether to stop at the last kStepK that has any depth.
    template <typename T, bool kRowsOfN, bool kStop, int kColumns = kTileN>
    __device__ __forceinline__ void multiply(float (&acc)[kFragment], int depth) {
#pragma unroll 1
        for (int start = 0; start < depth; start += kTileK) {
            wait_barrier(memory.full(ring.stage), ring.parity);
            uint64_t a = rows_of_k(memory.x(ring.stage) + x_offset);
            uint64_t b = kRowsOfN ? rows_of_n(memory.w(ring.stage), kChunkBytes)
                                  : rows_of_k(memory.w(ring.stage));
            if constexpr (kStop) {
#pragma unroll 1
                for (int at = start; at < depth && at < start + kTileK; at += kStepK) {
                    fence_products();
                    product<T, kRowsOfN, kColumns>(acc, a, b, add);
                    commit_products();  // a batch each: ptxas counts them without help
                    a += kDescriptorStep<false>;
                    b += kDescriptorStep<kRowsOfN>;
                    add = true;
                }
            } else {
                fence_products();
#pragma unroll
                for (int step = 0; step < kTileK / static_cast<int>(kStepK); ++step) {
                    product<T, kRowsOfN, kColumns>(acc, a + step * kDescriptorStep<false>,
                                                   b + step * kDescriptorStep<kRowsOfN>,
                                                   add || step > 0);
                }
                commit_products();
                add = true;
            }
            wait_products<1, T>(acc);
            if (held >= 0) release(held);
            held = ring.stage;
            ring.next();
        }
    }

    template <typename T>
    __device__ __forceinline__ void finish(float (&acc)[kFragment]) {
        wait_products<0, T>(acc);
        if (held >= 0) release(held);
        held = -1;
    }
};

// What a cluster does: pairs of tiles of H, then of y, each side walking through the same.
struct Share {
    int pairs, columns, cluster, clusters, rank;

    template <typename T>
    __device__ explicit Share(const GemmArgs<T>& p)
        : pairs((p.m + kPair * kTileM - 1) / (kPair * kTileM)),
          columns((p.n + kTileN - 1) / kTileN),
          cluster(blockIdx.x / kPair),
          clusters(gridDim.x / kPair),
          rank(blockIdx.x % kPair) {}
    __device__ int row_tile(int pair) const { return pair * kPair + rank; }
};

// After the base: unless a mask is to act on the update alone.
template <typename T, bool kDx>
__device__ __forceinline__ bool update_first(const GemmArgs<T>& p) {
    return kDx && p.seed != nullptr;
}

template <typename T>
__device__ __forceinline__ bool is_wide(const ShrinkArgs<T>& s) {
    return s.columns > kShrinkN;
}

template <typename T, bool kDx>
__device__ __forceinline__ void copy_all(const GemmArgs<T>& p, const Memory& memory,
                                         const Share& own) {
    Ring ring{0, 1};  // every stage is empty at first
    if (own.cluster < p.shrinkers) {
#pragma unroll 1
        for (int pair = own.cluster; pair < own.pairs; pair += p.shrinkers) {
            const int row = own.row_tile(pair) * kTileM;
            if (is_wide(p.shrink))
                copy_tiles<false>(p.x, p.a, p.k, row, 0, own.rank, memory, ring);
            else
                copy_tiles<false, kShrinkN>(p.x, p.a, p.k, row, 0, own.rank, memory, ring);
        }
    }
#pragma unroll 1
    for (int i = own.clusters - 1 - own.cluster; i < own.pairs * own.columns; i += own.clusters) {
        const Tile tile = tile_at(i, own.pairs, own.columns);
        const int row = own.row_tile(tile.pair) * kTileM, column = tile.column * kTileN;
        const auto update = [&] {
            if (p.shrinkers > 0)
                wait_published(p.shrink.done + own.row_tile(tile.pair), kConsumers * kGroupWarps);
            copy_tiles<true>(p.h, p.b, p.r, row, column, own.rank, memory, ring);
        };
        if (update_first<T, kDx>(p)) update();
        copy_tiles<kDx>(p.x, p.w, p.k, row, column, own.rank, memory, ring);
        if (!update_first<T, kDx>(p)) update();
    }
}

template <typename T, bool kDx>
__device__ __forceinline__ void multiply_all(const GemmArgs<T>& p, const Memory& memory,
                                             const Share& own) {
    const int lane = threadIdx.x % kLanes;
    // the same for the warp, and so that the compiler knows it
    const int group = __shfl_sync(kFull, static_cast<int>(threadIdx.x / kGroupThreads), 0);
    const int warp = threadIdx.x % kGroupThreads / kLanes;
    const int offset = group * 64 + warp * 16 + lane / 4;
    Products products{memory, {0, 0}, lane, group * (kXBytes / kConsumers), -1, false};
    float acc[kFragment];
    if (own.cluster < p.shrinkers) {
#pragma unroll 1
        for (int pair = own.cluster; pair < own.pairs; pair += p.shrinkers) {
            const int tile = own.row_tile(pair);
            const Place at{tile * kTileM + offset, 0, lane % 4};
            products.add = false;
            if (is_wide(p.shrink)) {
                products.template multiply<T, false, false>(acc, p.k);
                products.template finish<T>(acc);
                store_shrunk<T, kDx, kTileN>(p.shrink, p.m, tile, at, acc);
            } else {
                products.template multiply<T, false, false, kShrinkN>(acc, p.k);
                products.template finish<T>(acc);
                store_shrunk<T, kDx, kShrinkN>(p.shrink, p.m, tile, at, acc);
            }
        }
    }
#pragma unroll 1
    for (int i = own.clusters - 1 - own.cluster; i < own.pairs * own.columns; i += own.clusters) {
        const Tile tile = tile_at(i, own.pairs, own.columns);
        const Place at{own.row_tile(tile.pair) * kTileM + offset, tile.column * kTileN, lane % 4};
        products.add = false;
        if (update_first<T, kDx>(p)) {
            products.template multiply<T, true, true>(acc, p.r);
            products.template finish<T>(acc);
            mask_fragment(p, at, acc);
        }
        products.template multiply<T, kDx, false>(acc, p.k);
        if (!update_first<T, kDx>(p)) products.template multiply<T, true, true>(acc, p.r);
        products.template finish<T>(acc);
        if (!kDx && p.bias != nullptr) add_bias(p, at, acc);
        if (kDx && p.accumulate) add_stored(p, at, acc);
        store_fragment(p, at, acc);
    }
}

#endif

template <typename T, bool kDx>
__global__ void __launch_bounds__(kThreads, 1)
    hopper_gemm_kernel(const __grid_constant__ GemmArgs<T> p) {
#ifdef CKF_HAS_WGMMA
    CKF_DYNAMIC_SHARED(bytes);
    const uint32_t start = shared_address(bytes);  // the same in both blocks, as multicast needs
    const Memory memory{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
    const Share own(p);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            init_barrier(memory.full(stage), 1);
            init_barrier(memory.empty(stage), kPair * kConsumers * kGroupWarps);
        }
        fence_barriers();
    }
    __syncwarp();
    cluster_arrive<kPair>();
    cluster_wait<kPair>();
    if (threadIdx.x >= kConsumers * kGroupThreads) {
        lower_registers<kCopyRegisters>();
        if (threadIdx.x == kConsumers * kGroupThreads)
            copy_all<T, kDx>(p, memory, own);
    } else {
        raise_registers<kProductRegisters>();
        multiply_all<T, kDx>(p, memory, own);
    }
    __syncwarp();
    cluster_arrive<kPair>();
    cluster_wait<kPair>();  // nobody leaves while the other copies here or arrives here
#else
    __trap();  // the launcher keeps launches away from here
#endif
}

}  // namespace
}  // namespace ckf

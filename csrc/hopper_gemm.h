// A matrix product with the Multi-LoRA update inside, for sm_90a: written once, rounded once.
//   forward  y (m, n) = x W^T + bias + H B^T   x (m, k), W (n, k), H (m, r), B^T (r, n)
//   dx       y (m, n) = mask (H B) + x W       the same shapes but W (k, n): x is dy, H is dS
// Not yet run on a chip.
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
#pragma once

#include <algorithm>

#include "hopper.h"
#include "launchers.h"

namespace ckf {
namespace {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64;
constexpr int kStages = 4;
constexpr int kPair = 2;       // blocks of a cluster
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kGroupPairs = 8;  // pairs of row tiles that take their column tiles in turn
constexpr unsigned kXBytes = kTileM * kRowBytes, kWBytes = kTileN * kRowBytes;
constexpr unsigned kStageBytes = kXBytes + kWBytes;
constexpr unsigned kChunkBytes = kTileK * kRowBytes;  // 64 columns of an operand in rows of n
constexpr unsigned kSharedBytes = kAtomBytes + kStages * (kStageBytes + 16);  // two barriers each
// 168 a thread at the start: what the copying warpgroup gives up the other two take.
constexpr int kCopyRegisters = 40, kProductRegisters = 232;

template <typename T>
struct GemmArgs {
    TensorMap x, w, h, b;
    T* y;
    const T* bias;        // or null
    const int64_t* seed;  // or null: no dropout
    int64_t y_stride;
    int m, n, k, r;
    unsigned threshold;
    float scale;
};

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
template <bool kRowsOfN>
__device__ __forceinline__ void copy_tiles(const TensorMap& left, const TensorMap& right,
                                           int depth, int row, int column, int rank,
                                           const Memory& memory, Ring& ring) {
    constexpr unsigned kBoth = (1u << kPair) - 1;
#pragma unroll 1
    for (int start = 0; start < depth; start += kTileK) {
        const uint32_t full = memory.full(ring.stage);
        wait_barrier(memory.empty(ring.stage), ring.parity);
        expect_bytes(full, kStageBytes);
        load_tile(memory.x(ring.stage), left, full, start, row);
        const uint32_t to = memory.w(ring.stage) + rank * (kWBytes / kPair);
        const int own = column + rank * (kTileN / kPair);
        if constexpr (kRowsOfN) {
#pragma unroll
            for (int i = 0; i < kTileN / kPair / kRowElements; ++i)
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
    template <typename T, bool kRowsOfN, bool kStop>
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
                    product<T, kRowsOfN>(acc, a, b, add);
                    commit_products();  // a batch each: ptxas counts them without help
                    a += kDescriptorStep<false>;
                    b += kDescriptorStep<kRowsOfN>;
                    add = true;
                }
            } else {
                fence_products();
#pragma unroll
                for (int step = 0; step < kTileK / static_cast<int>(kStepK); ++step) {
                    product<T, kRowsOfN>(acc, a + step * kDescriptorStep<false>,
                                         b + step * kDescriptorStep<kRowsOfN>, add || step > 0);
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

// Word i of lane q becomes word q of lane i, within each four lanes.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int q) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
        const bool upper = q & distance;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & distance) continue;
            const uint32_t given = upper ? word[i] : word[i + distance];
            const uint32_t taken = __shfl_xor_sync(kFull, given, distance);
            if (upper)
                word[i] = taken;
            else
                word[i + distance] = taken;
        }
    }
}

// Eight 16-bit lanes of the mask for columns 8 * block .. (ckf/kernels/dropout.py).
__device__ __forceinline__ void philox(uint32_t block, uint32_t row, uint64_t seed,
                                       uint32_t (&c)[4]) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    c[0] = block, c[1] = row, c[2] = 0, c[3] = 0;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint32_t high0 = __umulhi(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
        const uint32_t high2 = __umulhi(c[2], 0xCD9E8D57u), low2 = c[2] * 0xCD9E8D57u;
        c[0] = high2 ^ c[1] ^ key0, c[1] = low2, c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

// A thread's part of a 64 x 256 fragment: acc[4 j + 2 h + e] is row `row` + 8 h, column
// `column` + 8 j + 2 (lane % 4) + e.
struct Place {
    int row, column, quad;
};

template <typename T>
__device__ __forceinline__ void mask_fragment(const GemmArgs<T>& p, const Place& at,
                                              float (&acc)[kFragment]) {
    const auto seed = static_cast<uint64_t>(*p.seed);
#pragma unroll
    for (int j = 0; j < kTileN / 8; j += 4) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t word[4];
            philox(at.column / 8 + j + at.quad, at.row + 8 * h, seed, word);
            transpose_quad(word, at.quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& low = acc[4 * (j + i) + 2 * h];
                float& high = acc[4 * (j + i) + 2 * h + 1];
                low = (word[i] & 0xffffu) >= p.threshold ? low * p.scale : 0.0f;
                high = word[i] >> 16 >= p.threshold ? high * p.scale : 0.0f;
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t word;
    memcpy(&word, pair, sizeof(word));
    return word;
}

template <typename T>
__device__ __forceinline__ void add_bias(const GemmArgs<T>& p, const Place& at,
                                         float (&acc)[kFragment]) {
#pragma unroll
    for (int j = 0; j < kTileN / 8; ++j) {
        const int column = at.column + 8 * j + 2 * at.quad;
        uint32_t word = 0;
        if (column < p.n) word = *reinterpret_cast<const uint32_t*>(p.bias + column);
        T pair[2];
        memcpy(pair, &word, sizeof(word));
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[4 * j + i] += to_float(pair[i % 2]);
    }
}

// Rounds and stores; n is a multiple of eight, so that eight columns are all inside or all outside.
template <typename T>
__device__ __forceinline__ void store_fragment(const GemmArgs<T>& p, const Place& at,
                                               const float (&acc)[kFragment]) {
    T* y = p.y + at.row * p.y_stride;
#pragma unroll
    for (int j = 0; j < kTileN / 8; j += 4) {
        const int column = at.column + 8 * (j + at.quad);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t word[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                word[i] = pack<T>(acc[4 * (j + i) + 2 * h], acc[4 * (j + i) + 2 * h + 1]);
            transpose_quad(word, at.quad);
            if (at.row + 8 * h < p.m && column < p.n)
                store_words(y + 8 * h * p.y_stride + column, word);
        }
    }
}

template <typename T, bool kDx>
__device__ __forceinline__ void copy_all(const GemmArgs<T>& p, const Memory& memory, int pairs,
                                         int columns, int rank) {
    Ring ring{0, 1};  // every stage is empty at first
#pragma unroll 1
    for (int i = blockIdx.x / kPair; i < pairs * columns; i += gridDim.x / kPair) {
        const Tile tile = tile_at(i, pairs, columns);
        const int row = (tile.pair * kPair + rank) * kTileM, column = tile.column * kTileN;
        if constexpr (kDx) {
            copy_tiles<true>(p.h, p.b, p.r, row, column, rank, memory, ring);
            copy_tiles<true>(p.x, p.w, p.k, row, column, rank, memory, ring);
        } else {
            copy_tiles<false>(p.x, p.w, p.k, row, column, rank, memory, ring);
            copy_tiles<true>(p.h, p.b, p.r, row, column, rank, memory, ring);
        }
    }
}

template <typename T, bool kDx>
__device__ __forceinline__ void multiply_all(const GemmArgs<T>& p, const Memory& memory,
                                             int pairs, int columns, int rank) {
    const int lane = threadIdx.x % kLanes;
    // the same for the warp, and so that the compiler knows it
    const int group = __shfl_sync(kFull, static_cast<int>(threadIdx.x / kGroupThreads), 0);
    const int warp = threadIdx.x % kGroupThreads / kLanes;
    Products products{memory, {0, 0}, lane, group * (kXBytes / kConsumers), -1, false};
    float acc[kFragment];
#pragma unroll 1
    for (int i = blockIdx.x / kPair; i < pairs * columns; i += gridDim.x / kPair) {
        const Tile tile = tile_at(i, pairs, columns);
        const Place at{(tile.pair * kPair + rank) * kTileM + group * 64 + warp * 16 + lane / 4,
                       tile.column * kTileN, lane % 4};
        products.add = false;
        if constexpr (kDx) {
            products.template multiply<T, true, true>(acc, p.r);
            if (p.seed != nullptr) {
                products.template finish<T>(acc);
                mask_fragment(p, at, acc);
            }
            products.template multiply<T, true, false>(acc, p.k);
        } else {
            products.template multiply<T, false, false>(acc, p.k);
            products.template multiply<T, true, true>(acc, p.r);
        }
        products.template finish<T>(acc);
        if (!kDx && p.bias != nullptr) add_bias(p, at, acc);
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
    const int rank = blockIdx.x % kPair;
    const int pairs = (p.m + kPair * kTileM - 1) / (kPair * kTileM);
    const int columns = (p.n + kTileN - 1) / kTileN;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            init_barrier(memory.full(stage), 1);
            init_barrier(memory.empty(stage), kPair * kConsumers * kGroupThreads / kLanes);
        }
        fence_barriers();
    }
    __syncwarp();
    cluster_arrive<kPair>();
    cluster_wait<kPair>();
    if (threadIdx.x >= kConsumers * kGroupThreads) {
        lower_registers<kCopyRegisters>();
        if (threadIdx.x == kConsumers * kGroupThreads)
            copy_all<T, kDx>(p, memory, pairs, columns, rank);
    } else {
        raise_registers<kProductRegisters>();
        multiply_all<T, kDx>(p, memory, pairs, columns, rank);
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

// Frozen linears and their Multi-LoRA for up to 64 rows (decode) on sm_90a, base and update in one
// pass over W:
//   y_l[i, :] = x[i, :] W_l^T + bias_l + sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b_l[c, :]
//
//   x (m, k), W_l (n_l, k), a (R, k), g (T, R) fp32, ids (m,), b_l (R_l, n_l), y_l (m, n_l); all
//   elements of 16 bits.
//
// W's bytes are what it costs. A block owns spans of kTile columns of n, over all of k; one thread
// copies tiles of x, W and A through a ring in shared memory (TMA), as far ahead as the ring is
// long, and never stops for the update. To the product the rows of A are further rows of W: one
// instruction (WGMMA 64 x (kTile + 16) x 16) multiplies both, so S costs no second pass over x. The
// columns of A are shared out over a cluster of eight blocks; with many rows a group of them shares
// the reading of x, each bringing some rows to all of the group.
// At the end of k each block adds up and gates its columns of S, sends h to the other seven, and adds
// h b to its columns of y. Warpgroups take the tiles in turn, so y and S are sums of kTeams parts,
// always in the same order. A row's bits depend on the shapes and that row alone. A gate of zero
// selects: h is then -0, which is never added.
#pragma once

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
constexpr int kTeams = 2;         // warpgroups that multiply
constexpr int kTeamWarps = kGroupThreads / kLanes;
constexpr int kConsumers = kTeams * kGroupThreads;
constexpr int kThreads = kConsumers + kLanes;
constexpr int kElements = (kRows * kShare + kConsumers - 1) / kConsumers;  // of S, of a thread
constexpr int kHPitch = kShare + 4;      // floats: rows of h in different banks, 16 bytes each
constexpr uint32_t kDead = 0x80000000u;  // -0 in h: the gate is zero; a live h is never -0
constexpr int kInvalid = -2;             // the task of a row that becomes NaN; -1: base only
constexpr uint32_t kTf32 = 0xffffe000u;  // the bits of a float32 that a tensor core reads
constexpr unsigned kMostShared = 227 * 1024;
constexpr unsigned kXBytes = kRows * kRowBytes, kABytes = kShare * kRowBytes;

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
    int group;   // blocks that bring each other rows of x
    int x_rows;  // that one of them brings
    int share;   // columns of A that one copy brings, 0: there are none
};

// What is not part of the ring.
template <int kTile>
struct alignas(16) Tail {
    static constexpr int kPitch = (kTile + 7) / 16 * 16 + 8;  // no two lanes of a store share a bank
    float part[kTeams][kRows][kPitch];       // of S first, then of y
    float h[kCluster][kRows][kHPitch];       // by the block that made it
    uint16_t b[kMostRank][kPitch];
    float bias[kTile];
    int task[kRows];
};

template <int kTile>
struct Memory {
    static constexpr unsigned kWBytes = kTile * kRowBytes;
    static constexpr unsigned kStageBytes = kXBytes + kWBytes + kABytes;
    static constexpr unsigned kOthers = kAtomBytes + sizeof(Tail<kTile>) + 512;
    static constexpr int kStages = (kMostShared - kOthers) / kStageBytes;
    static constexpr unsigned kBytes = kOthers + kStages * kStageBytes;
    static_assert(kStages >= 4 && 16 * kStages + 8 <= 512, "barriers have 512 bytes");

    uint32_t base;
    __device__ __forceinline__ uint32_t x(int stage) const { return base + stage * kStageBytes; }
    __device__ __forceinline__ uint32_t w(int stage) const { return x(stage) + kXBytes; }
    __device__ __forceinline__ uint32_t a(int stage) const { return w(stage) + kWBytes; }
    __device__ __forceinline__ uint32_t full(int stage) const {
        return base + kStages * kStageBytes + 8 * stage;
    }
    __device__ __forceinline__ uint32_t empty(int stage) const { return full(kStages + stage); }
    __device__ __forceinline__ uint32_t arrivals() const { return full(2 * kStages); }
    __device__ __forceinline__ uint32_t tail() const { return full(64); }
};

struct Block {
    int linear, rank;            // rank: in the cluster
    int first_n, spans;          // spans: those of the cluster
    int first_column, columns;   // of A's, within the linear
    int chunks;                  // of k
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

template <typename T>
__device__ __forceinline__ int find_task(const Args<T>& p, int row) {
    const int64_t id = row < p.m ? p.task_ids[row] : int64_t{-1};
    return id >= -1 && id < p.tasks ? static_cast<int>(id) : kInvalid;
}

#ifdef CKF_HAS_WGMMA
#ifdef CKF_HOST_SHIM
inline const bool clusters_in_turn = [] { return ckf_host::together = false, true; }();
#endif

// One thread: the tiles of all spans, as stages become empty.
template <typename T, int kTile>
struct Copier {
    using M = Memory<kTile>;
    const Args<T>& p;
    const Block& block;
    const M& memory;

    // A tile and where it goes; its turn through the ring, as a barrier's parity.
    struct Step {
        int span, depth, stage;
        unsigned parity;
        __device__ __forceinline__ void next(int k) {
            depth += kRowElements;
            if (depth >= k) depth = 0, ++span;
            if (++stage == M::kStages) stage = 0, parity ^= 1;
        }
    };

    // The block's own operands, and the bytes that a stage waits for.
    __device__ __forceinline__ void bring_own(const Step& to) const {
        const uint32_t full = memory.full(to.stage);
        const Linear<T>& linear = p.linears[block.linear];
        const int x_rows = (p.m + p.x_rows - 1) / p.x_rows * p.x_rows;
        const int a_rows = to.span == 0 ? p.share : 0;
        expect_bytes(full, (x_rows + kTile + a_rows) * kRowBytes);
        load_tile(memory.w(to.stage), linear.w, full, to.depth, block.first_n + to.span * kTile);
        if (a_rows > 0)
            load_tile(memory.a(to.stage), p.a, full, to.depth,
                      linear.first_column + block.first_column);
    }

    // The block's rows of x, to all of its group.
    __device__ __forceinline__ void bring_x(const Step& to) const {
        const int place = block.rank % p.group, row = place * p.x_rows;
        const unsigned all = ((1u << p.group) - 1) << (block.rank - place);
        const uint32_t x = memory.x(to.stage) + row * kRowBytes, full = memory.full(to.stage);
        if (p.group == 1)
            load_tile(x, p.x, full, to.depth, 0);
        else if (row < p.m)
            load_tile_for(all, x, p.x, full, to.depth, row);
    }

    // What needs no other block's barriers. `ahead` tiles fill the ring.
    __device__ __forceinline__ void begin(int ahead) const {
        Step step{0, 0, 0, 1};  // every stage is empty at first
#pragma unroll 1
        for (int i = 0; i < ahead; ++i, step.next(p.k)) {
            bring_own(step);
            if (p.group == 1) bring_x(step);
        }
    }

    __device__ __forceinline__ void run(int ahead, int all) const {
        Step step{0, 0, 0, 1};  // every stage is empty at first
#pragma unroll 1
        for (int i = 0; i < ahead; ++i, step.next(p.k))
            if (p.group > 1) bring_x(step);
#pragma unroll 1
        for (int i = ahead; i < all; ++i, step.next(p.k)) {
            wait_barrier(memory.empty(step.stage), step.parity);
            bring_own(step);
            bring_x(step);
        }
        if (all < M::kStages) step = Step{0, 0, 0, 0};
        // What others still have to say to this block's barriers, before it may leave.
#pragma unroll 1
        for (int i = 0; i < ahead; ++i, step.next(p.k))
            wait_barrier(memory.empty(step.stage), step.parity);
    }
};

// A thread of the warpgroups that multiply.
template <typename T, int kTile>
struct Consumer {
    using M = Memory<kTile>;
    static constexpr int kColumns = kTile + kShare;
    const Args<T>& p;
    const Linear<T>& linear;
    const Block& block;
    const M& memory;
    Tail<kTile>& tail;
    int team, warp, lane;  // warp: in the team
    int row, quad;         // of the thread's part of a product: `row` and the eighth after it

    __device__ __forceinline__ void release(int stage) const {
        if (lane < p.group)
            arrive_at(memory.empty(stage), block.rank / p.group * p.group + lane);
    }

    // This team's part of x (W, A)^T in a span.
    __device__ __forceinline__ void multiply(float (&acc)[kFragment], int span) const {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
        int held = -1;  // a stage whose products may be in flight
#pragma unroll 1
        for (int i = span * block.chunks + team; i < (span + 1) * block.chunks; i += kTeams) {
            const int stage = i % M::kStages;
            wait_barrier(memory.full(stage), i / M::kStages & 1);
            const uint64_t a = rows_of_k(memory.x(stage)), b = rows_of_k(memory.w(stage));
            fence_products();
#pragma unroll
            for (int step = 0; step < kRowElements / static_cast<int>(kStepK); ++step)
                product<T, false, kColumns>(acc, a + step * kDescriptorStep<false>,
                                            b + step * kDescriptorStep<false>, true);
            commit_products();
            wait_products<1, T>(acc);
            if (held >= 0) release(held);
            held = stage;
        }
        wait_products<0, T>(acc);
        if (held >= 0) release(held);
    }

    // Columns [kFirst, kFirst + kCount) of the sums, where others find them.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void write_part(const float (&acc)[kFragment]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < kCount / 8; ++j) {
                const float* from = acc + 4 * (kFirst / 8 + j) + 2 * half;
                float* to = &tail.part[team][row + 8 * half][8 * j + 2 * quad];
                *reinterpret_cast<Pair*>(to) = {{from[0], from[1]}};
            }
        }
    }

    __device__ __forceinline__ float add_parts(int at_row, int column) const {
        float sum = tail.part[0][at_row][column];
#pragma unroll
        for (int i = 1; i < kTeams; ++i) sum += tail.part[i][at_row][column];
        return sum;
    }

    // The gates of the thread's elements of S.
    __device__ __forceinline__ void load_gates(float (&gate)[kElements]) const {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kConsumers;
            const int task = find_task(p, at / kShare), column = at % kShare;
            gate[i] = 0.0f;
            if (task >= 0 && column < block.columns)
                gate[i] = p.gates[static_cast<int64_t>(task) * p.rank + linear.first_column +
                                  block.first_column + column];
        }
    }

    // h of this block's columns of A, in its own place of tail.h.
    __device__ __forceinline__ void make_h(const float (&gate)[kElements]) const {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            const int at = static_cast<int>(threadIdx.x) + i * kConsumers;
            const int at_row = at / kShare, column = at % kShare;
            if (at_row >= p.m) continue;
            const float s = add_parts(at_row, column);
            tail.h[block.rank][at_row][column] =
                gate[i] != 0.0f ? without_sign_of_zero(gate[i] * s) : float_of(kDead);
        }
    }

    // It, to the other blocks.
    __device__ __forceinline__ void send_h() const {
        const auto to = static_cast<int>(threadIdx.x);
        if (to >= kCluster || to == block.rank) return;
        const uint32_t own = shared_address(&tail.h[block.rank][0][0]);
        send_rows(own, p.m * kHPitch * sizeof(float), memory.arrivals(), to);
    }

    // This block's columns of b for a span, on their way, and the bias.
    __device__ __forceinline__ void copy_b(int span) const {
        const int first = block.first_n + span * kTile;
        constexpr int kPieces = kTile / kVec<T>;
        for (int i = threadIdx.x; i < linear.rank * kPieces; i += kConsumers) {
            const int column = i / kPieces, at = i % kPieces * kVec<T>;
            const T* from = linear.b + static_cast<int64_t>(column) * linear.n + first + at;
            T* to = reinterpret_cast<T*>(&tail.b[column][at]);
            if (linear.aligned_b && first + at < linear.n)
                copy_async<16>(to, from);
            else
                for (int v = 0; v < kVec<T>; ++v)
                    to[v] = first + at + v < linear.n ? from[v] : from_float<T>(0.0f);
        }
        for (int i = threadIdx.x; i < kTile; i += kConsumers)
            tail.bias[i] = linear.bias != nullptr && first + i < linear.n
                               ? to_float(linear.bias[first + i])
                               : 0.0f;
    }

    __device__ __forceinline__ float b_at(int column, int at) const {
        T value;
        memcpy(&value, &tail.b[column][at], sizeof(value));
        return to_float(value);
    }

    // h b over the team's share of the blocks that made h, on tensor cores: h as a sum of two tf32
    // values, 21 bits of it. Whether all was finite; what was not is left to add_wild.
    __device__ __forceinline__ bool add_update(float (&acc)[kFragment]) const {
        constexpr int kDepth = 8;  // of a product
        const int columns = (linear.rank + kCluster - 1) / kCluster;
        bool tame = true;
#pragma unroll 1
        for (int from = team; from < kCluster; from += kTeams) {
            const int first = from * columns, count = min(columns, linear.rank - first);
#pragma unroll 1
            for (int c = 0; c < count; c += kDepth) {
                float high[4], low[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at_row = row + i % 2 * 8;
                    const float h = tail.h[from][at_row][c + quad + i / 2 * 4];
                    const bool exists = at_row < p.m, counts = exists && is_finite(h);
                    tame = tame && counts == exists;
                    high[i] = counts ? float_of(bits_of(h) & kTf32) : 0.0f;
                    low[i] = counts ? h - high[i] : 0.0f;
                }
#pragma unroll
                for (int j = 0; j < kTile / 8; ++j) {
                    float b[2], d[4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {  // past the share h is dead
                        const int at = first + min(c + quad + i * 4, count - 1);
                        b[i] = b_at(at, 8 * j + lane / 4);
                        const bool counts = is_finite(b[i]);
                        tame = tame && counts;
                        if (!counts) b[i] = 0.0f;
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) d[i] = acc[4 * j + i];
                    product_tf32(d, high, b[0], b[1]);
                    product_tf32(d, low, b[0], b[1]);
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[4 * j + i] = d[i];
                }
            }
        }
        return tame;
    }

    // The products with an infinity or a NaN, where the gate is not zero.
    __device__ __forceinline__ void add_wild(float (&acc)[kFragment]) const {
        const int columns = (linear.rank + kCluster - 1) / kCluster;
#pragma unroll 1
        for (int from = team; from < kCluster; from += kTeams) {
            const int first = from * columns, count = min(columns, linear.rank - first);
#pragma unroll 1
            for (int c = 0; c < count; ++c) {
#pragma unroll
                for (int i = 0; i < kTile / 2; ++i) {
                    const float h = tail.h[from][row + i / 2 % 2 * 8][c];
                    const float b = b_at(first + c, 8 * (i / 4) + 2 * quad + i % 2);
                    if (bits_of(h) != kDead && !(is_finite(h) && is_finite(b)))
                        acc[i] = fmaf(h, b, acc[i]);
                }
            }
        }
    }

    __device__ __forceinline__ void write_y(int span) const {
        const int first = block.first_n + span * kTile;
#pragma unroll 2
        for (int i = threadIdx.x; i < p.m * kTile; i += kConsumers) {
            const int at_row = i / kTile, column = i % kTile;
            if (first + column >= linear.n) continue;
            const float sum = add_parts(at_row, column) + tail.bias[column];
            linear.y[at_row * linear.y_stride + first + column] =
                from_float<T>(tail.task[at_row] == kInvalid ? nanf("") : sum);
        }
    }

    // All of it, but for the second half of the cluster's last barrier.
    __device__ __forceinline__ void run(const float (&gate)[kElements]) const {
        float acc[kFragment];
#pragma unroll 1
        for (int span = 0; span < block.spans; ++span) {
            multiply(acc, span);
            if (span == 0 && warp * 16 < p.m) write_part<kTile, kShare>(acc);
            wait_for_copies();
            sync_threads<kConsumers>();
            if (span == 0) {
                make_h(gate);
                fence_shared_for_copies();
                sync_threads<kConsumers>();
                send_h();
                wait_barrier(memory.arrivals(), 0);
            }
            if (span + 1 == block.spans) {
                __syncwarp();
                cluster_begin();
            }
            if (warp * 16 < p.m) {
                const bool tame = add_update(acc);
                if (__ballot_sync(kFull, !tame) != 0) add_wild(acc);
                write_part<0, kTile>(acc);
            }
            sync_threads<kConsumers>();
            write_y(span);
            if (span + 1 < block.spans) {
                sync_threads<kConsumers>();  // what write_y reads of the bias
                copy_b(span + 1);
            }
        }
    }
};

#endif

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads, 1)
    decode_wgmma_kernel(const __grid_constant__ Args<T> p) {
#ifdef CKF_HAS_WGMMA
    using M = Memory<kTile>;
    CKF_DYNAMIC_SHARED(bytes);
    const uint32_t start = shared_address(bytes);  // the same in all blocks, as multicast needs
    const M memory{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes};
    auto& tail = *reinterpret_cast<Tail<kTile>*>(bytes + (memory.tail() - start));
    const Block block = find_block<kTile>(p);
    const int thread = threadIdx.x, tiles = block.spans * block.chunks;
    const int ahead = min(tiles, M::kStages);
    const Copier<T, kTile> copier{p, block, memory};
    const bool copies = thread == kConsumers;
    if (copies) {
        for (int stage = 0; stage < M::kStages; ++stage) {
            init_barrier(memory.full(stage), 1);
            init_barrier(memory.empty(stage), p.group * kTeamWarps);
        }
        init_barrier(memory.arrivals(), 1);
        fence_barriers();
        expect_bytes(memory.arrivals(), (kCluster - 1) * p.m * kHPitch * sizeof(float));
        prefetch_map(p.x);
        copier.begin(ahead);
    }
    __syncwarp();
    cluster_begin();
    const int team = __shfl_sync(kFull, thread / kGroupThreads, 0);  // the same for the warp
    const int warp = thread % kGroupThreads / kLanes, lane = thread % kLanes;
    const Consumer<T, kTile> consumer{p,    p.linears[block.linear],  block,   memory, tail, team,
                                      warp, lane, warp * 16 + lane / 4, lane % 4};
    float gate[kElements];
    if (team < kTeams) {
        consumer.load_gates(gate);
        consumer.copy_b(0);
        if (thread < kRows) tail.task[thread] = find_task(p, thread);
    }
    cluster_wait<kCluster>();  // all barriers are there
    if (team < kTeams) {
        consumer.run(gate);
    } else {
        if (copies) copier.run(ahead, tiles);
        __syncwarp();
        cluster_begin();
    }
    cluster_wait<kCluster>();  // nobody leaves while others copy or arrive here, or copy its h
#else
    __trap();  // the launcher keeps launches away from here
#endif
}

}  // namespace decode_wgmma
}  // namespace
}  // namespace ckf

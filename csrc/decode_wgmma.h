// Frozen linears and their Multi-LoRA for up to 64 rows (decode) on sm_90a, base and update in one
// pass over W:
//   y_l[i, :] = x[i, :] W_l^T + bias_l + sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b_l[c, :]
//
//   x (m, k), W_l (n_l, k), a (R, k), g (T, R) fp32, ids (m,), b_l (R_l, n_l), y_l (m, n_l); all
//   elements of 16 bits.
//
// W's bytes are what it costs. A block owns spans of kTile columns of n, over all of k; three threads
// copy tiles of x, W and A through a ring in shared memory (TMA), as far ahead as the ring is
// long, and never stop for the update. To the product the rows of A are further rows of W: one
// instruction (WGMMA 64 x (kTile + 16) x 16) multiplies both, so S costs no second pass over x. The
// columns of A are shared out over a cluster of eight blocks.
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
constexpr int kThreads = kConsumers + kGroupThreads;
// What the warps after those that multiply do: a thread each copies tiles of W, x and A; one warp
// makes b ready.
enum Role : int { kCopiesW, kCopiesX, kCopiesA, kReadiesB };
constexpr int kElements = (kRows * kShare + kConsumers - 1) / kConsumers;  // of S, of a thread
constexpr int kHPitch = kShare + 4;      // floats: rows of h in different banks, 16 bytes each
constexpr uint32_t kDead = 0x80000000u;  // -0 in h: the gate is zero; a live h is never -0
constexpr int kInvalid = -2;             // the task of a row that becomes NaN; -1: base only
constexpr uint32_t kTf32 = 0xffffe000u;  // the bits of a float32 that a tensor core reads
constexpr unsigned kMostShared = 227 * 1024;
constexpr unsigned kABytes = kShare * kRowBytes;
constexpr int kMostStages = 16;
constexpr unsigned kBarrierBytes = 512;
static_assert(8 * (2 * kMostStages + 3) <= kBarrierBytes);

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
    static constexpr int kPitch = (kTile + 7) / 16 * 16 + 8;  // no two lanes of a store share a bank
    float part[kTeams][kRows][kPitch];       // of S first, then of y
    float h[kCluster][kRows][kHPitch];       // by the block that made it
    float b[kMostRank][kPitch];  // zero for what is not finite
    float bias[kTile];
    int task[kRows];
    int wild;                                // whether something of b was not finite
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
    // A product reads kRows of x. Those that are not there are whatever follows in memory, which the
    // rows of y that are not there see alone; the last stage's lie within the ring too.
    static __host__ __device__ constexpr int stages(int x_rows) {
        const unsigned beyond = (kRows - x_rows) * kRowBytes;
        const unsigned behind = beyond > kWBytes + kABytes ? beyond - kWBytes - kABytes : 0;
        const int fit = static_cast<int>((kRingBytes - behind) / stage_bytes(x_rows));
        return fit < kMostStages ? fit : kMostStages;
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
            const Pack<T> pack = linear.aligned_b ? load<T, true>(from, left) : load<T, false>(from, left);
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
        if (lane == 0) arrive_at(memory.empty(stage), block.rank);
    }

    // This team's part of x (W, A)^T in a span: every kTeams-th tile, `step` being the next.
    __device__ __forceinline__ void multiply(float (&acc)[kFragment], Step& step) const {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) acc[i] = 0.0f;
        int held = -1;  // a stage whose products may be in flight
#pragma unroll 1
        for (int i = 0; i < block.chunks; ++i, step.next(p.k, p.stages)) {
            if (i % kTeams != team) continue;
            wait_barrier(memory.full(step.stage), step.parity);
            const uint64_t a = rows_of_k(memory.x(step.stage));
            const uint64_t b = rows_of_k(memory.w(step.stage));
            fence_products();
#pragma unroll
            for (int at = 0; at < kRowElements / static_cast<int>(kStepK); ++at)
                product<T, false, kColumns>(acc, a + at * kDescriptorStep<false>,
                                            b + at * kDescriptorStep<false>, true);
            commit_products();
            wait_products<1, T>(acc);
            if (held >= 0) release(held);
            held = step.stage;
        }
        wait_products<0, T>(acc);
        if (held >= 0) release(held);
    }

    // Columns [kFirst, kFirst + kCount) of the sums, where others find them: rows from `to` on.
    template <int kFirst, int kCount>
    __device__ __forceinline__ void write_part(const float (&acc)[kFragment], int to_row) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < kCount / 8; ++j) {
                const float* from = acc + 4 * (kFirst / 8 + j) + 2 * half;
                float* to = &tail.part[team][to_row + 8 * half][8 * j + 2 * quad];
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

    // h b over the columns of A of one block, on tensor cores, of rows at_row and the eighth after
    // it: h as a sum of two tf32 values, 21 bits of it. Whether h was finite.
    __device__ __forceinline__ bool update_from(int from, int at_row,
                                                float (&sums)[kTile / 8][4]) const {
        constexpr int kDepth = 8;  // of a product
        const int columns = (linear.rank + kCluster - 1) / kCluster, first = from * columns;
        const int count = min(columns, linear.rank - first);
        bool tame = true;
#pragma unroll
        for (int c = 0; c < kShare; c += kDepth) {
            if (c >= count) break;
            float high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool exists = at_row + i % 2 * 8 < p.m;
                const float h = tail.h[from][at_row + i % 2 * 8][c + quad + i / 2 * 4];
                const bool counts = exists && is_finite(h);
                tame = tame && counts == exists;
                high[i] = counts ? float_of(bits_of(h) & kTf32) : 0.0f;
                low[i] = counts ? h - high[i] : 0.0f;
            }
            const float* b[2];  // past the share h is dead
#pragma unroll
            for (int i = 0; i < 2; ++i)
                b[i] = &tail.b[first + min(c + quad + i * 4, count - 1)][lane / 4];
#pragma unroll
            for (int j = 0; j < kTile / 8; ++j) product_tf32(sums[j], high, b[0][8 * j], b[1][8 * j]);
#pragma unroll
            for (int j = 0; j < kTile / 8; ++j) product_tf32(sums[j], low, b[0][8 * j], b[1][8 * j]);
        }
        return tame;
    }

    // The products with an infinity or a NaN, where the gate is not zero.
    __device__ __forceinline__ void add_wild(int from, int at_row, int span,
                                             float (&sums)[kTile / 8][4]) const {
        const int columns = (linear.rank + kCluster - 1) / kCluster, first = from * columns;
        const int count = min(columns, linear.rank - first);
        const int first_n = block.first_n + span * kTile + 2 * quad;
#pragma unroll 1
        for (int c = 0; c < count; ++c) {
            const T* own = linear.b + static_cast<int64_t>(first + c) * linear.n + first_n;
#pragma unroll
            for (int i = 0; i < kTile / 2; ++i) {
                const float h = tail.h[from][at_row + i / 2 % 2 * 8][c];
                const int n = 8 * (i / 4) + i % 2;
                const float b = first_n + n < linear.n ? to_float(own[n]) : 0.0f;
                if (bits_of(h) != kDead && !(is_finite(h) && is_finite(b)))
                    sums[i / 4][i % 4] = fmaf(h, b, sums[i / 4][i % 4]);
            }
        }
    }

    // The update of a share that is `from`, from zero on.
    __device__ __forceinline__ void make_update(int from, int at_row, int span,
                                                float (&sums)[kTile / 8][4]) const {
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) sums[i / 4][i % 4] = 0.0f;
        const bool tame = update_from(from, at_row, sums) && tail.wild == 0;
        if (__ballot_sync(kFull, !tame) != 0) add_wild(from, at_row, span, sums);
    }

    // y of the team's tiles and the updates of its share of the blocks, where others find it: base
    // and four updates u, added as ((base + u0) + u1) + (u2 + u3) whoever does it. Up to 16 rows each
    // warp makes one of these; else each has 16 rows.
    __device__ __forceinline__ void write_parts(float (&acc)[kFragment], int span) const {
        static_assert(kCluster == 4 * kTeams && kTeamWarps == 4);
        float sums[kTile / 8][4];
        const auto add = [&] {
#pragma unroll
            for (int i = 0; i < kTile / 2; ++i) acc[i] += sums[i / 4][i % 4];
        };
        if (p.m <= 16) {
            make_update(team + warp * kTeams, lane / 4, span, sums);
            if (warp > 0) {
#pragma unroll
                for (int i = 0; i < kTile / 2; ++i) acc[i] = 0.0f;
            }
            add();
            write_part<0, kTile>(acc, row);
        } else if (warp * 16 < p.m) {
            make_update(team, row, span, sums);
            add();
            make_update(team + kTeams, row, span, sums);
            add();
            make_update(team + 2 * kTeams, row, span, sums);
            float other[kTile / 8][4];
            make_update(team + 3 * kTeams, row, span, other);
#pragma unroll
            for (int i = 0; i < kTile / 2; ++i) sums[i / 4][i % 4] += other[i / 4][i % 4];
            add();
            write_part<0, kTile>(acc, row);
        }
    }

    // What write_parts has written, added up.
    __device__ __forceinline__ float add_updated(int at_row, int column) const {
        if (p.m > 16) return add_parts(at_row, column);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kTeams; ++i) {
            const auto& part = tail.part[i];
            const float one = (part[at_row][column] + part[16 + at_row][column]) +
                              (part[32 + at_row][column] + part[48 + at_row][column]);
            sum = i == 0 ? one : sum + one;
        }
        return sum;
    }

    __device__ __forceinline__ void write_y(int span) const {
        const int first = block.first_n + span * kTile;
#pragma unroll 2
        for (int i = threadIdx.x; i < p.m * kTile; i += kConsumers) {
            const int at_row = i / kTile, column = i % kTile;
            if (first + column >= linear.n) continue;
            const float sum = add_updated(at_row, column) + tail.bias[column];
            linear.y[at_row * linear.y_stride + first + column] =
                from_float<T>(tail.task[at_row] == kInvalid ? nanf("") : sum);
        }
    }

    // All of it, but for the second half of the cluster's last barrier.
    __device__ __forceinline__ void run(const float (&gate)[kElements]) const {
        float acc[kFragment];
        Step step{0, 0, 0, 0};
#pragma unroll 1
        for (int span = 0; span < block.spans; ++span) {
            multiply(acc, step);
            if (span == 0) {
                if (warp * 16 < p.m) write_part<kTile, kShare>(acc, row);
                sync_threads<kConsumers>();
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
            wait_barrier(memory.b_ready(), span & 1);
            write_parts(acc, span);
            sync_threads<kConsumers>();
            write_y(span);
            if (span + 1 < block.spans) {
                arrive_at(memory.b_read(), block.rank);
                sync_threads<kConsumers>();  // the parts are read
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
    const uint32_t start = shared_address(bytes);  // the same in all blocks
    const M memory{(start + kAtomBytes - 1) / kAtomBytes * kAtomBytes, p.x_rows * kRowBytes,
                   M::stage_bytes(p.x_rows)};
    auto& tail = *reinterpret_cast<Tail<kTile>*>(bytes + (memory.tail() - start));
    const Block block = find_block<kTile>(p);
    const int thread = threadIdx.x;
    const int team = __shfl_sync(kFull, thread / kGroupThreads, 0);  // the same for the warp
    const int warp = __shfl_sync(kFull, thread % kGroupThreads / kLanes, 0);
    const int lane = thread % kLanes;
    const Copier<T, kTile> copier(p, block, memory);
    const bool copies = team == kTeams && lane == 0 && warp != kReadiesB;
    if (copies && warp == kCopiesW) {
        for (int stage = 0; stage < p.stages; ++stage) {
            init_barrier(memory.full(stage), 1);
            init_barrier(memory.empty(stage), kTeamWarps);
        }
        init_barrier(memory.arrivals(), 1);
        init_barrier(memory.b_ready(), kLanes);
        init_barrier(memory.b_read(), kConsumers);
        fence_barriers();
        expect_bytes(memory.arrivals(), (kCluster - 1) * p.m * kHPitch * sizeof(float));
        copier.begin();
    }
    __syncwarp();
    cluster_begin();
    const Linear<T>& linear = p.linears[block.linear];
    const Consumer<T, kTile> consumer{p,    linear, block, memory, tail,
                                      team, warp,   lane,  warp * 16 + lane / 4, lane % 4};
    float gate[kElements];
    if (team < kTeams) {
        consumer.load_gates(gate);
        if (thread < kRows) tail.task[thread] = find_task(p, thread);
    }
    cluster_wait<kCluster>();  // all barriers are there
    if (team < kTeams) {
        consumer.run(gate);
    } else {
        if (copies) copier.run(warp);
        if (warp == kReadiesB) ready_b(linear, block, memory, tail);
        __syncwarp();
        cluster_begin();
    }
    cluster_wait<kCluster>();  // nobody leaves while its h is copied
#else
    __trap();  // the launcher keeps launches away from here
#endif
}

}  // namespace decode_wgmma
}  // namespace
}  // namespace ckf

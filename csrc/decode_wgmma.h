// Frozen linears and their Multi-LoRA for up to 64 rows (decode) on sm_90a, base and update in one
// pass over W:
//   y_l[i, :] = x[i, :] W_l^T + bias_l + sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b_l[c, :]
//
//   x (m, k), W_l (n_l, k), a (R, k), g (T, R) fp32, ids (m,), b_l (R_l, n_l), y_l (m, n_l); all
//   elements of 16 bits.
//
// W's bytes are what it costs. A block owns spans of kTile columns of n, over all of k; three
// threads copy tiles of x, W and A through a ring in shared memory (TMA), as far ahead as the ring
// is long, and never stop for the update. To the product the rows of A are further rows of W: one
// instruction (WGMMA 64 x (kTile + 16) x 16) multiplies both, so S costs no second pass over x. The
// columns of A are shared out over a cluster of eight blocks.
// At the end of k each block adds up and gates its columns of S, sends h to the other seven, and
// adds h b to its columns of y. Warpgroups take the tiles in turn, so y and S are sums of kTeams
// parts, always in the same order. A row's bits depend on the shapes and that row alone. A gate of
// zero selects: h is then -0, which is never added.
#pragma once

#include "decode_wgmma_copy.h"

namespace ckf {
namespace {
namespace decode_wgmma {

#ifdef CKF_HAS_WGMMA

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
            for (int j = 0; j < kTile / 8; ++j)
                product_tf32(sums[j], high, b[0][8 * j], b[1][8 * j]);
#pragma unroll
            for (int j = 0; j < kTile / 8; ++j)
                product_tf32(sums[j], low, b[0][8 * j], b[1][8 * j]);
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
    // and four updates u, added as ((base + u0) + u1) + (u2 + u3) whoever does it. Up to 16 rows
    // each warp makes one of these; else each has 16 rows.
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
    const Consumer<T, kTile> consumer{
        p, linear, block, memory, tail, team, warp, lane, warp * 16 + lane / 4, lane % 4};
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

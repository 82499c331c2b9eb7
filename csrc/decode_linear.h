// Frozen linears and their Multi-LoRA for few rows (decode), base and update in one pass over W:
//   y_l[i, :] = x[i, :] W_l^T + bias_l + sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b_l[c, :]
//
//   x (m, k), W_l (n_l, k), a (R, k), g (T, R) fp32, ids (m,), b_l (R_l, n_l), y_l (m, n_l); all
//   elements of 16 bits.
//
// W's bytes are what it costs; the rows of A are to the product no more than further rows of W. A
// cluster of eight blocks owns spans of n of one linear. Each block multiplies its eighth of k: A
// first, then span by span of W, whose beginning is on its way to L2 meanwhile. Every block adds up
// a share of S, gates it and gives h to all; and it owns an eighth of the span's columns, to which
// the others send their partial sums. There h b is added and y rounded once.
//
// Nothing goes through shared memory before it is multiplied: the order of k within a product is
// free, so a lane's fragments are 16 bytes that lie side by side (mma.h). A row's bits depend on
// the shapes and that row alone. A gate of zero selects: h is then -0, which is never added.
#pragma once

#include "decode_linear_plan.h"
#include "mma.h"

namespace ckf {
namespace {
namespace decode_linear {

// Rows of x, of A or of W as a lane reads them: its first, then every so many further.
template <typename T>
struct Rows {
    const T* first;
    int64_t step;  // in elements
    int left;      // of the matrix, from the first on
};

// A warp's tiles of a span: of A in phase 0, of W from 1 on; none past the last.
template <typename T>
struct Tiles {
    Rows<T> rows;
    int count;
};

template <typename P, typename T>
__device__ __forceinline__ Tiles<T> find_tiles(const Args<T>& p, const Block<T>& block, int phase) {
    const Linear<T>& linear = block.linear;
    const bool of_a = phase == 0;
    const int64_t stride = of_a ? p.k : linear.w_stride;
    const T* base = of_a ? p.a + static_cast<int64_t>(linear.first_column) * p.k : linear.w;
    const int first = of_a ? 0 : block.first_n + (phase - 1) * P::kSpan;
    const int left = (of_a ? linear.rank : linear.n) - first - block.warp * kTile;  // of the warp
    constexpr int kStep = P::kWarps * kTile;
    const int count = phase > block.spans || left <= 0 ? 0 : (left + kStep - 1) / kStep;
    const int row = first + block.warp * kTile + block.lane / 4;
    return {{base + row * stride + block.first_k + block.lane % 4 * 8, kStep * stride,
             left - block.lane / 4},
            min(count, kTiles)};
}

// A lane's operands of two products: words 0 and 1, words 2 and 3.
template <typename P>
struct Chunk {
    Words<4> x[2 * P::kRowTiles], w[kTiles];
};

// Of k or of a matrix what is not there is zero.
template <typename P, typename T>
__device__ __forceinline__ void load_chunk(const Args<T>& p, const Block<T>& block,
                                           const Rows<T>& x, const Tiles<T>& tiles, int i,
                                           Chunk<P>& chunk) {
    const int at = i * kChunk;
    const bool inside =
        tiles.count > 0 && i < block.chunks && block.first_k + at + block.lane % 4 * 8 < p.k;
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
        chunk.w[j] = load_once(inside && j * P::kWarps * kTile < tiles.rows.left,
                               tiles.rows.first + (at + j * tiles.rows.step));
#pragma unroll
    for (int h = 0; h < 2 * P::kRowTiles; ++h)
        chunk.x[h] = load_if<Words<4>>(inside && h * 8 < x.left, x.first + (at + h * x.step));
}

template <typename T, typename P>
__device__ __forceinline__ void multiply(const Chunk<P>& chunk, int count,
                                         float (&sums)[kTiles][P::kRowTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        if (j >= count) break;  // the same for the whole warp
#pragma unroll
        for (int step = 0; step < 4; step += 2) {
#pragma unroll
            for (int i = 0; i < P::kRowTiles; ++i) {
                const Words<4>&top = chunk.x[2 * i], &bottom = chunk.x[2 * i + 1];
                const uint32_t x[4] = {top.w[step], bottom.w[step], top.w[step + 1],
                                       bottom.w[step + 1]};
                product<T>(sums[j][i], x, chunk.w[j].w[step], chunk.w[j].w[step + 1]);
            }
        }
    }
}

// The first lines of W that this block will read, on their way to L2 while A is multiplied.
template <typename P, typename T>
__device__ __forceinline__ void prefetch_w(const Args<T>& p, const Block<T>& block) {
    static_assert(P::kSpan == P::kThreads, "a row a thread");
    constexpr int kLine = 128 / sizeof(T);
    const int row = block.first_n + static_cast<int>(threadIdx.x);
    if (row >= block.linear.n) return;
    const T* w = block.linear.w + row * block.linear.w_stride + block.first_k;
    const int end = min(block.chunks * kChunk, p.k - block.first_k);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
        if (i * kLine < end) prefetch(w + i * kLine);
}

// This block's columns of b for a span, on their way to shared memory; wait_for_copies() ends it.
template <typename P, typename T>
__device__ __forceinline__ void copy_b(const Block<T>& block, int span, Shared<T, P>& shared) {
    const Linear<T>& linear = block.linear;
    const int first = block.first_n + span * P::kSpan + static_cast<int>(block.rank) * P::kOwn;
    if (span >= block.spans || first >= linear.n) return;
    constexpr int kPieces = P::kOwn / kVec<T>;
    for (int i = threadIdx.x; i < linear.rank * kPieces; i += P::kThreads) {
        const int column = i / kPieces, at = i % kPieces * kVec<T>;
        const T* from = linear.b + static_cast<int64_t>(column) * linear.n + first + at;
        T* to = &shared.b[column][at];
        if (linear.aligned_b) {
            if (first + at < linear.n) copy_async<16>(to, from);
        } else {
            for (int v = 0; v < kVec<T> && first + at + v < linear.n; ++v) to[v] = from[v];
        }
    }
}

// Element i of this thread's share of S: its row, and its column in the share and in the linear.
struct Place {
    int row, local, column;
};

template <typename P, typename T>
__device__ __forceinline__ Place find_place(const Block<T>& block, int i) {
    const int at = static_cast<int>(threadIdx.x) + i * P::kThreads;
    const int local = at % P::kShare, group = local / kTile * kCluster + block.rank;
    return {at / P::kShare, local, group * kTile + local % kTile};
}

// The gates of this thread's share, on their way as b is.
template <typename P, typename T>
__device__ __forceinline__ void copy_gates(const Args<T>& p, const Block<T>& block,
                                           Shared<T, P>& shared) {
#pragma unroll
    for (int i = 0; i < P::kShareOfThread; ++i) {
        const Place place = find_place<P>(block, i);
        const int task = shared.task[place.row];
        float* to = &shared.gate[i][threadIdx.x];
        if (task >= 0 && place.column < block.linear.rank)
            copy_async<4>(to, p.gates + static_cast<int64_t>(task) * p.rank +
                                  block.linear.first_column + place.column);
        else
            *to = 0.0f;
    }
}

// h of this block's share of S, to all blocks.
template <typename P, typename T>
__device__ __forceinline__ void share_h(const Args<T>& p, const Block<T>& block,
                                        Shared<T, P>& shared) {
#pragma unroll
    for (int i = 0; i < P::kShareOfThread; ++i) {
        const Place place = find_place<P>(block, i);
        if (place.row >= p.m || place.column >= block.groups * kTile) continue;
        float s = 0.0f;
#pragma unroll
        for (int from = 0; from < kCluster; ++from)
            s += shared.s_part[from][place.row][place.local];
        const float gate = shared.gate[i][threadIdx.x];
        const float h = gate != 0.0f ? without_sign_of_zero(gate * s) : float_of(kDead);
#pragma unroll
        for (int to = 0; to < kCluster; ++to)
            write_block<kCluster>(&shared.h[place.column][place.row], h, to);
    }
}

// A warp's sums, to the blocks that own them. Of A's span groups go to blocks in turn, of W's
// neighbouring tiles to one block.
template <typename P, bool kOfA, typename T>
__device__ __forceinline__ void send_sums(const Args<T>& p, const Block<T>& block, int count,
                                          const float (&sums)[kTiles][P::kRowTiles][4],
                                          Shared<T, P>& shared) {
    constexpr int kOwnTiles = P::kOwn / kTile;
    auto* part = &shared.y_part[block.rank][0][0];
    int pitch = P::kOwn + P::kPad;
    if constexpr (kOfA) part = &shared.s_part[block.rank][0][0], pitch = P::kShare + P::kPad;
    const int lane = unknown(block.lane), warp = unknown(block.warp);  // no addresses kept for it
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        if (j >= count) break;
        const int tile = warp + j * P::kWarps;
        const int owner = kOfA ? tile % kCluster : tile / kOwnTiles;
        const int local = kOfA ? tile / kCluster : tile % kOwnTiles;
        const int column = local * kTile + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < P::kRowTiles * 2; ++i) {
            const int row = i * 8 + lane / 4;
            const float* pair = &sums[j][i / 2][i % 2 * 2];
            if (row < p.m)
                write_block_pair(part + row * pitch + column, pair[0], pair[1], owner);
        }
    }
}

// y of this block's columns of a span: the parts of the base in their order, then h b. Four rows of
// a column for each thread.
template <typename P, typename T>
__device__ __forceinline__ void write_y(const Args<T>& p, const Block<T>& block, int span,
                                        const Shared<T, P>& shared) {
    const Linear<T>& linear = block.linear;
    const int first = block.first_n + span * P::kSpan + static_cast<int>(block.rank) * P::kOwn;
    const int quads = (p.m + 3) / 4;
    for (int i = threadIdx.x; i < quads * P::kOwn; i += P::kThreads) {
        const int column = i % P::kOwn, row = i / P::kOwn * 4;
        if (first + column >= linear.n) continue;
        float sum[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            sum[r] = shared.y_part[0][row + r][column];
#pragma unroll
            for (int from = 1; from < kCluster; ++from)
                sum[r] += shared.y_part[from][row + r][column];
        }
        if (linear.bias != nullptr) {
            const float bias = to_float(linear.bias[first + column]);
#pragma unroll
            for (int r = 0; r < 4; ++r) sum[r] += bias;
        }
#pragma unroll 1
        for (int c = 0; c < block.groups * kTile; c += kTile) {  // past the rank h is dead
            float b[kTile];
            Quad h[kTile];
#pragma unroll
            for (int j = 0; j < kTile; ++j) {
                b[j] = to_float(shared.b[c + j][column]);
                h[j] = *reinterpret_cast<const Quad*>(&shared.h[c + j][row]);
            }
#pragma unroll
            for (int i = 0; i < kTile * 4; ++i) {
                const float live = h[i / 4].v[i % 4];
                sum[i % 4] = bits_of(live) != kDead ? fmaf(live, b[i / 4], sum[i % 4]) : sum[i % 4];
            }
        }
        T* y = linear.y + row * linear.y_stride + first + column;
#pragma unroll
        for (int r = 0; r < 4; ++r)
            if (row + r < p.m)
                y[r * linear.y_stride] =
                    from_float<T>(shared.task[row + r] == kInvalid ? nanf("") : sum[r]);
    }
}

template <typename T, typename P>
__global__ void __launch_bounds__(P::kThreads, 2)
    decode_linear_kernel(const __grid_constant__ Args<T> p) {
#ifdef CKF_HAS_CLUSTERS
    using Memory = Shared<T, P>;
    CKF_LARGE_SHARED(Memory, shared);
    cluster_begin();  // a block that has begun may be sent to
    const Block<T> block = find_block<P>(p);
    const Rows<T> x{p.x + block.lane / 4 * p.x_stride + block.first_k + block.lane % 4 * 8,
                    8 * p.x_stride, p.m - block.lane / 4};
    int phase = block.groups > 0 ? 0 : 1;
    Tiles<T> tiles = find_tiles<P>(p, block, phase);
    Chunk<P> ring[P::kDepth];
#pragma unroll
    for (int d = 0; d < P::kDepth; ++d) load_chunk<P>(p, block, x, tiles, d, ring[d]);
    if (threadIdx.x < P::kRows) {
        const int64_t id =
            static_cast<int>(threadIdx.x) < p.m ? p.task_ids[threadIdx.x] : int64_t{-1};
        const bool known = id >= -1 && id < p.tasks;
        shared.task[threadIdx.x] = known ? static_cast<int>(id) : kInvalid;
    }
    __syncthreads();
    copy_gates<P>(p, block, shared);
    copy_b<P>(block, 0, shared);
    prefetch_w<P>(p, block);

    const int steps = (block.chunks + P::kDepth - 1) / P::kDepth * P::kDepth;
#pragma unroll 1
    for (; phase <= block.spans; ++phase) {
        const int count = tiles.count;
        float sums[kTiles][P::kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kTiles * P::kRowTiles * 4; ++i)
            sums[i / (P::kRowTiles * 4)][i / 4 % P::kRowTiles][i % 4] = 0.0f;
#pragma unroll 1
        for (int step = 0; step < steps; step += P::kDepth) {
            const bool last = step + P::kDepth == steps;  // the next loads are the next phase's
            if (last) tiles = find_tiles<P>(p, block, phase + 1);
            const int next = last ? 0 : step + P::kDepth;
#pragma unroll
            for (int d = 0; d < P::kDepth; ++d) {
                multiply<T, P>(ring[d], count, sums);
                load_chunk<P>(p, block, x, tiles, next + d, ring[d]);
            }
        }
        if (steps == 0) tiles = find_tiles<P>(p, block, phase + 1);
        cluster_wait<kCluster>();
        if (phase == 0) {
            send_sums<P, true>(p, block, count, sums, shared);
            cluster_arrive<kCluster>();
            continue;
        }
        const int span = phase - 1;
        wait_for_copies();
        if (span == 0) share_h<P>(p, block, shared);
        send_sums<P, false>(p, block, count, sums, shared);
        cluster_arrive<kCluster>();
        cluster_wait<kCluster>();
        write_y<P>(p, block, span, shared);
        if (phase == block.spans) break;
        cluster_arrive<kCluster>();  // what was sent here is read
        __syncthreads();
        copy_b<P>(block, span + 1, shared);
    }
#endif
}

}  // namespace decode_linear
}  // namespace
}  // namespace ckf

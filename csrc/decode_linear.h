// Frozen linears and their Multi-LoRA for few rows (decode), base and update in one pass over W:
//   y_l[i, :] = x[i, :] W_l^T + bias_l + sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b_l[c, :]
//
//   x (m, k), W_l (n_l, k), a (R, k), g (T, R) fp32, ids (m,), b_l (R_l, n_l), y_l (m, n_l); all
//   elements of 16 bits.
//
// W's bytes are what it costs, so they flow from the first moment to the last. A block owns spans
// of n and multiplies them by all of k, which its warps share: none but the block itself adds up y.
// A is shared out over a cluster: each block multiplies its columns of A while its first loads of W
// are in flight, adds up and gates S, and sends h to all. No block waits for h before its first span
// of W is multiplied.
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

// Rows of x, of A or of W as a lane reads them: its first, then every eighth further.
template <typename T>
struct Rows {
    const T* first;
    int64_t step;  // of eight rows, in elements
    int left;      // from the first on
};

template <typename T>
__device__ __forceinline__ Rows<T> find_rows(const Block<T>& block, const T* matrix, int64_t stride,
                                             int first, int end) {
    const int row = first + block.lane / 4;
    return {matrix + row * stride + block.first_k + block.lane % 4 * 8, kTile * stride, end - row};
}

// The rows of W in a span; none past the last.
template <typename T>
__device__ __forceinline__ Rows<T> find_w(const Block<T>& block, int span) {
    const int end = span < block.spans ? block.linear.n : 0;
    return find_rows(block, block.linear.w, block.linear.w_stride, block.first_n + span * kOwn,
                     end);
}

// A lane's operands of two products: words 0 and 1, words 2 and 3. Of k or of a matrix what is not
// there is zero.
template <bool kOnce, typename T, int kCount>
__device__ __forceinline__ void load_chunk(const Block<T>& block, const Rows<T>& rows, int i,
                                           Words<4> (&to)[kCount]) {
    const int at = i * kChunk;
    const bool inside = at < block.left_k;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        const bool wanted = inside && j * kTile < rows.left;
        const T* from = rows.first + (at + j * rows.step);
        to[j] = kOnce ? load_once(wanted, from) : load_if<Words<4>>(wanted, from);
    }
}

template <typename T, int kCount>
__device__ __forceinline__ void multiply(const Words<4> (&x)[2], const Words<4> (&w)[kCount],
                                         float (&sums)[kCount][4]) {
#pragma unroll
    for (int step = 0; step < 4; step += 2) {
        const uint32_t rows[4] = {x[0].w[step], x[1].w[step], x[0].w[step + 1], x[1].w[step + 1]};
#pragma unroll
        for (int j = 0; j < kCount; ++j)
            product<T>(sums[j], rows, w[j].w[step], w[j].w[step + 1]);
    }
}

template <int kCount>
__device__ __forceinline__ void clear(float (&sums)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount * 4; ++i) sums[i / 4][i % 4] = 0.0f;
}

// The block's columns of A, for a warp's share of k, in L2 soon: four of them at once.
template <typename T>
__device__ __forceinline__ void prefetch_a(const Args<T>& p, const Block<T>& block) {
    constexpr int kAcross = 8;  // lanes beside each other, a line each
    const int at = block.lane % kAcross * 2 * kChunk;
#pragma unroll 1
    for (int c = block.first_column + block.lane / kAcross; c < block.end_column;
         c += kLanes / kAcross) {
        const int64_t row = block.linear.first_column + c;
#pragma unroll 1
        for (int i = at; i < block.chunks * kChunk; i += kAcross * 2 * kChunk)
            prefetch_if(block.first_k + i < p.k, p.a + row * p.k + block.first_k + i);
    }
}

// This block's columns of b for a span, on their way to shared memory; wait_for_copies() ends it.
template <typename P, typename T>
__device__ __forceinline__ void copy_b(const Block<T>& block, int span, Shared<T, P>& shared) {
    const Linear<T>& linear = block.linear;
    const int first = block.first_n + span * kOwn;
    if (span >= block.spans) return;
    constexpr int kPieces = kOwn / kVec<T>;
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

// Element i of a thread's share of S: its row, and its column in the share.
struct Place {
    int row, column;
};

template <typename P>
__device__ __forceinline__ Place find_place(int i) {
    const int at = static_cast<int>(threadIdx.x) + i * P::kThreads;
    return {at / P::kShare, at % P::kShare};
}

// The gates of a thread's share, on their way to it as b is.
template <typename P, typename T>
__device__ __forceinline__ void copy_gates(const Args<T>& p, const Block<T>& block, int first,
                                           Shared<T, P>& shared) {
#pragma unroll
    for (int i = 0; i < P::kShareOfThread; ++i) {
        const Place place = find_place<P>(i);
        const int task = find_task(p, place.row), column = first + place.column;
        float* to = &shared.gate[i][threadIdx.x];
        if (task >= 0 && column < block.end_column)
            copy_async<4>(to, p.gates + static_cast<int64_t>(task) * p.rank +
                                  block.linear.first_column + column);
        else
            *to = 0.0f;
    }
}

// A warp's sums, where others find them.
template <int kCount, typename T>
__device__ __forceinline__ void write_part(const Args<T>& p, const Block<T>& block,
                                           const float (&sums)[kCount][4],
                                           float (&part)[kRows][kPitch]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (i * 8 >= p.m) break;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            float* to = &part[i * 8 + block.lane / 4][j * kTile + block.lane % 4 * 2];
            *reinterpret_cast<Pair*>(to) = {{sums[j][i * 2], sums[j][i * 2 + 1]}};
        }
    }
}

template <typename P, typename T>
__device__ __forceinline__ float add_parts(const Shared<T, P>& shared, int row, int column) {
    float sum = shared.part[0][row][column];
#pragma unroll
    for (int warp = 1; warp < P::kWarps; ++warp) sum += shared.part[warp][row][column];
    return sum;
}

// h of some of this block's columns of A, to all blocks.
template <typename P, typename T>
__device__ __forceinline__ void share_h(const Args<T>& p, const Block<T>& block, int first,
                                        Shared<T, P>& shared) {
#pragma unroll
    for (int i = 0; i < P::kShareOfThread; ++i) {
        const Place place = find_place<P>(i);
        const int column = first + place.column;
        if (place.row >= p.m || column >= block.end_column) continue;
        const float s = add_parts<P>(shared, place.row, place.column);
        const float gate = shared.gate[i][threadIdx.x];
        const float h = gate != 0.0f ? without_sign_of_zero(gate * s) : float_of(kDead);
#pragma unroll
        for (int to = 0; to < P::kCluster; ++to)
            send_to_block(&shared.h[column][place.row], h, &shared.arrivals, to);
    }
}

// h b over a warp's share of the rank, to its sums of the base. Two columns at once: what they need
// is read before it is used.
template <typename P, typename T>
__device__ __forceinline__ void add_update(const Block<T>& block, const Shared<T, P>& shared,
                                           float (&sums)[kTiles][4]) {
    constexpr int kAtOnce = 2;
    const int each = (block.linear.rank + P::kWarps - 1) / P::kWarps;
    const int end = min((block.warp + 1) * each, block.linear.rank);
    const int row = block.lane / 4, column = block.lane % 4 * 2;
#pragma unroll 1
    for (int c = block.warp * each; c < end; c += kAtOnce) {
        float h[kAtOnce][2];
        Words<1> b[kAtOnce][kTiles];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int at = min(c + u, end - 1);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                h[u][i] = c + u < end ? shared.h[at][i * 8 + row] : float_of(kDead);
#pragma unroll
            for (int j = 0; j < kTiles; ++j)
                b[u][j] = *reinterpret_cast<const Words<1>*>(&shared.b[at][j * kTile + column]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce * kTiles * 4; ++i) {
            const int u = i / (kTiles * 4), j = i / 4 % kTiles;
            const float live = h[u][i % 4 / 2];
            float& sum = sums[j][i % 4];
            sum = bits_of(live) != kDead ? fmaf(live, element<T>(b[u][j], i % 2), sum) : sum;
        }
    }
}

// y of a span from its parts, an element a thread and turn, always in the same column.
template <typename P, typename T>
__device__ __forceinline__ void write_y(const Args<T>& p, const Block<T>& block, int column,
                                        float bias, const Shared<T, P>& shared) {
    static_assert(kOwn == kLanes, "a column a lane");
    if (column >= block.linear.n) return;
    for (int row = block.warp; row < p.m; row += P::kWarps) {
        const float sum = add_parts<P>(shared, row, block.lane) + bias;
        block.linear.y[row * block.linear.y_stride + column] =
            from_float<T>(shared.task[row] == kInvalid ? nanf("") : sum);
    }
}

template <typename T, typename P>
__global__ void __launch_bounds__(P::kThreads, 1)
    decode_linear_kernel(const __grid_constant__ Args<T> p) {
#ifdef CKF_HAS_CLUSTERS
    using Memory = Shared<T, P>;
    CKF_LARGE_SHARED(Memory, shared);
    const Block<T> block = find_block<P>(p);
    if (threadIdx.x == 0)
        expect_arrivals(&shared.arrivals, p.m * block.linear.rank * sizeof(float));
    cluster_begin();  // a block that has begun may be sent to
    prefetch_a(p, block);
    Words<4> w[P::kDepth][kTiles], x[P::kDepth][2];
    Rows<T> w_rows = find_w(block, 0);
#pragma unroll
    for (int d = 0; d < P::kDepth; ++d) load_chunk<true>(block, w_rows, d, w[d]);
    cluster_wait<P::kCluster>();  // before x is read: it makes the cache forget
    const Rows<T> x_rows = find_rows(block, p.x, p.x_stride, 0, p.m);
#pragma unroll
    for (int d = 0; d < P::kADepth; ++d) load_chunk<false>(block, x_rows, d, x[d]);

#pragma unroll 1
    for (int first = block.first_column; first < block.end_column; first += P::kShare) {
        const Linear<T>& linear = block.linear;
        const T* a = p.a + static_cast<int64_t>(linear.first_column) * p.k;
        const Rows<T> a_rows = find_rows(block, a, p.k, first, block.end_column);
        Words<4> ring[P::kADepth][P::kATiles];
#pragma unroll
        for (int d = 0; d < P::kADepth; ++d) load_chunk<true>(block, a_rows, d, ring[d]);
        copy_gates<P>(p, block, first, shared);
        float sums[P::kATiles][4];
        clear(sums);
#pragma unroll 1
        for (int next = P::kADepth; next < block.chunks + P::kADepth; next += P::kADepth) {
#pragma unroll
            for (int d = 0; d < P::kADepth; ++d) {
                multiply<T>(x[d], ring[d], sums);
                load_chunk<true>(block, a_rows, next + d, ring[d]);
                load_chunk<false>(block, x_rows, next < block.chunks ? next + d : d, x[d]);
            }
        }
        write_part(p, block, sums, shared.part[block.warp]);
        wait_for_copies();
        __syncthreads();
        share_h<P>(p, block, first, shared);
        if (first + P::kShare < block.end_column) __syncthreads();  // what was written is read
    }

#pragma unroll
    for (int d = P::kADepth; d < P::kDepth; ++d) load_chunk<false>(block, x_rows, d, x[d]);
    const int steps = (block.chunks + P::kDepth - 1) / P::kDepth * P::kDepth;
    if (threadIdx.x < kRows) shared.task[threadIdx.x] = find_task(p, threadIdx.x);
    copy_b<P>(block, 0, shared);
#pragma unroll 1
    for (int span = 0; span < block.spans; ++span) {
        const int column = block.first_n + span * kOwn + block.lane;
        const bool has_bias = block.linear.bias != nullptr && column < block.linear.n;
        const float bias = has_bias ? to_float(block.linear.bias[column]) : 0.0f;
        float sums[kTiles][4];
        clear(sums);
#pragma unroll 1
        for (int step = 0; step < steps; step += P::kDepth) {
            const bool last = step + P::kDepth == steps;  // the next loads are the next span's
            if (last) w_rows = find_w(block, span + 1);
            const int next = last ? 0 : step + P::kDepth;
#pragma unroll
            for (int d = 0; d < P::kDepth; ++d) {
                multiply<T>(x[d], w[d], sums);
                load_chunk<true>(block, w_rows, next + d, w[d]);
                load_chunk<false>(block, x_rows, next + d, x[d]);
            }
        }
        wait_for_copies();
        __syncthreads();
        if (span == 0) wait_for_arrivals(&shared.arrivals);
        add_update<P>(block, shared, sums);
        write_part(p, block, sums, shared.part[block.warp]);
        __syncthreads();
        copy_b<P>(block, span + 1, shared);
        write_y<P>(p, block, column, bias, shared);
    }
    if (block.spans == 0) wait_for_arrivals(&shared.arrivals);  // none may leave while it is sent to
#endif
}

}  // namespace decode_linear
}  // namespace
}  // namespace ckf

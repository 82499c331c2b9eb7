// The kernel of Multi-LoRA for few rows (decode), for all linears that share x, in one launch:
//   y_l[i, :] += sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b_l[c, :],  c over l's rank columns.
//
//   x (m, k), a (R, k), g (T, R) fp32, ids (m,), b_l (R_l, n_l), y_l (m, n_l); R = sum of R_l.
//
// A cluster of eight blocks (sm_90 and later) or a block alone owns kRows rows of one linear and a
// span of its n. Shrink: k is split into eight parts whatever the cluster; a block sums its share
// of the parts (one or all), warp by warp, into shared memory; then every block adds the eight
// partial sums in the order of the parts, through distributed shared memory. Expand: warp w owns
// the columns c = w (mod 8), and the eight warps' sums meet in shared memory in that order. So a
// row's sums run in an order that depends on the shapes and that row alone: same bits whatever its
// neighbours, its group, or the cluster. A gate of zero selects: neither inf nor NaN behind it is
// ever added.
#pragma once

#include "device.h"
#include "launchers.h"

namespace ckf {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kParts = 8;        // of k: the order of the sum, so the same on every device
constexpr int kScan = 4;         // gates a thread looks at in one vote: skips 1024 dead columns
constexpr int kBlocksPerSm = 2;  // at least: leaves 128 registers a thread

template <typename T>
constexpr int kBlockN = kLanes * kVec<T>;  // a slice of n: 16 bytes a lane

template <typename T>
struct Linear {
    T* y;
    const T* b;
    int64_t y_stride;
    int n, rank;
    int first_column;   // of a and the gates
    int first_cluster;  // of the grid
};

template <typename T>
struct Args {
    Linear<T> linears[kCkfMostLinears];
    const T *x, *a;
    const float* gates;
    const int64_t* task_ids;
    int64_t m, x_stride;
    int k, rank, tasks, count;
    int slices;  // of n for each block
    // Of multi_lora_decode_tile.h: whether all but y was complete before the kernel ahead began,
    // whether live columns are listed where all would fit (never: slower where measured, but
    // ptxas spills 96 bytes where it knows).
    bool early, list;
};

// Warp w lists its live columns at live[w][0 .. count[w]).
template <int kRows, int kCluster>
struct Shared {
    float partial[kParts / kCluster][kWarps][kLanes][kRows];
    float h[kWarps][kLanes][kRows];  // the gate, later gate * S
    int column[kWarps][kLanes];
    unsigned row_mask[kWarps][kLanes];  // bit r: the column is live for row r
    int count[kWarps];
    float sum[kWarps][kLanes * 8];
};

// The block's rows: -1 leaves a row alone, kInvalid makes it NaN.
constexpr int kInvalid = -2;

template <typename T, int kRows>
struct Rows {
    int task[kRows];
    const T* x[kRows];
    int64_t first;
};

// One part of k of x_row . a_column for kColumns listed columns, into partial[kColumns][kRows].
template <typename T, int kRows, int kColumns, bool kAligned>
__device__ __forceinline__ void shrink(const Args<T>& p, const Rows<T, kRows>& rows, const T* a,
                                       const int* column, int present, int part, int lane,
                                       float* partial) {
    const T* a_row[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
        a_row[j] = a + static_cast<int64_t>(column[j < present ? j : 0]) * p.k;
    float s[kColumns * kRows];
#pragma unroll
    for (int i = 0; i < kColumns * kRows; ++i) s[i] = 0.0f;

    [[maybe_unused]] constexpr int kUnroll = kRows == 4 ? 1 : 2;
#pragma unroll kUnroll
    for (int i = (part * kLanes + lane) * kVec<T>; i < p.k; i += kParts * kLanes * kVec<T>) {
        Pack<T> a_vec[kColumns], x_vec[kRows];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) a_vec[j] = load<T, kAligned>(a_row[j] + i, p.k - i);
#pragma unroll
        for (int r = 0; r < kRows; ++r) x_vec[r] = load<T, kAligned>(rows.x[r] + i, p.k - i);
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float x_value = to_float(x_vec[r].v[v]);
#pragma unroll
                for (int j = 0; j < kColumns; ++j) {
                    float& sum = s[j * kRows + r];
                    sum = fmaf(x_value, to_float(a_vec[j].v[v]), sum);
                }
            }
        }
    }
    sum_over_warp<kColumns * kRows>(s, lane);
    constexpr int kShare = kLanes / (kColumns * kRows);
    if (lane % kShare == 0) partial[lane / kShare] = s[0];
}

// Lists the live ones of the columns [first, first + kThreads) of a linear, sums S for them over
// the cluster and leaves gate * S of this warp's columns in shared.h. `start`: the block's first
// column of n.
template <typename T, int kRows, int kCluster, bool kAligned>
__device__ __forceinline__ void compute_h(const Args<T>& p, const Linear<T>& linear,
                                          const Rows<T, kRows>& rows, int first, unsigned rank,
                                          int start, int warp, int lane,
                                          Shared<kRows, kCluster>& shared) {
    __syncwarp();  // the last window's reads of shared.h come before the writes below
    const int own = first + lane * kWarps + warp;
    float gate[kRows];
    unsigned mask = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        gate[r] = 0.0f;
        if (rows.task[r] >= 0 && own < linear.rank)
            gate[r] = p.gates[static_cast<int64_t>(rows.task[r]) * p.rank + linear.first_column +
                              own];
        mask |= gate[r] != 0.0f ? 1u << r : 0u;
    }
    const unsigned live = __ballot_sync(kFull, mask != 0);
    if (mask != 0) {
        const int i = __popc(live & ((1u << lane) - 1));
        shared.column[warp][i] = own;
        shared.row_mask[warp][i] = mask;
#pragma unroll
        for (int r = 0; r < kRows; ++r) shared.h[warp][i][r] = gate[r];
        const T* b = linear.b + static_cast<int64_t>(own) * linear.n;  // on its way during shrink
#pragma unroll 1
        for (int slice = 0; slice < p.slices; ++slice) {
            const int at = start + slice * kCluster * kBlockN<T>;
            for (int line = 0; line < kBlockN<T> && at + line < linear.n; line += 8 * kVec<T>)
                prefetch(b + at + line);
        }
    }
    if (lane == 0) shared.count[warp] = __popc(live);
    __syncthreads();

    constexpr int kOwnParts = kParts / kCluster;
    const T* a = p.a + static_cast<int64_t>(linear.first_column) * p.k;
    const int own_part = warp % kOwnParts, part = rank * kOwnParts + own_part;
#pragma unroll 1
    for (int w = warp / kOwnParts; w < kWarps; w += kWarps / kOwnParts) {
        const int count = shared.count[w];
#pragma unroll 1
        for (int i = 0; i < count; i += 4) {
            const int* column = &shared.column[w][i];
            float* partial = shared.partial[own_part][w][i];
            if (count - i > 2)
                shrink<T, kRows, 4, kAligned>(p, rows, a, column, count - i, part, lane, partial);
            else
                shrink<T, kRows, 2, kAligned>(p, rows, a, column, count - i, part, lane, partial);
        }
    }
    __syncwarp();
    cluster_arrive<kCluster>();
    cluster_wait<kCluster>();

    for (int i = lane; i < shared.count[warp] * kRows; i += kLanes) {
        float s = 0.0f;
#pragma unroll
        for (int from = 0; from < kParts; ++from)
            s += read_block<kCluster>(
                &shared.partial[from % kOwnParts][warp][i / kRows][i % kRows], from / kOwnParts);
        shared.h[warp][i / kRows][i % kRows] *= s;
    }
    __syncwarp();
    cluster_arrive<kCluster>();  // the partial sums of the others are no longer needed
}

// acc += h b over this warp's listed columns.
template <typename T, int kRows, int kCluster, bool kAligned>
__device__ __forceinline__ void expand(const Linear<T>& linear, int i_n, int warp,
                                       const Shared<kRows, kCluster>& shared,
                                       float (&acc)[kRows][kVec<T>]) {
    constexpr int kColumns = 4;
    const int count = shared.count[warp];
#pragma unroll 1
    for (int i = 0; i < count; i += kColumns) {
        Pack<T> b_vec[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const int64_t column = i + j < count ? shared.column[warp][i + j] : 0;
            b_vec[j] = load<T, kAligned>(linear.b + column * linear.n + i_n,
                                         i + j < count ? linear.n - i_n : 0);
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const unsigned mask = i + j < count ? shared.row_mask[warp][i + j] : 0;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (!(mask >> r & 1u)) continue;  // the same for the whole warp
                const float h = shared.h[warp][i + j][r];
#pragma unroll
                for (int v = 0; v < kVec<T>; ++v)
                    acc[r][v] = fmaf(h, to_float(b_vec[j].v[v]), acc[r][v]);
            }
        }
    }
}

// y += the warps' sums, rounded once.
template <typename T, int kRows, int kCluster>
__device__ __forceinline__ void write_rows(const Linear<T>& linear, const Rows<T, kRows>& rows,
                                           int start, int warp, int lane,
                                           const float (&acc)[kRows][kVec<T>],
                                           Shared<kRows, kCluster>& shared) {
    const int column = start + static_cast<int>(threadIdx.x);
    const bool mine = threadIdx.x < kBlockN<T> && column < linear.n;
    T* y = linear.y + rows.first * linear.y_stride + column;
    float old[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        old[r] = 0.0f;
        if (mine && rows.task[r] >= 0) old[r] = to_float(y[r * linear.y_stride]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) shared.sum[warp][lane * kVec<T> + v] = acc[r][v];
        __syncthreads();
        if (mine && rows.task[r] != -1) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += shared.sum[w][threadIdx.x];
            y[r * linear.y_stride] =
                from_float<T>(rows.task[r] == kInvalid ? nanf("") : old[r] + sum);
        }
        __syncthreads();
    }
}

template <typename T, int kRows, int kCluster, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    multi_lora_decode_kernel(const __grid_constant__ Args<T> p) {
    static_assert(kBlockN<T> <= kThreads);
    using Memory = Shared<kRows, kCluster>;
    CKF_SHARED(Memory, shared);
    wait_for_previous_grid();
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int cluster = blockIdx.x / kCluster;
    const unsigned rank = blockIdx.x % kCluster;
    int i_linear = p.count - 1;
    while (cluster < p.linears[i_linear].first_cluster) --i_linear;
    const Linear<T>& linear = p.linears[i_linear];

    Rows<T, kRows> rows;
    rows.first = static_cast<int64_t>(blockIdx.y) * kRows;
    bool any_row = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const bool inside = rows.first + r < p.m;
        const int64_t task = inside ? p.task_ids[rows.first + r] : -1;
        const bool known = task >= -1 && task < p.tasks;
        rows.task[r] = known ? static_cast<int>(task) : kInvalid;
        rows.x[r] = p.x + (inside ? rows.first + r : rows.first) * p.x_stride;
        any_row = any_row || task != -1;
    }
    if (!any_row) return;  // the same for the whole cluster

    const auto any_live = [&](int first) {
        bool any = false;
        for (int scan = 0; scan < kScan; ++scan) {
            const int column = first + scan * kThreads + static_cast<int>(threadIdx.x);
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                any = any || (rows.task[r] >= 0 && column < linear.rank &&
                              p.gates[static_cast<int64_t>(rows.task[r]) * p.rank +
                                      linear.first_column + column] != 0.0f);
        }
        return __syncthreads_or(any) != 0;
    };
    const bool one_window = linear.rank <= kThreads;
    bool pending = false;  // others may still read this block's partial sums

#pragma unroll 1
    for (int slice = 0; slice < p.slices; ++slice) {
        const int span = (cluster - linear.first_cluster) * p.slices + slice;  // a slice each
        const int start = (span * kCluster + static_cast<int>(rank)) * kBlockN<T>;
        const int i_n = start + lane * kVec<T>;
        float acc[kRows][kVec<T>];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int v = 0; v < kVec<T>; ++v) acc[r][v] = 0.0f;
#pragma unroll 1
        for (int first = 0; first < linear.rank; first += kThreads) {
            if (!one_window && first % (kScan * kThreads) == 0 && !any_live(first)) {
                first += (kScan - 1) * kThreads;
                continue;
            }
            if (!one_window || slice == 0) {  // with one window h serves every slice
                if (kCluster > 1 && pending) cluster_wait<kCluster>();
                compute_h<T, kRows, kCluster, kAligned>(p, linear, rows, first, rank, start,
                                                        warp, lane, shared);
                pending = true;
            }
            if (start < linear.n)
                expand<T, kRows, kCluster, kAligned>(linear, i_n, warp, shared, acc);
        }
        if (start < linear.n)
            write_rows<T, kRows, kCluster>(linear, rows, start, warp, lane, acc, shared);
    }
    if (kCluster > 1 && pending) cluster_wait<kCluster>();  // nobody leaves while others read
}

}  // namespace
}  // namespace ckf

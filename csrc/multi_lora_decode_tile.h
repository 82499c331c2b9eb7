// The decode kernel of multi_lora_decode.h on tensor cores, for elements of 16 bits: the same sum,
// with sixteen rows of one linear and a span of its n for each cluster of eight blocks (sm_90 and
// later) or block alone.
//
// Rank columns go in groups of eight, at most kGroups of them a window. Up to one window of columns
// all are computed, so that x and A are on their way before anybody knows the rows' tasks; with
// more, the groups live for a row of the block are listed first. Shrink: warp v of 64 (eight parts
// of eight warps, whatever the cluster) takes chunks 2v and 2v + 1 of 32 elements of k, then every
// 64th pair; warps are summed in a fixed tree, parts in order. Expand: h = gate * S is split into
// two tf32 terms, which keep 23 of its 24 bits, and every warp adds all groups to its own columns
// of n. A lane's fragments are 16 (or fewer) bytes that lie side by side: the order of k and of n
// within a product is free.
//
// A row's bits depend on the shapes and that row alone, as there: a group that is dead for a row
// adds exact zeros. Its gate of zero selects, too: h is then -0, and a product with an inf or NaN
// of B, which a matrix product would spread over all rows, is left to add_special.
#pragma once

#include <type_traits>

#include "multi_lora_decode_shrink.h"

namespace ckf {
namespace {
namespace tile {

constexpr int kExchangeRows = 4;  // from here on a cluster shares the last sum

// A lane's operands of the expand: columns l % 4 and 4 further, kN elements of n for each product.
template <int kN>
using Rows2 = Words<kN / 2>[kGroups][2];

template <typename T, int kN, bool kAligned>
__device__ __forceinline__ void load_b(const Block<T>& block, const Window& window, int warp_n,
                                       const Shared& shared, Rows2<kN>& b) {
    const Linear<T>& linear = block.linear;
    const int at = warp_n + block.lane / 4 * kN, inside = at < linear.n ? at : 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        const int first = window.group(shared, j) * kGroup + block.lane % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // not there: as in Sources
            const unsigned row = min(first + 4 * i, linear.rank - 1);
            const T* from = linear.b + (row * linear.n + inside);
            if constexpr (kAligned)
                load_into(b[j][i], j < window.groups, from);
            else
                b[j][i] = load_words<T, kN, false>(from, j < window.groups ? linear.n - at : 0);
        }
    }
}

// A value that a matrix product would spread: inf, NaN, or too large to be rounded to tf32.
__device__ __forceinline__ bool is_special(float v) { return !(fabsf(v) < 0x1p127f); }

// Bits 15 and 31: whether either half of a word is inf or NaN.
template <typename T>
__device__ __forceinline__ uint32_t special_halves(uint32_t word) {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    constexpr uint32_t kExponents = kHalf ? 0x7c007c00u : 0x7f807f80u;
    return ((word & kExponents) + (kHalf ? 0x04000400u : 0x00800080u)) & 0x80008000u;
}

// A warp's sums for its columns of n: of the leading and of the trailing terms of h.
template <int kN>
struct Sums {
    float lead[kN][4], trail[kN][4];
};

// sums += h b where h or b is special and the column live for the row.
template <typename T, int kN, bool kAligned>
__device__ __forceinline__ void add_special(const Block<T>& block, const Window& window, int warp_n,
                                            const Shared& shared, Sums<kN>& sums) {
#pragma unroll 1
    for (int i = 0; i < window.groups * kGroup; ++i) {
        const int column = window.column(shared, i);
        if (column >= block.linear.rank) continue;
        const T* b = block.linear.b + static_cast<int64_t>(column) * block.linear.n;
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int at = warp_n + (block.lane % 4 * 2 + q) * kN;
            const auto words = load_words<T, kN, kAligned>(b + at, block.linear.n - at);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float h = shared.h[block.lane / 4 + 8 * half][i];
                if (bits_of(h) == kDead) continue;
#pragma unroll
                for (int t = 0; t < kN; ++t) {
                    const float value = element<T>(words, t);
                    if (is_special(h) || special_halves<T>(words.w[t / 2]) >> t % 2 * 16 & 0x8000u)
                        sums.lead[t][half * 2 + q] += h * value;
                }
            }
        }
    }
}

template <typename T, int kN, bool kAligned>
__device__ __forceinline__ void expand(const Block<T>& block, const Window& window, int warp_n,
                                       const Shared& shared, Rows2<kN>& b, Sums<kN>& sums) {
    const int lane = block.lane;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kGroups * kN; ++i)
        if (i / kN < window.groups)
            found |= special_halves<T>(b[i / kN][i % kN / (kN / 2)].w[i % (kN / 2)]);
    bool special = found != 0;
    if (__ballot_sync(kFull, special) != 0) {
#pragma unroll
        for (int i = 0; i < kGroups * kN; ++i) {
            uint32_t& word = b[i / kN][i % kN / (kN / 2)].w[i % (kN / 2)];
            const uint32_t halves = special_halves<T>(word) >> 15;
            word &= ~(halves * 0xffffu);
        }
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        if (j >= window.groups) continue;  // the same for the whole block
        float lead[4], trail[4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float h = shared.h[lane / 4 + i % 2 * 8][j * kGroup + lane % 4 + i / 2 * 4];
            any = any || h != 0.0f;
            special = special || is_special(h);
            const float kept = is_special(h) ? 0.0f : h;
            lead[i] = float_of((bits_of(kept) + 0x1000u) & 0xffffe000u);
            trail[i] = kept - lead[i];
        }
        if (__ballot_sync(kFull, any) == 0) continue;
#pragma unroll
        for (int t = 0; t < kN; ++t) {
            const float b0 = element<T>(b[j][0], t), b1 = element<T>(b[j][1], t);
            product_tf32(sums.lead[t], lead, b0, b1);
            product_tf32(sums.trail[t], trail, b0, b1);
        }
    }
    if (__ballot_sync(kFull, special) != 0)
        add_special<T, kN, kAligned>(block, window, warp_n, shared, sums);
}

// A lane's elements of y: two rows, two runs of kN.
template <int kN>
using Outputs = Words<kN / 2>[2][2];

template <typename T, int kN>
__device__ __forceinline__ T* output(const Block<T>& block, int warp_n, int half, int q,
                                     int& left) {
    const int row = block.lane / 4 + 8 * half, at = warp_n + (block.lane % 4 * 2 + q) * kN;
    left = row < block.rows ? block.linear.n - at : 0;
    return block.linear.y +
           (block.first_row + (row < block.rows ? row : 0)) * block.linear.y_stride + at;
}

template <typename T, int kN, bool kAligned>
__device__ __forceinline__ void load_y(const Block<T>& block, int warp_n, Outputs<kN>& y) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int left;
        const T* from = output<T, kN>(block, warp_n, i / 2, i % 2, left);
        y[i / 2][i % 2] = load_words<T, kN, kAligned>(from, left);
    }
}

// y = what it was + the sums, rounded once.
template <typename T, int kN, bool kAligned>
__device__ __forceinline__ void write_y(const Block<T>& block, int warp_n, const Shared& shared,
                                        const Outputs<kN>& y, const Sums<kN>& sums) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int task = shared.task[block.lane / 4 + i / 2 * 8];
        int left;
        T* to = output<T, kN>(block, warp_n, i / 2, i % 2, left);
        if (task == -1 || left <= 0) continue;
        T v[kN];
#pragma unroll
        for (int t = 0; t < kN; ++t) {
            const float sum = sums.lead[t][i] + sums.trail[t][i];
            const float old = element<T>(y[i / 2][i % 2], t);
            v[t] = from_float<T>(task == kInvalid ? nanf("") : old + sum);
        }
        Words<kN / 2> words;
        memcpy(&words, v, sizeof(words));
        store_words<T, kN, kAligned>(to, words, left);
    }
}

// kMany: more columns than a window holds.
template <typename T, int kN, int kCluster, bool kAligned, bool kMany>
__global__ void __launch_bounds__(kThreads, 1)
    multi_lora_decode_tile_kernel(const __grid_constant__ Args<T> p) {
    CKF_SHARED(Shared, shared);
    if (!p.early) wait_for_previous_grid();
    const int cluster = blockIdx.x / kCluster;
    int i_linear = p.count - 1;
    while (cluster < p.linears[i_linear].first_cluster) --i_linear;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
    const int rows = static_cast<int>(p.m - first_row < kRows ? p.m - first_row : kRows);
    const Block<T> block{p.linears[i_linear],
                         first_row,
                         rows,
                         blockIdx.x % kCluster,
                         static_cast<int>(threadIdx.x) % kLanes,
                         static_cast<int>(threadIdx.x) / kLanes};
    const Linear<T>& linear = block.linear;
    // On its way while x and A are asked for.
    const int64_t id =
        static_cast<int>(threadIdx.x) < rows ? p.task_ids[first_row + threadIdx.x] : -1;
    for (int i = rows * kPitch + threadIdx.x; i < kRows * kPitch; i += kThreads)
        (&shared.h[0][0])[i] = float_of(kDead);  // of rows that are not there
    if (threadIdx.x < kGroups) shared.group[threadIdx.x] = static_cast<uint16_t>(threadIdx.x);
    __syncthreads();

    int groups = (linear.rank + kGroup - 1) / kGroup;
    const bool listed = kMany || p.list;
    if (listed) {
        if (!publish_tasks(p, block, id, shared)) {  // the same for the whole cluster
            wait_for_previous_grid();  // what follows on the stream counts on it
            return;
        }
        groups = list_groups(p, block, shared);
    }
    const int total = rows * kColumns;
    Share share{0, total, false};
    if (kCluster > 1 && rows >= kExchangeRows) {
        const int each = (total + kCluster - 1) / kCluster;
        share = {static_cast<int>(block.rank) * each,
                 min(total, (static_cast<int>(block.rank) + 1) * each), true};
    }
    bool pending = false;  // others may still read this block's partial sums

#pragma unroll 1
    for (int slice = 0; slice < p.slices; ++slice) {
        const int span = (cluster - linear.first_cluster) * p.slices + slice;
        const int start = (span * kCluster + static_cast<int>(block.rank)) * kSpanN<kN>;
        const int warp_n = start + block.warp * kWarpN<kN>;
        Outputs<kN> y;
        Sums<kN> sums;
#pragma unroll 1
        for (int first = 0; first == 0 || (kMany && first < groups); first += kGroups) {
            const Window window{first, min(kGroups, groups - first)};
            Rows2<kN> b;
            float gate[kShare];
            const bool fresh = slice == 0 || (kMany && groups > kGroups);  // else h serves on
            if (fresh) {
                if (kCluster > 1 && pending) cluster_wait<kCluster>();
                const bool publish = !listed && slice == 0;
                if (!shrink<T, kN, kCluster, kAligned, kMany>(p, block, window, share, publish, id,
                                                              start, shared, gate)) {
                    wait_for_previous_grid();
                    return;
                }
                pending = !share.for_all;
            }
            load_b<T, kN, kAligned>(block, window, warp_n, shared, b);
            if (fresh) finish_h<kCluster>(share, gate, shared);
            if (first == 0) {
                wait_for_previous_grid();
                load_y<T, kN, kAligned>(block, warp_n, y);
#pragma unroll
                for (int i = 0; i < kN * 4; ++i)
                    sums.lead[i / 4][i % 4] = sums.trail[i / 4][i % 4] = 0.0f;
            }
            if (warp_n < linear.n) expand<T, kN, kAligned>(block, window, warp_n, shared, b, sums);
        }
        if (warp_n < linear.n) write_y<T, kN, kAligned>(block, warp_n, shared, y, sums);
    }
    if (kCluster > 1 && pending) cluster_wait<kCluster>();  // nobody leaves while others read
}

}  // namespace tile
}  // namespace
}  // namespace ckf

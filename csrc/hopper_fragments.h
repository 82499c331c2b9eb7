// What leaves the accumulators of a WGMMA tile: the mask, the bias, a store in 16-byte words, and the
// rows of H with their gates. Four lanes exchange their pairs so that each holds eight neighbours.
#pragma once

#include <cmath>

#include "hopper.h"

namespace ckf {
namespace {

constexpr int kTileN = 256;     // columns of y in a tile
constexpr int kShrinkN = 128;   // rank columns of a tile of H, at half the cost; or kTileN

// Where S = x A^T goes: H = gates * S in all columns; forward also its compact form, of the columns
// that a row's task has; for dx the H of the forward is brought back from that form. Ranks are
// multiples of eight: eight neighbouring columns have one gate, and their slots follow each other.
template <typename T>
struct ShrinkArgs {
    T* gated;                // (m, columns)
    T* compact;              // (m, slots): written forward, read for dx; or null
    T* restored;             // dx: (m, columns), or null
    const float* gates;      // (tasks, columns)
    const int32_t* slots;    // (tasks, columns), -1: none
    const int64_t* ids;      // (m,)
    unsigned* done;          // a count of warps for each tile of rows, 0 before
    int64_t gated_stride, compact_stride, restored_stride, gates_stride, slots_stride;
    int columns, tasks;  // columns: kTileN at most
};

template <typename T>
struct GemmArgs {
    TensorMap x, w, h, b, a;  // a (columns, k) of the shrink
    T* y;
    const T* bias;        // or null
    const int64_t* seed;  // or null: no dropout
    int64_t y_stride;
    int m, n, k, r;
    unsigned threshold;
    float scale;
    bool accumulate;  // dx: onto what y holds
    int shrinkers;    // clusters that shrink, 0: H was there before
    ShrinkArgs<T> shrink;
};

#ifdef CKF_HAS_WGMMA

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

// Eight columns of a row.
struct alignas(16) Words {
    uint32_t word[4];
};

// Adds what y holds: the store's exchange, backwards.
template <typename T>
__device__ __forceinline__ void add_stored(const GemmArgs<T>& p, const Place& at,
                                           float (&acc)[kFragment]) {
    const T* y = p.y + at.row * p.y_stride;
#pragma unroll
    for (int j = 0; j < kTileN / 8; j += 4) {
        const int column = at.column + 8 * (j + at.quad);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            Words held{};
            if (at.row + 8 * h < p.m && column < p.n)
                held = *reinterpret_cast<const Words*>(y + 8 * h * p.y_stride + column);
            transpose_quad(held.word, at.quad);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                T pair[2];
                memcpy(pair, &held.word[i], sizeof(pair));
                acc[4 * (j + i) + 2 * h] += to_float(pair[0]);
                acc[4 * (j + i) + 2 * h + 1] += to_float(pair[1]);
            }
        }
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

// A warp's sixteen rows of S, from the first accumulators; then the warp is counted.
template <typename T, bool kDx, int kColumns>
__device__ __forceinline__ void store_shrunk(const ShrinkArgs<T>& s, int m, int tile,
                                             const Place& at, float (&acc)[kFragment]) {
    constexpr int kAtOnce = 4;  // blocks of 32 columns whose loads are all in flight before a store
    const int lane = threadIdx.x % kLanes;
    const uint32_t nan = pack<T>(NAN, NAN);
    int64_t id[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) id[h] = at.row + 8 * h < m ? s.ids[at.row + 8 * h] : -1;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += 4 * kAtOnce) {
        float gate[2][kAtOnce];
        int slot[2][kAtOnce];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool valid = id[h] >= 0 && id[h] < s.tasks, wrong = !valid && id[h] != -1;
            const float* gates = s.gates + (valid ? id[h] : 0) * s.gates_stride;
            const int32_t* slots = s.slots + (valid ? id[h] : 0) * s.slots_stride;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int column = 8 * (first + 4 * i + at.quad);
                gate[h][i] = wrong ? NAN : 0.0f;
                slot[h][i] = -1;
                if (valid && at.row + 8 * h < m && column < s.columns) {
                    gate[h][i] = gates[column];
                    if (s.compact != nullptr) slot[h][i] = slots[column];
                }
            }
        }
        Words back[2][kAtOnce];
        if constexpr (kDx) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const bool valid = id[h] >= 0 && id[h] < s.tasks, wrong = !valid && id[h] != -1;
                const uint32_t none = wrong ? nan : 0;
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i) {
                    back[h][i] = Words{{none, none, none, none}};
                    if (s.restored != nullptr && slot[h][i] >= 0)
                        back[h][i] = *reinterpret_cast<const Words*>(
                            s.compact + (at.row + 8 * h) * s.compact_stride + slot[h][i]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = at.row + 8 * h;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int j = first + 4 * i, column = 8 * (j + at.quad);
                Words out;
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float g = __shfl_sync(kFull, gate[h][i], lane / 4 * 4 + w);
                    const float low = acc[4 * (j + w) + 2 * h], high = acc[4 * (j + w) + 2 * h + 1];
                    out.word[w] = g != 0.0f ? pack<T>(low * g, high * g) : 0;
                }
                transpose_quad(out.word, at.quad);
                if (row >= m || column >= s.columns) continue;
                store_words(s.gated + row * s.gated_stride + column, out.word);
                if constexpr (kDx) {
                    if (s.restored != nullptr)
                        store_words(s.restored + row * s.restored_stride + column, back[h][i].word);
                } else if (slot[h][i] >= 0) {
                    store_words(s.compact + row * s.compact_stride + slot[h][i], out.word);
                }
            }
        }
    }
    publish(s.done + tile);
}

#endif

}  // namespace
}  // namespace ckf

#include "dropout.h"

#include <algorithm>

#include "threads.h"

namespace ckf_cpu {

namespace {

constexpr int kBatch = 16;          // Philox calls at once, for the compiler to vectorise
constexpr int kColumns = 8;         // of a call
constexpr int64_t kUnitRows = 32;

// Philox-4x32-7 of blocks first to first + kBatch of a row.
void draw(uint32_t first, uint64_t row, uint64_t seed, uint32_t (*words)[kBatch]) {
    auto* const c0 = words[0];
    auto* const c1 = words[1];
    auto* const c2 = words[2];
    auto* const c3 = words[3];
    for (int i = 0; i < kBatch; ++i) {
        c0[i] = first + i;
        c1[i] = static_cast<uint32_t>(row);
        c2[i] = static_cast<uint32_t>(row >> 32);
        c3[i] = 0;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round, key0 += 0x9E3779B9, key1 += 0xBB67AE85)
        for (int i = 0; i < kBatch; ++i) {
            const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53;
            const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57;
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
            c1[i] = static_cast<uint32_t>(p1);
            c3[i] = static_cast<uint32_t>(p0);
        }
}

}  // namespace

void drop(const float* x, int64_t stride, int64_t m, int64_t k, uint64_t seed, uint32_t threshold,
          float* out, int threads) {
    const float scale = static_cast<float>(65536.0 / (65536 - threshold));
    each_unit((m + kUnitRows - 1) / kUnitRows, threads, [&](int64_t unit) {
        uint32_t words[4][kBatch];
        for (int64_t row = unit * kUnitRows; row < std::min(m, (unit + 1) * kUnitRows); ++row)
            for (int64_t first = 0; first < k; first += kBatch * kColumns) {
                draw(static_cast<uint32_t>(first / kColumns), row, seed, words);
                const float* from = x + row * stride + first;
                float* to = out + row * k + first;
                const int64_t columns = std::min<int64_t>(kBatch * kColumns, k - first);
                for (int64_t i = 0; i < columns; ++i) {
                    const uint32_t word = words[i % kColumns / 2][i / kColumns];
                    const uint32_t lane = i % 2 ? word >> 16 : word & 0xFFFF;
                    to[i] = lane >= threshold ? from[i] * scale : 0.0f;
                }
            }
    });
}

}  // namespace ckf_cpu

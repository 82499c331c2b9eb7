// The products of mma.h on the host, after the PTX ISA's fragments and with no knowledge of a
// kernel: lanes exchange what they hold, every product is exact, and a sum is cut to float32 once,
// towards zero, as tensor cores cut it.
#pragma once

#include <array>

namespace ckf_host {

// What each of the 32 lanes holds.
template <int kWords>
using Lanes = std::array<std::array<uint32_t, kWords>, kWarpSize>;

template <int kWords>
Lanes<kWords> gather(const std::array<uint32_t, kWords>& own) {
    static_assert(kWords % 2 == 0);
    Lanes<kWords> all;
    for (int i = 0; i < kWords; i += 2) {
        const uint64_t* slots = exchange(0xffffffffu, own[i] | uint64_t{own[i + 1]} << 32);
        for (int lane = 0; lane < kWarpSize; ++lane) {
            all[lane][i] = static_cast<uint32_t>(slots[lane]);
            all[lane][i + 1] = static_cast<uint32_t>(slots[lane] >> 32);
        }
    }
    return all;
}

inline float cut(double v) {
    const auto nearest = static_cast<float>(v);
    if (!std::isfinite(nearest) || std::fabs(double{nearest}) <= std::fabs(v)) return nearest;
    return std::nextafterf(nearest, 0.0f);
}

// a_at(row, depth) and b_at(depth, column) of the operands.
template <int kDepth, typename A, typename B>
void multiply(float (&d)[4], A a_at, B b_at) {
    const int lane = current % kWarpSize;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int depth = 0; depth < kDepth; ++depth)
            sum += double{a_at(row, depth)} * double{b_at(depth, column)};
        d[i] = cut(sum);
    }
}

}  // namespace ckf_host

namespace ckf {

template <typename T>
void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto all = ckf_host::gather<6>({a[0], a[1], a[2], a[3], b0, b1});
    const auto half = [](uint32_t word, int which) { return element<T>(Words<1>{{word}}, which); };
    ckf_host::multiply<16>(
        d,
        [&](int row, int depth) {
            const auto& lane = all[row % 8 * 4 + depth % 8 / 2];
            return half(lane[depth / 8 * 2 + row / 8], depth % 2);
        },
        [&](int depth, int column) {
            return half(all[column * 4 + depth % 8 / 2][4 + depth / 8], depth % 2);
        });
}

inline void product_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
    const auto all = ckf_host::gather<6>(
        {bits_of(a[0]), bits_of(a[1]), bits_of(a[2]), bits_of(a[3]), bits_of(b0), bits_of(b1)});
    const auto tf32 = [](uint32_t bits) { return float_of(bits & 0xffffe000u); };
    ckf_host::multiply<8>(
        d,
        [&](int row, int depth) {
            return tf32(all[row % 8 * 4 + depth % 4][depth / 4 * 2 + row / 8]);
        },
        [&](int depth, int column) { return tf32(all[column * 4 + depth % 4][4 + depth / 4]); });
}

}  // namespace ckf

// Products of a warp on the tensor cores (mma.sync, sm_80 and later), and the packed 16-bit words
// that they read. mma_host.h gives the products on the host.
//
// Of a 16 x 8 result lane l holds, in this order, row l / 4 at columns 2 (l % 4) and the next, then
// row l / 4 + 8 at the same columns.
#pragma once

#include "device.h"

namespace ckf {

template <int kWords>
struct alignas(4 * kWords) Words {
    uint32_t w[kWords];
};

#ifdef CKF_HOST_SHIM
template <typename Value>
Value load_if(bool wanted, const void* p) {
    Value value{};
    if (wanted) memcpy(&value, p, sizeof(value));
    return value;
}
template <int kWords>
void load_into(Words<kWords>& value, bool wanted, const void* p) {
    if (!wanted) memset(&value, 0xff, sizeof(value));
    if (wanted) memcpy(&value, p, sizeof(value));
}
inline Words<4> load_once(bool wanted, const void* p) { return load_if<Words<4>>(wanted, p); }
#else
// What p points at, or anything. Never a branch: many fly at once, in the order of the source.
template <int kWords>
__device__ __forceinline__ void load_into(Words<kWords>& v, bool wanted, const void* p) {
    const int is_wanted = wanted;
    if constexpr (kWords == 4)
        asm volatile(
            "{.reg .pred q; setp.ne.s32 q, %5, 0; @q ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
            : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3])
            : "l"(p), "r"(is_wanted));
    else if constexpr (kWords == 2)
        asm volatile("{.reg .pred q; setp.ne.s32 q, %3, 0; @q ld.global.v2.u32 {%0, %1}, [%2];}"
                     : "=&r"(v.w[0]), "=&r"(v.w[1])
                     : "l"(p), "r"(is_wanted));
    else
        asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0; @q ld.global.u32 %0, [%1];}"
                     : "=&r"(v.w[0])
                     : "l"(p), "r"(is_wanted));
}

// What p points at, or zero. Never a branch: many of them fly at once, in the order of the source.
template <typename Value>
__device__ __forceinline__ Value load_if(bool wanted, const void* p) {
    const int is_wanted = wanted;
    if constexpr (sizeof(Value) == 16) {
        Value v;
        asm volatile(
            "{.reg .pred q; setp.ne.s32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
            "mov.u32 %3, 0; @q ld.global.v4.u32 {%0, %1, %2, %3}, [%4];}"
            : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3])
            : "l"(p), "r"(is_wanted));
        return v;
    } else if constexpr (sizeof(Value) == 8) {
        Value v;
        asm volatile(
            "{.reg .pred q; setp.ne.s32 q, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0; "
            "@q ld.global.v2.u32 {%0, %1}, [%2];}"
            : "=&r"(v.w[0]), "=&r"(v.w[1])
            : "l"(p), "r"(is_wanted));
        return v;
    } else if constexpr (sizeof(Value) == 4) {
        uint32_t bits;
        asm volatile(
            "{.reg .pred q; setp.ne.s32 q, %2, 0; mov.u32 %0, 0; @q ld.global.u32 %0, [%1];}"
            : "=&r"(bits)
            : "l"(p), "r"(is_wanted));
        Value v;
        memcpy(&v, &bits, sizeof(v));
        return v;
    } else {
        uint16_t v;
        asm volatile(
            "{.reg .pred q; setp.ne.s32 q, %2, 0; mov.u16 %0, 0; @q ld.global.u16 %0, [%1];}"
            : "=&h"(v)
            : "l"(p), "r"(is_wanted));
        return v;
    }
}

// The same for bytes that a multiprocessor hardly reads again: not kept in its cache.
__device__ __forceinline__ Words<4> load_once(bool wanted, const void* p) {
    const int is_wanted = wanted;
    Words<4> v;
    asm volatile(
        "{.reg .pred q; setp.ne.s32 q, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; "
        "mov.u32 %3, 0; @q ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.w[0]), "=&r"(v.w[1]), "=&r"(v.w[2]), "=&r"(v.w[3])
        : "l"(p), "r"(is_wanted));
    return v;
}
#endif

// Elements p[0 .. kCount) of 16 bits, of which `left` exist; the others are zero. kAligned: p is
// aligned to all of them, and all or none exist.
template <typename T, int kCount, bool kAligned>
__device__ __forceinline__ Words<kCount / 2> load_words(const T* p, int left) {
    if constexpr (kAligned) return load_if<Words<kCount / 2>>(left > 0, p);
    Words<kCount / 2> out;
#pragma unroll
    for (int i = 0; i < kCount; i += 2)
        out.w[i / 2] = load_if<uint16_t>(i < left, p + i) |
                       static_cast<uint32_t>(load_if<uint16_t>(i + 1 < left, p + i + 1)) << 16;
    return out;
}

template <typename T, int kCount, bool kAligned>
__device__ __forceinline__ void store_words(T* p, const Words<kCount / 2>& words, int left) {
    if constexpr (kAligned) {
        if (left > 0) *reinterpret_cast<Words<kCount / 2>*>(p) = words;
    } else {
        T v[kCount];
        memcpy(v, &words, sizeof(words));
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (i < left) p[i] = v[i];
    }
}

// Element i of packed words.
template <typename T, int kWords>
__device__ __forceinline__ float element(const Words<kWords>& words, int i) {
    const auto bits = static_cast<uint16_t>(words.w[i / 2] >> (i % 2 * 16));
    T value;
    memcpy(&value, &bits, sizeof(value));
    return to_float(value);
}

__device__ __forceinline__ uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    return bits;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof(v));
    return v;
}

#ifndef CKF_HOST_SHIM

// d += a b over 16 of k. a: rows l / 4 and l / 4 + 8 at k = 2 (l % 4) and the next, then both rows
// 8 further; b: column l / 4 at the same k, then 8 further.
template <typename T>
__device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1);
template <>
__device__ __forceinline__ void product<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void product<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b over 8 of k in tf32: float32 whose last 13 bits are ignored. a: rows l / 4 and l / 4 + 8
// at k = l % 4, then both rows 4 further; b: column l / 4 at the same k, then 4 further.
__device__ __forceinline__ void product_tf32(float (&d)[4], const float (&a)[4], float b0,
                                             float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])),
          "r"(bits_of(b0)), "r"(bits_of(b1)));
}

#endif

}  // namespace ckf

#ifdef CKF_HOST_SHIM
#include "mma_host.h"
#endif

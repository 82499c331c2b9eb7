// One instruction set's CkfMicro: register tiles in GCC's vector types.
//
// setup.py compiles this file once for every set, with -DCKF_INSTRUCTIONS=NAME. Nothing here may
// have external linkage but that table: an inline function of the standard library, compiled for
// AVX-512, could be the copy that the linker keeps for everyone.
#include "micro.h"

#define CKF_UNROLL _Pragma("GCC unroll 8")  // else the sums are kept on the stack

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kDotColumns = 4, kVectors = 6;  // 32 registers of 64 bytes
#elif defined(__AVX2__)
constexpr int kLanes = 8, kDotColumns = 2, kVectors = 3;  // 16 of 32 bytes
#else
constexpr int kLanes = 4, kDotColumns = 2, kVectors = 3;
#endif
constexpr int kHeight = 4;     // of a tile in registers: rows of out or y, columns of h in outer
constexpr int kRowBlock = 64;  // of x, whose columns at hand stay in L1

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

inline float sum(Vector value) {
    float lanes[kLanes];
    store(lanes, value);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <int Rows, int Columns>
void dot_tile(const float* const* x, const float* const* a, int64_t k, const float* scale,
              float* out, int64_t stride) {
    Vector sums[Rows][Columns] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes) {
        Vector left[Rows];
        CKF_UNROLL
        for (int r = 0; r < Rows; ++r) left[r] = load(x[r] + i);
        CKF_UNROLL
        for (int c = 0; c < Columns; ++c) {
            const Vector right = load(a[c] + i);
            CKF_UNROLL
            for (int r = 0; r < Rows; ++r) sums[r][c] += left[r] * right;
        }
    }
    CKF_UNROLL
    for (int r = 0; r < Rows; ++r) {
        CKF_UNROLL
        for (int c = 0; c < Columns; ++c) {
            float total = sum(sums[r][c]);
            for (int64_t j = i; j < k; ++j) total += x[r][j] * a[c][j];
            out[r * stride + c] = total * scale[c];
        }
    }
}

template <int Rows, int Vectors>
void expand_tile(float* const* y, const float* h, int64_t stride, const float* const* b,
                 int64_t columns, int64_t first) {
    Vector sums[Rows][Vectors];
    CKF_UNROLL
    for (int r = 0; r < Rows; ++r)
        CKF_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[r][v] = load(y[r] + first + v * kLanes);
    for (int64_t c = 0; c < columns; ++c) {
        const float* row = b[c] + first;
        Vector right[Vectors];
        CKF_UNROLL
        for (int v = 0; v < Vectors; ++v) right[v] = load(row + v * kLanes);
        CKF_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const float left = h[r * stride + c];
            CKF_UNROLL
            for (int v = 0; v < Vectors; ++v) sums[r][v] += left * right[v];
        }
    }
    CKF_UNROLL
    for (int r = 0; r < Rows; ++r)
        CKF_UNROLL
        for (int v = 0; v < Vectors; ++v) store(y[r] + first + v * kLanes, sums[r][v]);
}

template <int Columns, int Vectors>
void outer_tile(float* const* out, const float* const* h, int64_t column, const float* const* x,
                int64_t rows, int64_t first) {
    Vector sums[Columns][Vectors];
    CKF_UNROLL
    for (int c = 0; c < Columns; ++c)
        CKF_UNROLL
        for (int v = 0; v < Vectors; ++v) sums[c][v] = load(out[c] + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
        const float* row = x[r] + first;
        Vector right[Vectors];
        CKF_UNROLL
        for (int v = 0; v < Vectors; ++v) right[v] = load(row + v * kLanes);
        CKF_UNROLL
        for (int c = 0; c < Columns; ++c) {
            const float left = h[r][column + c];
            CKF_UNROLL
            for (int v = 0; v < Vectors; ++v) sums[c][v] += left * right[v];
        }
    }
    CKF_UNROLL
    for (int c = 0; c < Columns; ++c)
        CKF_UNROLL
        for (int v = 0; v < Vectors; ++v) store(out[c] + v * kLanes, sums[c][v]);
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// Calls body(Count<count>()), count being 1 to Most.
template <int Most, typename Body>
void with_count(int64_t count, const Body& body) {
    if constexpr (Most > 1) {
        if (count < Most) return with_count<Most - 1>(count, body);
    }
    body(Count<Most>());
}

inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

void dot(const float* const* x, int64_t rows, const float* const* a, int64_t columns, int64_t k,
         const float* scale, float* out, int64_t stride) {
    for (int64_t c = 0; c < columns; c += kDotColumns)
        for (int64_t r = 0; r < rows; r += kHeight)
            with_count<kHeight>(least(kHeight, rows - r), [&](auto own_rows) {
                with_count<kDotColumns>(least(kDotColumns, columns - c), [&](auto own_columns) {
                    dot_tile<own_rows.value, own_columns.value>(
                        x + r, a + c, k, scale + c, out + r * stride + c, stride);
                });
            });
}

void expand(float* const* y, int64_t rows, const float* h, int64_t stride, const float* const* b,
            int64_t columns, int64_t n) {
    const int64_t whole = n / kLanes;
    for (int64_t v = 0; v < whole; v += kVectors)
        for (int64_t r = 0; r < rows; r += kHeight)
            with_count<kHeight>(least(kHeight, rows - r), [&](auto own_rows) {
                with_count<kVectors>(least(kVectors, whole - v), [&](auto vectors) {
                    expand_tile<own_rows.value, vectors.value>(
                        y + r, h + r * stride, stride, b, columns, v * kLanes);
                });
            });
    for (int64_t i = whole * kLanes; i < n; ++i)
        for (int64_t r = 0; r < rows; ++r) {
            float total = y[r][i];
            for (int64_t c = 0; c < columns; ++c) total += h[r * stride + c] * b[c][i];
            y[r][i] = total;
        }
}

void outer(float* const* out, int64_t columns, const float* const* h, int64_t column,
           const float* const* x, int64_t rows, int64_t first, int64_t width) {
    const int64_t whole = width / kLanes;
    for (int64_t r = 0; r < rows; r += kRowBlock) {
        const int64_t some = least(kRowBlock, rows - r);
        for (int64_t c = 0; whole > 0 && c < columns; c += kHeight)
            with_count<kHeight>(least(kHeight, columns - c), [&](auto own_columns) {
                with_count<kVectors>(whole, [&](auto vectors) {
                    outer_tile<own_columns.value, vectors.value>(out + c, h + r, column + c,
                                                                 x + r, some, first);
                });
            });
        for (int64_t i = whole * kLanes; i < width; ++i)
            for (int64_t c = 0; c < columns; ++c) {
                float total = out[c][i];
                for (int64_t j = r; j < r + some; ++j) total += h[j][column + c] * x[j][first + i];
                out[c][i] = total;
            }
    }
}

}  // namespace

#define CKF_JOIN(one, other) one##other
#define CKF_TABLE(name) CKF_JOIN(kCkfMicro_, name)
#define CKF_QUOTE(name) #name
#define CKF_TEXT(name) CKF_QUOTE(name)

extern const CkfMicro CKF_TABLE(CKF_INSTRUCTIONS) = {CKF_TEXT(CKF_INSTRUCTIONS),
                                                     kVectors* kLanes, dot, expand, outer};

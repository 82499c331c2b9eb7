// The inner products of the CPU kernels, compiled once for every instruction set (micro.cpp). All
// matrices are row-major float32 and given by pointers to their rows, so that rows of one task are
// worked on wherever they lie.
#pragma once

#include <cstdint>

struct CkfMicro {
    const char* name;
    int64_t block;  // columns that outer works on at a time

    // out[r * stride + c] = scale[c] * sum_i x[r][i] a[c][i], i < k
    void (*dot)(const float* const* x, int64_t rows, const float* const* a, int64_t columns,
                int64_t k, const float* scale, float* out, int64_t stride);

    // y[r][i] += sum_c h[r * stride + c] b[c][i], i < n
    void (*expand)(float* const* y, int64_t rows, const float* h, int64_t stride,
                   const float* const* b, int64_t columns, int64_t n);

    // out[c][i] += sum_r h[r][column + c] x[r][first + i], i < width (at most block), rows in order
    void (*outer)(float* const* out, int64_t columns, const float* const* h, int64_t column,
                  const float* const* x, int64_t rows, int64_t first, int64_t width);
};

extern const CkfMicro kCkfMicro_base, kCkfMicro_avx2, kCkfMicro_avx512;

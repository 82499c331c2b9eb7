// The launchers of ckf: raw pointers, ints and a stream. Nothing here knows Python or torch, so the
// same sources are compiled by nvcc for the extension and by a plain C++ compiler for the tests on
// the host.
#pragma once

#include <cstdint>

// How the elements of x, a, b and y are stored. The numbers are shared with ckf/kernels/cuda.py.
enum CkfDtype : int { kCkfFloat32 = 0, kCkfFloat16 = 1, kCkfBFloat16 = 2 };

extern "C" {

// y[i, :] += sum_c gates[task_ids[i], c] * dot(a[c, :], x[i, :]) * b[c, :] over the rank columns c
// whose gate is not zero, in one launch on `stream` (a cudaStream_t) of `device`.
//   y (m, n) with row stride y_stride, x (m, k) with row stride x_stride (strides in elements), a
//   (rank, k), b (rank, n), gates (tasks, rank) fp32, task_ids (m,).
// A row with id -1 is left as it is; a row with any other id outside [0, tasks) becomes NaN.
// Returns a cudaError_t: 0, or what went wrong with the arguments or the launch.
int ckf_multi_lora_decode(void* y, const void* x, const void* a, const void* b, const float* gates,
                          const int64_t* task_ids, int64_t m, int64_t k, int64_t n, int64_t rank,
                          int64_t tasks, int64_t y_stride, int64_t x_stride, int dtype, int device,
                          void* stream);

// The runtime's text for an error code.
const char* ckf_error_string(int code);
}

// The launchers of ckf: raw pointers, ints and a stream. Nothing here knows Python or torch, so the
// same sources are compiled by nvcc for the extension and by a plain C++ compiler for the tests on
// the host.
#pragma once

#include <cstdint>

// How the elements of x, a, b and y are stored. The numbers are shared with ckf/kernels/cuda.py.
enum CkfDtype : int { kCkfFloat32 = 0, kCkfFloat16 = 1, kCkfBFloat16 = 2 };

constexpr int kCkfMostLinears = 8;  // of one group

// A linear of a group: y (m, n) with a row stride in elements, b (rank, n).
struct CkfLinear {
    void* y;
    const void* b;
    int64_t y_stride, n, rank;
};

// The kernels that compute the base as well: ckf_decode_wgmma where one span of n a block is enough (on
// an H100 the other is faster past that), else ckf_decode_linear; or one of them. The numbers are
// shared with ckf/kernels/cuda.py.
enum CkfDecodeForm : int { kCkfAnyForm = 0, kCkfLoads = 1, kCkfWgmma = 2 };

// A frozen linear of a group with its update: w (n, k) and y (m, n) with row strides in elements,
// bias (n,) or null, b (rank, n).
struct CkfFrozenLinear {
    void* y;
    const void *w, *bias, *b;
    int64_t y_stride, w_stride, n, rank;
};

// H (m, columns) for a product, made by the same launch: gates[task_ids[i], c] * dot(x[i, :],
// a[c, :]) or 0 where the gate is; ids as in ckf_multi_lora_decode. Forward, its columns with
// slots[t, c] >= 0 are also written to compact (m, width) at that slot; for dx, `restored`
// (m, columns) is read back from there. Expert by expert, eight columns at a time have one gate and
// slots in a row: ranks are multiples of eight. columns: at most 256, a multiple of eight; up to 128
// cost half. Pointers 16-byte aligned, strides (in elements) of gated, compact and restored
// multiples of eight.
struct CkfShrink {
    const void* a;  // (columns, k)
    void *gated, *compact, *restored;  // compact may be null; restored: for dx, or null
    const float* gates;
    const int32_t* slots;  // null without compact
    const int64_t* task_ids;
    uint32_t* done;  // as many as m has rows / 128, rounded up to pairs: overwritten
    int64_t columns, tasks;
    int64_t a_stride, gated_stride, compact_stride, restored_stride, gates_stride, slots_stride;
};

// A product with the update inside; strides in elements from row to row. Forward y (m, n) =
// x (m, k) W^T (n, k) + bias (n,) + h (m, r) b (r, n); dx: y (m, n) = mask (h b) + x (m, k) W
// (k, n).
// Every pointer 16-byte aligned (bias 4), every stride and n a multiple of eight, no size zero.
struct CkfGemm {
    const void *x, *w, *h, *b, *bias;  // bias may be null
    const int64_t* seed;               // of the mask on h b, on the device; null: none
    void* y;
    int64_t m, n, k, r;
    int64_t x_stride, w_stride, h_stride, b_stride, y_stride;
    uint32_t threshold;  // 16-bit lanes of the mask below it are dropped, the others scaled
    float scale;
    int32_t dx, dtype, device;
    int32_t accumulate;  // dx: added to what y holds
    CkfShrink shrink;  // columns 0: h was there before
};

extern "C" {

// For each linear l of a group that shares x, in one launch on `stream` (a cudaStream_t) of
// `device`: y_l[i, :] += sum_c gates[task_ids[i], c] * dot(a[c, :], x[i, :]) * b_l[c, :] over l's
// rank columns c whose gate is not zero.
//   linears: `count` of them, read before this returns; x (m, k) with row stride x_stride in
//   elements; a (R, k) and gates (tasks, R) fp32, R the sum of the ranks, the linears' columns side
//   by side; task_ids (m,).
// A row with id -1 is left as it is; a row with any other id outside [0, tasks) becomes NaN.
// overlap: the kernel may start while the one before it on the stream still runs; with 1 it reads no
// memory until that one is complete, with 2 nothing of y: all else must have been complete before
// that one began (ignored before sm_90).
// Returns a cudaError_t: 0, or what went wrong with the arguments or the launch.
int ckf_multi_lora_decode(const CkfLinear* linears, int count, const void* x, const void* a,
                          const float* gates, const int64_t* task_ids, int64_t m, int64_t k,
                          int64_t tasks, int64_t x_stride, int dtype, int device, int overlap,
                          void* stream);

// For each linear l of a group that shares x, in one launch: y_l[i, :] = x[i, :] w_l^T + bias_l +
// what ckf_multi_lora_decode adds to it; arguments and ids as there. For up to 16 rows of float16 or
// bfloat16 on a device with clusters of eight blocks, ranks of at most 256, k a multiple of eight;
// x, a and w 16-byte aligned, x_stride and w_stride multiples of eight.
// Returns cudaErrorNotSupported (801), having done nothing, where the arguments or the device are
// not such; otherwise as above.
int ckf_decode_linear(const CkfFrozenLinear* linears, int count, const void* x, const void* a,
                      const float* gates, const int64_t* task_ids, int64_t m, int64_t k,
                      int64_t tasks, int64_t x_stride, int dtype, int device, void* stream);

// The same for up to 64 rows by copies of tiles and warpgroup products, where the code is for sm_90a:
// ranks of at most 128, and each block in at most `most_spans` spans of n one after the other.
int ckf_decode_wgmma(const CkfFrozenLinear* linears, int count, const void* x, const void* a,
                     const float* gates, const int64_t* task_ids, int64_t m, int64_t k,
                     int64_t tasks, int64_t x_stride, int dtype, int device, int most_spans,
                     void* stream);

// Launches it on `stream`. float16 and bfloat16, compute capability 9.0, code for sm_90a; else
// cudaErrorNotSupported. Returns a cudaError_t as above.
int ckf_hopper_gemm(const CkfGemm* gemm, void* stream);

// The runtime's text for an error code.
const char* ckf_error_string(int code);
}

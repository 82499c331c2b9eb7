// Multi-LoRA for few rows (decode): y[i, :] += sum_c g[t_i, c] * (a[c, :] . x[i, :]) * b[c, :] in
// one launch.
//
//   x (m, k), a (R, k), b (R, n), g (T, R) fp32, ids (m,), y (m, n); c runs over the R rank columns
//   of all experts.
//
// A block owns kRows rows and a slice of n. It recomputes the shrink S = x a^T for its rows (A
// comes from L2, so no second launch and no grid barrier is needed) and expands into its slice at
// once. Warp w owns the columns c = w (mod 8): it votes on their gates, takes the live ones in
// batches, sums S over k with its lanes on 16-byte vectors, and adds g * S * b to registers; the
// eight warps meet once, in shared memory, in a fixed order. A row's sum runs in an order that
// depends on that row alone: same bits whatever its neighbours are. A gate of zero selects: neither
// inf nor NaN behind it is ever added. Next steps keep this shape: a cluster that shares the k loop
// of `shrink`, tensor cores inside it.
#include "launchers.h"

#ifdef CKF_HOST_SHIM
#include "host_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CKF_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include <cstring>

namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kScan = 4;  // gates a lane looks at in one vote: 1024 dead columns cost one vote
constexpr int kWantedBlocks = 128;  // about one per SM; below it, rows are spread over more blocks
constexpr unsigned kFull = 0xffffffffu;

template <typename T>
struct Args {
    T* y;
    const T *x, *a, *b;
    const float* gates;
    const int64_t* task_ids;
    int64_t m, y_stride, x_stride;
    int k, n, rank, tasks;
};

template <typename T>
constexpr int kVec = 16 / sizeof(T);  // elements of one 16-byte load

template <typename T>
struct alignas(16) Pack {
    T v[kVec<T>];
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
    return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
    return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

// Elements p[0 .. kVec) of which `left` exist; the others read as zero. kAligned: p is 16-byte
// aligned and `left` is a multiple of kVec. Both paths give every lane the same elements, so
// alignment never changes a bit of the result.
template <typename T, bool kAligned>
__device__ __forceinline__ Pack<T> load(const T* p, int left) {
    Pack<T> out;
    if constexpr (kAligned) {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (left > 0) raw = __ldg(reinterpret_cast<const uint4*>(p));
        memcpy(&out, &raw, sizeof(out));
    } else {
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) out.v[v] = v < left ? p[v] : from_float<T>(0.0f);
    }
    return out;
}

// s[r][j] = x_row[r] . a_row[j], complete in every lane.
template <typename T, int kRows, int kColumns, bool kAligned>
__device__ __forceinline__ void shrink(const T* const (&x_row)[kRows],
                                       const T* const (&a_row)[kColumns], int k, int lane,
                                       float (&s)[kRows][kColumns]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kColumns; ++j) s[r][j] = 0.0f;

    [[maybe_unused]] constexpr int kUnroll = kRows == 4 ? 1 : 2;
#pragma unroll kUnroll
    for (int i = lane * kVec<T>; i < k; i += kLanes * kVec<T>) {
        Pack<T> a_vec[kColumns], x_vec[kRows];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) a_vec[j] = load<T, kAligned>(a_row[j] + i, k - i);
#pragma unroll
        for (int r = 0; r < kRows; ++r) x_vec[r] = load<T, kAligned>(x_row[r] + i, k - i);
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float x_value = to_float(x_vec[r].v[v]);
#pragma unroll
                for (int j = 0; j < kColumns; ++j)
                    s[r][j] = fmaf(x_value, to_float(a_vec[j].v[v]), s[r][j]);
            }
        }
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) s[r][j] += __shfl_xor_sync(kFull, s[r][j], offset);
}

// The lowest kColumns columns of `live` (bit l: column first + kWarps * l): shrink, gate, expand
// into acc.
template <typename T, int kRows, int kColumns, bool kAligned>
__device__ __forceinline__ void add_columns(const Args<T>& p, unsigned& live,
                                            const unsigned (&row_live)[kRows],
                                            const float (&gate)[kRows], int first,
                                            const T* const (&x_row)[kRows], int i_n, int lane,
                                            float (&acc)[kRows][kVec<T>]) {
    int source[kColumns];
    bool present[kColumns];
    const T* a_row[kColumns];
    Pack<T> b_vec[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        present[j] = live != 0;
        source[j] = present[j] ? __ffs(live) - 1 : source[0];  // j = 0 is always present
        live &= live - 1;                                      // 0 stays 0
        const int64_t column = first + kWarps * source[j];
        a_row[j] = p.a + column * p.k;
        b_vec[j] = load<T, kAligned>(p.b + column * p.n + i_n, present[j] ? p.n - i_n : 0);
    }
    float s[kRows][kColumns];
    shrink<T, kRows, kColumns, kAligned>(x_row, a_row, p.k, lane, s);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (!present[j] || !(row_live[r] >> source[j] & 1u))
                continue;  // the same for the whole warp
            const float h = s[r][j] * __shfl_sync(kFull, gate[r], source[j]);
#pragma unroll
            for (int v = 0; v < kVec<T>; ++v)
                acc[r][v] = fmaf(h, to_float(b_vec[j].v[v]), acc[r][v]);
        }
    }
}

template <typename T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads) multi_lora_decode_kernel(const Args<T> p) {
    constexpr int kBlockN = kLanes * kVec<T>;
    __shared__ float partial[kWarps][kRows][kBlockN];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t i_m = static_cast<int64_t>(blockIdx.y) * kRows;
    const int i_n = blockIdx.x * kBlockN + lane * kVec<T>;

    bool any_row = false;
    const float* gate_row[kRows];  // null: this row has no gates to read
    const T* x_row[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const bool inside = i_m + r < p.m;
        const int64_t task = inside ? p.task_ids[i_m + r] : -1;
        any_row = any_row || task != -1;
        gate_row[r] = task >= 0 && task < p.tasks ? p.gates + task * p.rank : nullptr;
        x_row[r] = p.x + (inside ? i_m + r : i_m) * p.x_stride;
    }
    if (!any_row) return;

    float acc[kRows][kVec<T>];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) acc[r][v] = 0.0f;

    const auto read_gate = [&](int r, int column) {
        return gate_row[r] != nullptr && column < p.rank ? __ldg(gate_row[r] + column) : 0.0f;
    };
    for (int c = 0; c < p.rank; c += kScan * kThreads) {
        bool any_gate = false;
#pragma unroll
        for (int scan = 0; scan < kScan; ++scan)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
                any_gate =
                    any_gate || read_gate(r, c + scan * kThreads + lane * kWarps + warp) != 0.0f;
        if (__ballot_sync(kFull, any_gate) == 0) continue;

#pragma unroll 1
        for (int first = c + warp; first < p.rank && first < c + kScan * kThreads;
             first += kThreads) {
            float gate[kRows];
            unsigned row_live[kRows], live = 0;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                gate[r] = read_gate(r, first + lane * kWarps);
                row_live[r] = __ballot_sync(kFull, gate[r] != 0.0f);
                live |= row_live[r];
            }
            while (live != 0) {
                if (__popc(live) > 2)
                    add_columns<T, kRows, 4, kAligned>(p, live, row_live, gate, first, x_row, i_n,
                                                       lane, acc);
                else
                    add_columns<T, kRows, 2, kAligned>(p, live, row_live, gate, first, x_row, i_n,
                                                       lane, acc);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) partial[warp][r][lane * kVec<T> + v] = acc[r][v];
    __syncthreads();

    for (int i = threadIdx.x; i < kRows * kBlockN; i += kThreads) {
        const int r = i / kBlockN, column = i % kBlockN;
        const int i_y = blockIdx.x * kBlockN + column;
        if (i_m + r >= p.m || i_y >= p.n) continue;
        const int64_t task = p.task_ids[i_m + r];
        if (task == -1) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial[w][r][column];
        T* y = p.y + (i_m + r) * p.y_stride + i_y;
        *y = from_float<T>(task >= 0 && task < p.tasks ? to_float(*y) + sum : nanf(""));
    }
}

template <typename T, int kRows>
void launch_rows(const Args<T>& p, bool aligned, cudaStream_t stream) {
    constexpr int kBlockN = kLanes * kVec<T>;
    const dim3 grid((p.n + kBlockN - 1) / kBlockN,
                    static_cast<unsigned>((p.m + kRows - 1) / kRows));
    if (aligned)
        CKF_LAUNCH((multi_lora_decode_kernel<T, kRows, true>), grid, dim3(kThreads), stream, p);
    else
        CKF_LAUNCH((multi_lora_decode_kernel<T, kRows, false>), grid, dim3(kThreads), stream, p);
}

bool is_aligned(const void* pointer, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

template <typename T>
void launch(const Args<T>& p, cudaStream_t stream) {
    const int64_t size = sizeof(T);
    const bool aligned = is_aligned(p.a, p.k * size) && is_aligned(p.b, p.n * size) &&
                         is_aligned(p.x, p.m > 1 ? p.x_stride * size : 0);
    const int64_t slices = (p.n + kLanes * kVec<T> - 1) / (kLanes * kVec<T>);
    const auto blocks = [&](int rows) { return slices * ((p.m + rows - 1) / rows); };
    if (blocks(4) >= kWantedBlocks)
        launch_rows<T, 4>(p, aligned, stream);
    else if (blocks(2) >= kWantedBlocks)
        launch_rows<T, 2>(p, aligned, stream);
    else
        launch_rows<T, 1>(p, aligned, stream);
}

}  // namespace

extern "C" const char* ckf_error_string(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

extern "C" int ckf_multi_lora_decode(void* y, const void* x, const void* a, const void* b,
                                     const float* gates, const int64_t* task_ids, int64_t m,
                                     int64_t k, int64_t n, int64_t rank, int64_t tasks,
                                     int64_t y_stride, int64_t x_stride, int dtype, int device,
                                     void* stream) {
    constexpr int64_t kMost = int64_t{1} << 30;  // int arithmetic on k, n and rank never overflows
    constexpr int64_t kMostRows = 65535;         // of the grid's second dimension
    if (m < 0 || k < 0 || n < 0 || rank < 0 || tasks < 0 || m > kMostRows || k > kMost ||
        n > kMost || rank > kMost || tasks > kMost)
        return cudaErrorInvalidValue;
    if (m == 0 || n == 0) return cudaSuccess;
    // The extension has its own copy of the runtime: tell it the device that torch has chosen.
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) {
        cudaGetLastError();  // forget it: the next launch must not be blamed
        return error;
    }

    const auto s = static_cast<cudaStream_t>(stream);
    const auto go = [&](auto zero) {
        using T = decltype(zero);
        launch(Args<T>{static_cast<T*>(y), static_cast<const T*>(x), static_cast<const T*>(a),
                       static_cast<const T*>(b), gates, task_ids, m, y_stride, x_stride,
                       static_cast<int>(k), static_cast<int>(n), static_cast<int>(rank),
                       static_cast<int>(tasks)},
               s);
    };
    switch (dtype) {
        case kCkfFloat32:
            go(float{});
            break;
        case kCkfFloat16:
            go(__half{});
            break;
        case kCkfBFloat16:
            go(__nv_bfloat16{});
            break;
        default:
            return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

// What the launchers of decoding share, and how every launcher gets to its device.
#pragma once

#include "device.h"
#include "launchers.h"

namespace ckf {

enum class Sizes { kWrong, kNothingToDo, kFine };

// Of a group of linears that share x (m, k): int arithmetic on sizes never overflows.
template <typename Linear>
Sizes look_at(const Linear* linears, int count, int64_t m, int64_t k, int64_t tasks,
              int64_t most_rows) {
    constexpr int64_t kMost = int64_t{1} << 30;
    const auto fits = [](int64_t size) { return size >= 0 && size <= kMost; };
    if (m < 0 || m > most_rows || !fits(k) || !fits(tasks)) return Sizes::kWrong;
    if (count < 0 || count > kCkfMostLinears) return Sizes::kWrong;
    int64_t rank = 0, columns = 0;
    for (int l = 0; l < count; ++l) {
        if (!fits(linears[l].n) || !fits(linears[l].rank)) return Sizes::kWrong;
        rank += linears[l].rank;
        columns += linears[l].n;
    }
    if (!fits(rank)) return Sizes::kWrong;
    return m == 0 || columns == 0 ? Sizes::kNothingToDo : Sizes::kFine;
}

// Whether rows of so many bytes begin at 16 bytes.
inline bool is_aligned(const void* pointer, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

// Clusters that cover the n of all linears once, each `wide` of one linear; where each linear's
// begin.
template <typename Args>
int64_t place(Args& p, int64_t wide) {
    int64_t clusters = 0;
    for (int l = 0; l < p.count; ++l) {
        p.linears[l].first_cluster = static_cast<int>(clusters);
        clusters += (p.linears[l].n + wide - 1) / wide;
    }
    return clusters;
}

// The extension has its own copy of the runtime: tell it the device that torch has chosen.
inline cudaError_t use_device(int device) {
    const cudaError_t error = cudaSetDevice(device);
    if (error != cudaSuccess) cudaGetLastError();  // forget it: no later launch is to be blamed
    return error;
}

// For the kernels that compute the base as well: checks sizes, goes to the device, and calls
// `go(zero)` with a zero of the elements' type, which returns what its launch returned.
template <typename Go>
cudaError_t launch_halves(const CkfFrozenLinear* linears, int count, int64_t m, int64_t k,
                          int64_t tasks, int dtype, int device, Go go) {
    const Sizes sizes = look_at(linears, count, m, k, tasks, int64_t{1} << 30);
    if (sizes == Sizes::kWrong) return cudaErrorInvalidValue;
    if (sizes == Sizes::kNothingToDo) return cudaSuccess;
    cudaError_t error = use_device(device);
    if (error != cudaSuccess) return error;
    if (dtype == kCkfFloat16)
        error = go(__half{});
    else if (dtype == kCkfBFloat16)
        error = go(__nv_bfloat16{});
    else
        return cudaErrorNotSupported;
    cudaGetLastError();  // forget it: no later launch is to be blamed
    return error;
}

}  // namespace ckf

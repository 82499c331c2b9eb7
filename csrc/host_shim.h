// Enough of CUDA C++ to run a kernel of this folder on the host, for tests without a GPU.
//
// Every CUDA thread of a block is a fiber; blocks run one after the other. A fiber runs until it
// meets a barrier or a warp vote, so a missing barrier shows as a result that changes with the
// order in which fibers are run (ckf_host_set_order), and a barrier that not everybody reaches is
// reported as a failed launch instead of a hang. Strict on purpose: warp functions take the full
// mask only, and no thread may leave before a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __shared__ static
#define CKF_LAUNCH(kernel, grid, block, stream, ...) \
    ((void)(stream), ckf_host::launch(grid, block, [&] { (kernel)(__VA_ARGS__); }))

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace ckf_host {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};
struct Warp {
    Barrier barrier;
    uint64_t slot[2][kWarpSize];  // two sets: a fast lane may start the next exchange while others
                                  // still read
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    bool done = false;
};

inline unsigned order_seed = 0;  // 0: by thread index, 1: backwards, else shuffled by this seed
inline cudaError_t last_error = cudaSuccess;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline int current = 0, block_threads = 0;
inline bool moved = false;  // did any fiber pass a barrier or end since the last look?
inline ucontext_t scheduler;
inline std::function<void()> body;
inline dim3 thread_index, block_index;

inline void wait(Barrier& barrier, int expected) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        moved = true;
        return;
    }
    while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

inline void run_body() {
    body();
    fibers[current].done = true;
    moved = true;
    swapcontext(&fibers[current].context, &scheduler);
}

inline std::vector<int> fiber_order() {
    std::vector<int> order(block_threads);
    std::iota(order.begin(), order.end(), 0);
    if (order_seed == 1) std::reverse(order.begin(), order.end());
    if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
    return order;
}

// Runs one block; false when its threads wait for each other for ever.
inline bool run_block(const std::vector<int>& order) {
    warps.assign(block_threads / kWarpSize, Warp{});
    block_barrier = Barrier{};
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_body, 0);
    }
    while (true) {
        bool waiting = false;
        moved = false;
        for (const int i : order) {
            if (fibers[i].done) continue;
            current = i;
            thread_index = dim3(i, 0, 0);
            swapcontext(&scheduler, &fibers[i].context);
            waiting = waiting || !fibers[i].done;
        }
        if (!waiting) return true;
        if (!moved) return false;
    }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
    block_threads = block.x;
    if (block.y != 1 || block.z != 1 || block.x % kWarpSize != 0 || grid.x == 0 || grid.y == 0) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    body = std::move(kernel);
    fibers.resize(block_threads);
    const std::vector<int> order = fiber_order();
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            block_index = dim3(x, y, 0);
            if (!run_block(order)) {
                last_error = cudaErrorLaunchFailure;
                return;
            }
        }
    }
}

// Every lane gives a value and sees everybody's.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    if (mask != 0xffffffffu) std::abort();
    Warp& warp = warps[current / kWarpSize];
    uint64_t* slots = warp.slot[warp.barrier.generation % 2];
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    slots[current % kWarpSize] = bits;
    wait(warp.barrier, kWarpSize);
    return slots;
}

template <typename T>
T value_of(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace ckf_host

#define threadIdx ckf_host::thread_index
#define blockIdx ckf_host::block_index

inline void __syncthreads() { ckf_host::wait(ckf_host::block_barrier, ckf_host::block_threads); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
    const uint64_t* slots = ckf_host::exchange(mask, value);
    return ckf_host::value_of<T>(slots[source % ckf_host::kWarpSize]);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    const uint64_t* slots = ckf_host::exchange(mask, value);
    return ckf_host::value_of<T>(slots[(ckf_host::current % ckf_host::kWarpSize) ^ lanes]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const uint64_t* slots = ckf_host::exchange(mask, vote);
    unsigned result = 0;
    for (int lane = 0; lane < ckf_host::kWarpSize; ++lane)
        result |= static_cast<unsigned>(slots[lane] & 1) << lane;
    return result;
}

inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <typename T>
T __ldg(const T* p) {
    return *p;
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return std::exchange(ckf_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    return error == cudaErrorInvalidValue ? "invalid argument"
                                          : "threads of a block wait for each other for ever";
}

// The 16-bit types by integer arithmetic, rounding to nearest even, so that any C++17 compiler can
// build this.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
    return ckf_host::value_of<float>(uint64_t{v.bits} << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    if (std::isnan(v)) return {0x7fff};
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half v) {
    const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    float magnitude = std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024),
                                 std::max(exponent, 1) - 25);
    if (exponent == 31) magnitude = fraction != 0 ? NAN : INFINITY;
    return v.bits >> 15 != 0 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float magnitude = std::fabs(v);
    if (std::isnan(v)) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
    // In units of the last place; 2048 carries into the exponent by itself.
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

extern "C" void ckf_host_set_order(unsigned seed) { ckf_host::order_seed = seed; }
// The conversions above, for a test that compares all 65,536 patterns with another library's.
extern "C" float ckf_host_half_to_float(uint16_t bits) { return __half2float(__half{bits}); }
extern "C" uint16_t ckf_host_float_to_half(float v) { return __float2half_rn(v).bits; }
extern "C" uint16_t ckf_host_float_to_bfloat16(float v) { return __float2bfloat16_rn(v).bits; }

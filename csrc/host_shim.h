// Enough of CUDA C++ to run a kernel of this folder on the host, for tests without a GPU.
//
// Every CUDA thread of a cluster is a fiber; the blocks of a cluster run in lock step, clusters one
// after the other, or all together where blocks wait for others' results. A fiber runs until it
// meets a barrier or a warp vote, so a missing barrier shows as a result that changes with the order
// in which fibers are run (ckf_host_set_order), and a barrier that not everybody reaches is reported
// as a failed launch instead of a hang. Shared memory starts as NaN. Strict on purpose: warp
// functions take the full mask only, no thread may leave before a barrier, and no block may leave
// while another reads its shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t : int {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801
};
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
constexpr size_t kStackBytes = 64 * 1024, kSharedBytes = 227 * 1024;

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};
struct Warp {
    Barrier barrier;
    uint64_t slot[2][kWarpSize];  // two sets: a fast lane may start the next exchange while others
                                  // still read
};
// Made by ucontext, switched by _setjmp and _longjmp, which make no system call.
struct Fiber {
    ucontext_t context;
    jmp_buf registers;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool started = false, done = false;
    unsigned cluster_generation = 0;  // of the arrival that has no wait yet
    std::vector<std::tuple<void*, const void*, int>> copies;  // of bytes, not waited for yet
};
struct Block {
    Barrier barrier;
    bool vote[2] = {false, false};
    int left = 0;  // threads that are done
    std::vector<Warp> warps;
    std::vector<std::pair<float*, float>> sent;  // by others, not landed yet
    alignas(16) char shared[kSharedBytes];
};

inline unsigned order_seed = 0;  // 0: by thread index, 1: backwards, else shuffled by this seed
inline int cluster_limit = 1 << 20;  // that run at once; 0: the device has none
inline cudaError_t last_error = cudaSuccess;
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;  // of the cluster that runs, or of all
inline std::vector<Barrier> cluster_barriers;
inline bool together = false;  // whether all clusters run at once
inline int current = 0, block_threads = 0, cluster_size = 1;
inline bool moved = false;  // did any fiber pass a barrier or end since the last look?
inline jmp_buf scheduler;
inline std::function<void()> body;
inline dim3 thread_index, block_index, grid_size;
inline size_t dynamic_bytes = 0;               // of shared memory, asked for by the launch
inline void (*cluster_begins)() = nullptr;     // for what a kernel family adds to this file
inline void (*cluster_ends)() = nullptr;

inline Block& own_block() { return blocks[current / block_threads]; }
inline int own_cluster() { return current / block_threads / cluster_size; }
inline int index_of(unsigned rank) {  // of a block of the own cluster
    return own_cluster() * cluster_size + static_cast<int>(rank);
}
inline Barrier& own_cluster_barrier() { return cluster_barriers[own_cluster()]; }
inline Warp& own_warp() { return own_block().warps[current % block_threads / kWarpSize]; }

// From a fiber to the scheduler, which comes back to it by `resume`.
inline void pause() {
    if (_setjmp(fibers[current].registers) == 0) _longjmp(scheduler, 1);
}

inline void run_body() {
    while (true) {  // a fiber serves many launches
        body();
        fibers[current].done = true;
        ++own_block().left;
        moved = true;
        pause();
    }
}

inline void resume() {
    Fiber& fiber = fibers[current];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.registers, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, run_body, 0);
    setcontext(&fiber.context);
}

// True for the one who completes the barrier.
inline bool arrive(Barrier& barrier, int expected) {
    if (++barrier.arrived < expected) return false;
    barrier.arrived = 0;
    ++barrier.generation;
    moved = true;
    return true;
}

inline void wait_past(const Barrier& barrier, unsigned generation) {
    while (barrier.generation == generation) pause();
}

inline void wait(Barrier& barrier, int expected) {
    const unsigned generation = barrier.generation;
    if (!arrive(barrier, expected)) wait_past(barrier, generation);
}

inline std::vector<int> fiber_order() {
    std::vector<int> order(fibers.size());
    std::iota(order.begin(), order.end(), 0);
    if (order_seed == 1) std::reverse(order.begin(), order.end());
    if (order_seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(order_seed));
    return order;
}

// Runs the blocks of one cluster, or of all; false when threads wait for each other for ever.
inline bool run_cluster(const std::vector<int>& order, unsigned x, unsigned y) {
    for (Block& block : blocks) {
        block.barrier = Barrier{};
        block.vote[0] = block.vote[1] = false;
        block.left = 0;
        block.sent.clear();
        block.warps.assign(block_threads / kWarpSize, Warp{});
        memset(block.shared, 0xff, sizeof(block.shared));
    }
    cluster_barriers.assign(blocks.size() / cluster_size, Barrier{});
    for (Fiber& fiber : fibers) fiber.done = false;
    if (cluster_begins != nullptr) cluster_begins();
    while (true) {
        bool waiting = false;
        moved = false;
        for (const int i : order) {
            if (fibers[i].done) continue;
            current = i;
            thread_index = dim3(i % block_threads, 0, 0);
            block_index = dim3(x + i / block_threads, y, 0);
            resume();
            waiting = waiting || !fibers[i].done;
        }
        if (!waiting) {
            if (cluster_ends != nullptr) cluster_ends();
            return true;
        }
        if (!moved) break;
    }
    for (Fiber& fiber : fibers) fiber.started = false;  // stuck inside a kernel: begin anew
    return false;
}

inline cudaError_t launch(dim3 grid, int threads, int cluster, size_t shared,
                          std::function<void()> kernel) {
    if (threads % kWarpSize != 0 || grid.x == 0 || grid.y == 0 || grid.x % cluster != 0 ||
        shared > kSharedBytes)
        return cudaErrorInvalidValue;
    last_error = cudaSuccess;
    block_threads = threads;
    grid_size = grid;
    dynamic_bytes = shared;
    body = std::move(kernel);
    cluster_size = cluster;
    const unsigned at_once = together ? grid.x : cluster;
    fibers.resize(static_cast<size_t>(threads) * at_once);
    blocks.resize(at_once);
    const std::vector<int> order = fiber_order();
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; x += at_once)
            if (!run_cluster(order, x, y)) return cudaErrorLaunchFailure;
    return last_error;
}

// Every lane gives a value and sees everybody's.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    if (mask != 0xffffffffu) std::abort();
    Warp& warp = own_warp();
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
#define gridDim ckf_host::grid_size

inline int __syncthreads_or(int vote) {
    ckf_host::Block& block = ckf_host::own_block();
    const unsigned generation = block.barrier.generation;
    bool& votes = block.vote[generation % 2];
    votes = votes || vote != 0;
    if (ckf_host::arrive(block.barrier, ckf_host::block_threads))
        block.vote[(generation + 1) % 2] = false;
    else
        ckf_host::wait_past(block.barrier, generation);
    return votes;
}
inline void __syncthreads() { __syncthreads_or(0); }
inline void __syncwarp() { ckf_host::wait(ckf_host::own_warp().barrier, ckf_host::kWarpSize); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    const uint64_t* slots = ckf_host::exchange(mask, value);
    return ckf_host::value_of<T>(slots[(ckf_host::current % ckf_host::kWarpSize) ^ lanes]);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return ckf_host::value_of<T>(ckf_host::exchange(mask, value)[lane]);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
    const uint64_t* slots = ckf_host::exchange(mask, vote);
    unsigned result = 0;
    for (int lane = 0; lane < ckf_host::kWarpSize; ++lane)
        result |= static_cast<unsigned>(slots[lane] & 1) << lane;
    return result;
}

using std::max;
using std::min;
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    memset(to, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(ckf_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaSuccess) return "no error";
    if (error == cudaErrorInvalidValue) return "invalid argument";
    if (error == cudaErrorNotSupported) return "operation not supported";
    return "threads wait for each other for ever, or a block left too early";
}

#include "host_device.h"

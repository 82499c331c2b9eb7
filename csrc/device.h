// What the kernels of this folder share: 16-byte packs, a reduction over a warp, clusters, launches.
// host_shim.h gives the same names on the host, for tests without a GPU.
#pragma once

#ifdef CKF_HOST_SHIM
#include "host_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>

namespace ckf {

constexpr int kLanes = 32;
constexpr unsigned kFull = 0xffffffffu;

template <typename T>
constexpr int kVec = 16 / sizeof(T);  // elements of one 16-byte load

template <typename T>
struct alignas(16) Pack {
    T v[kVec<T>];
};

struct alignas(8) Pair {
    float v[2];
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
// alignment never changes a bit of the result. Plain loads, not the read-only path: under an
// overlapped launch the kernel before may still write when this one starts.
template <typename T, bool kAligned>
__device__ __forceinline__ Pack<T> load(const T* p, int left) {
    Pack<T> out;
    if constexpr (kAligned) {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (left > 0) raw = *reinterpret_cast<const uint4*>(p);
        memcpy(&out, &raw, sizeof(out));
    } else {
#pragma unroll
        for (int v = 0; v < kVec<T>; ++v) out.v[v] = v < left ? p[v] : from_float<T>(0.0f);
    }
    return out;
}

// Sums each of kCount values over the warp; afterwards value lane / (32 / kCount) is complete in
// v[0]. Halving the values with the lanes takes kCount + log2(32 / kCount) - 1 shuffles where one
// butterfly a value takes 5 kCount. Every value is summed in the same tree, so its bits do not
// depend on its place among the others.
template <int kCount, int kOffset = kLanes / 2, int kSize>
__device__ __forceinline__ void sum_over_warp(float (&v)[kSize], int lane) {
    static_assert((kCount & (kCount - 1)) == 0 && kCount <= kLanes);
    if constexpr (kCount > 1) {
        const bool upper = lane & kOffset;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float kept = upper ? v[i + kCount / 2] : v[i];
            const float given = upper ? v[i] : v[i + kCount / 2];
            v[i] = kept + __shfl_xor_sync(kFull, given, kOffset);
        }
        if constexpr (kOffset > 1) sum_over_warp<kCount / 2, kOffset / 2>(v, lane);
    } else {
        v[0] += __shfl_xor_sync(kFull, v[0], kOffset);
        if constexpr (kOffset > 1) sum_over_warp<1, kOffset / 2>(v, lane);
    }
}

// +0 for -0, which a product may be that underflows. (v + 0 would do, were it not made part of a
// fused product and so rounded once.)
__device__ __forceinline__ float without_sign_of_zero(float v) { return v == 0.0f ? 0.0f : v; }

#ifndef CKF_HOST_SHIM

#define CKF_SHARED(Type, name) __shared__ Type name
// More than 48 KiB; the launch says how much.
#define CKF_LARGE_SHARED(Type, name)               \
    extern __shared__ uint4 ckf_dynamic_shared[];  \
    Type& name = *reinterpret_cast<Type*>(ckf_dynamic_shared)
#if __CUDA_ARCH__ >= 900
#define CKF_HAS_CLUSTERS 1
#endif

// A hint: the bytes at p will be read soon. Safe for any mapped address at any time.
__device__ __forceinline__ void prefetch(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// The same or nothing, without a branch.
__device__ __forceinline__ void prefetch_if(bool wanted, const void* p) {
    const int is_wanted = wanted;
    asm volatile("{.reg .pred q; setp.ne.s32 q, %1, 0; @q prefetch.global.L2 [%0];}" ::"l"(p),
                 "r"(is_wanted));
}

// kBytes to shared memory, there after wait_for_copies() of the same thread; both aligned to them.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
                 : "memory");
}
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Nothing that the kernels before this one wrote may be read before this. Without the overlap
// attribute of the launch it returns at once.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier over the cluster in two halves: writes before `arrive` are seen after `wait`. A cluster
// of one is a block, whose second half does all.
template <int kCluster>
__device__ __forceinline__ void cluster_arrive() {
    if constexpr (kCluster > 1) {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
        __trap();  // clusters_work() keeps launches away from here
#endif
    }
}

// An arrival that makes no writes seen, in a cluster of several blocks.
__device__ __forceinline__ void cluster_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

template <int kCluster>
__device__ __forceinline__ void cluster_wait() {
    if constexpr (kCluster > 1) {
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    } else {
        __syncthreads();
    }
}

// The value at p in the shared memory of block `rank` of the cluster; p is this block's address.
template <int kCluster>
__device__ __forceinline__ float read_block(const float* p, [[maybe_unused]] unsigned rank) {
    float value = 0.0f;
    if constexpr (kCluster == 1) {
        value = *p;
    } else {
#if __CUDA_ARCH__ >= 900
        const auto own = static_cast<unsigned>(__cvta_generic_to_shared(p));
        unsigned remote;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
#endif
    }
    return value;
}

// Stores there instead; seen after the next barrier over the cluster.
template <int kCluster>
__device__ __forceinline__ void write_block(float* p, float value,
                                            [[maybe_unused]] unsigned rank) {
    if constexpr (kCluster == 1) {
        *p = value;
    } else {
#if __CUDA_ARCH__ >= 900
        const auto own = static_cast<unsigned>(__cvta_generic_to_shared(p));
        unsigned remote;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#endif
    }
}

// Values that blocks of a cluster send to one of them, which waits for all. In its shared memory.
struct alignas(8) Arrivals {
    uint64_t state;
};

// By one thread, before cluster_begin(): how many bytes will come, in all.
__device__ __forceinline__ void expect_arrivals(Arrivals* arrivals, int bytes) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<unsigned>(__cvta_generic_to_shared(arrivals));
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own),
        "r"(bytes)
        : "memory");
#endif
}

// Stores a value at p in block `rank`, without a fence; p and arrivals are this block's addresses.
// Only after a cluster_wait() since cluster_begin().
__device__ __forceinline__ void send_to_block(float* p, float value, Arrivals* arrivals,
                                              unsigned rank) {
#if __CUDA_ARCH__ >= 900
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(p));
    const auto count = static_cast<unsigned>(__cvta_generic_to_shared(arrivals));
    asm volatile(
        "{.reg .b32 to, count; mapa.shared::cluster.u32 to, %0, %3; "
        "mapa.shared::cluster.u32 count, %1, %3; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %2, [count];}" ::"r"(
            to),
        "r"(count), "r"(__float_as_uint(value)), "r"(rank)
        : "memory");
#endif
}

// Until all has come; what was sent is seen then.
__device__ __forceinline__ void wait_for_arrivals(Arrivals* arrivals) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<unsigned>(__cvta_generic_to_shared(arrivals));
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; "
            "selp.b32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(own)
            : "memory");
    }
#endif
}

struct Launch {
    dim3 grid;
    int threads;
    int cluster;   // blocks of grid.x that form a cluster
    bool overlap;  // may start before the kernel before it ends (programmatic dependent launch)
    cudaStream_t stream;
    cudaLaunchAttribute attributes[2];
    size_t dynamic_shared = 0;  // bytes

    cudaLaunchConfig_t config() {
        unsigned count = 0;
        if (cluster > 1) {
            attributes[count].id = cudaLaunchAttributeClusterDimension;
            attributes[count].val.clusterDim.x = cluster;
            attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
            ++count;
        }
        if (overlap) {
            attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[count].val.programmaticStreamSerializationAllowed = 1;
            ++count;
        }
        cudaLaunchConfig_t result = {};
        result.gridDim = grid;
        result.blockDim = dim3(threads);
        result.stream = stream;
        result.dynamicSmemBytes = dynamic_shared;
        result.attrs = attributes;
        result.numAttrs = count;
        return result;
    }
};

template <auto kKernel, typename Args>
cudaError_t launch(Launch how, const Args& args) {
    const cudaLaunchConfig_t config = how.config();
    return cudaLaunchKernelEx(&config, kKernel, args);
}

constexpr int kMostDevices = 64;

// What `ask` says of a kernel on a device: asked once where it succeeds. Zero and more are answers.
template <auto kKernel, typename Ask>
int ask_once(int device, Ask ask) {
    static std::atomic<int> answers[kMostDevices];  // 0: not asked, else the answer + 1
    if (device < 0 || device >= kMostDevices) return -1;
    int known = answers[device].load(std::memory_order_relaxed);
    if (known == 0) {
        known = ask() + 1;
        if (known > 0) answers[device].store(known, std::memory_order_relaxed);
        if (known <= 0) cudaGetLastError();  // nobody's error: asked again next time
    }
    return known - 1;
}

// Whether the code loaded on this device is for sm_90 or later (griddepcontrol, clusters).
template <auto kKernel>
bool is_hopper_code(int device) {
    const auto ask = [] {
        cudaFuncAttributes attributes;
        const bool known = cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess;
        return known ? attributes.ptxVersion : -1;
    };
    return ask_once<kKernel>(device, ask) >= 90;
}

// Whether the code loaded on this device uses at least that many registers: whether it is the
// kernel itself, where other targets have an empty one.
template <auto kKernel>
bool has_registers(int device, int least) {
    const auto ask = [] {
        cudaFuncAttributes attributes;
        const bool known = cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess;
        return known ? attributes.numRegs : -1;
    };
    return ask_once<kKernel>(device, ask) >= least;
}

// How many clusters of this size a device runs at once: none on a part of a GPU (MIG) that is too
// small, where a multiprocessor has not the shared memory, or where the code was compiled for an
// older one.
template <auto kKernel>
int most_clusters(int device, int threads, int cluster, size_t dynamic_shared = 0) {
    const auto ask = [=] {
        int able = 0, clusters = 0;
        if (cudaDeviceGetAttribute(&able, cudaDevAttrClusterLaunch, device) != cudaSuccess)
            return -1;
        cudaFuncAttributes attributes;
        if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) return -1;
        if (able == 0 || attributes.ptxVersion < 90) return 0;
        int most_shared = 0;
        if (cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
            cudaSuccess)
            return -1;
        if (dynamic_shared > static_cast<size_t>(most_shared)) return 0;
        if (dynamic_shared > 0 &&
            cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(dynamic_shared)) != cudaSuccess)
            return -1;
        Launch probe{dim3(cluster), threads, cluster, false, nullptr, {}, dynamic_shared};
        const cudaLaunchConfig_t config = probe.config();
        const bool known =
            cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess;
        return known ? clusters : -1;
    };
    return ask_once<kKernel>(device, ask);
}

#endif

}  // namespace ckf

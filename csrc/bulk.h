// Bulk copies from global to shared memory (sm_90 and later): one thread asks for them and all wait,
// a phase after the other. bulk_host.h gives the same names on the host.
#pragma once

#include "device.h"

namespace ckf {

#ifndef CKF_HOST_SHIM

// Counts the bytes of a phase. In shared memory.
struct alignas(8) BulkCopies {
    uint64_t state;
};

// By one thread, before cluster_begin(); others may wait after cluster_wait().
__device__ __forceinline__ void init_bulk(BulkCopies* copies) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<unsigned>(__cvta_generic_to_shared(copies));
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;" ::"r"(own)
        : "memory");
#endif
}

// Begins a phase of so many bytes, below 2^20; by the thread that began it all, which then asks for
// them. What the block read or wrote there before its last barrier comes before the copies.
__device__ __forceinline__ void expect_bulk(BulkCopies* copies, int bytes) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<unsigned>(__cvta_generic_to_shared(copies));
    asm volatile(
        "fence.proxy.async.shared::cta;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(own),
        "r"(bytes)
        : "memory");
#endif
}

// Both addresses and the bytes are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes,
                                          BulkCopies* copies) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<unsigned>(__cvta_generic_to_shared(copies));
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(address),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(own)
        : "memory");
#endif
}

// Until all bytes of the phase of this parity are there; the first phase is even.
__device__ __forceinline__ void wait_for_bulk(BulkCopies* copies, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    const auto own = static_cast<unsigned>(__cvta_generic_to_shared(copies));
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
            "selp.b32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(own), "r"(parity)
            : "memory");
    }
#endif
}

#endif

}  // namespace ckf

#ifdef CKF_HOST_SHIM
#include "bulk_host.h"
#endif

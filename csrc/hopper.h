// What a kernel for sm_90a needs beyond device.h: transaction barriers, tile copies by tensor map
// (TMA), the matrix product of a warpgroup (WGMMA), register budgets. hopper_host.h gives the same
// names on the host, with the strictest reading of what may happen when.
#pragma once

#include "device.h"

#ifndef CKF_HOST_SHIM
#include <cuda.h>
#include <cudaTypedefs.h>
#endif

#include <type_traits>

namespace ckf {

constexpr int kGroupThreads = 128;    // of a warpgroup
constexpr unsigned kRowBytes = 128;   // of a tile in shared memory: 64 elements of 16 bits
constexpr unsigned kAtomBytes = 1024; // eight such rows: the swizzle's pattern
constexpr int kRowElements = 64;
constexpr int kFragment = 128;        // accumulators of a thread in a product of 64 x 256
constexpr unsigned kStepK = 16;       // depth of one product instruction

// The 64 bits by which a product finds an operand in shared memory: where it starts, the bytes from
// one swizzle atom to the next along the two directions, the 128-byte swizzle. Fields drop the low
// four bits of an 18-bit address.
__host__ __device__ constexpr uint64_t descriptor(uint32_t start, uint32_t leading,
                                                  uint32_t stride) {
    const auto field = [](uint32_t bytes) -> uint64_t { return (bytes & 0x3ffffu) >> 4; };
    return field(start) | field(leading) << 16 | field(stride) << 32 | uint64_t{1} << 62;
}

// An operand whose rows (of m or n) hold 64 of k side by side: atoms follow each other along the
// rows, and the leading offset means nothing.
__host__ __device__ constexpr uint64_t rows_of_k(uint32_t start) {
    return descriptor(start, 16, kAtomBytes);
}
// One whose rows (of k) hold 64 of n: atoms follow along k, and `chunk` bytes on come 64 more of n.
__host__ __device__ constexpr uint64_t rows_of_n(uint32_t start, uint32_t chunk) {
    return descriptor(start, chunk, kAtomBytes);
}
// How far a descriptor moves for the next kStepK of k.
template <bool kRowsOfN>
constexpr uint64_t kDescriptorStep = (kRowsOfN ? kStepK * kRowBytes : kStepK * 2) >> 4;

#ifndef CKF_HOST_SHIM

using TensorMap = CUtensorMap;

#define CKF_DYNAMIC_SHARED(name) extern __shared__ char name[]

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// No thread may use the barriers before a cluster barrier that follows the fence.
__device__ __forceinline__ void init_barrier(uint32_t barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// 16 bytes in one store; left to itself nvcc made four of every second one.
__device__ __forceinline__ void store_words(void* to, const uint32_t (&word)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CKF_HAS_WGMMA 1

__device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives at this block's barrier, which then also waits for `bytes` of copies.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Arrives at the barrier at this address in block `rank` of the cluster. Hands over a buffer that
// only copies and products touch, so no ordinary memory needs to be made visible: with the scope of
// the cluster ptxas puts a fence of the whole GPU here and drops the L1 cache at every wait.
__device__ __forceinline__ void arrive_at(uint32_t barrier, unsigned rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(barrier), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there)
                 : "memory");
}

// Waits until the phase of this parity is over; the phase before the first counts as odd.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, unsigned parity) {
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}

// Copies the map's box at (row, column) to `to`, swizzled, with zeros for what lies outside the
// tensor, and counts its bytes at the barrier.
__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, uint32_t barrier,
                                          int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The same to the same address of every block of the cluster in `blocks`, at each one's barrier.
__device__ __forceinline__ void load_tile_for(unsigned blocks, uint32_t to, const TensorMap& map,
                                              uint32_t barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(static_cast<uint16_t>(blocks))
        : "memory");
}

// Ordinary stores to shared memory come before the copies from there that follow a barrier.
__device__ __forceinline__ void fence_shared_for_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies `bytes` (a multiple of 16) from this address to the same in block `rank` of the cluster,
// and counts them at its barrier. Until it has landed this block may not leave.
__device__ __forceinline__ void send_rows(uint32_t address, unsigned bytes, uint32_t barrier,
                                          unsigned rank) {
    asm volatile(
        "{\n.reg .b32 to, count;\n"
        "mapa.shared::cluster.u32 to, %0, %3;\n"
        "mapa.shared::cluster.u32 count, %2, %3;\n"
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
        " [to], [%0], %1, [count];\n}" ::"r"(address),
        "r"(bytes), "r"(barrier), "r"(rank)
        : "memory");
}

// A barrier of the first kThreads threads of a block.
template <int kThreads>
__device__ __forceinline__ void sync_threads() {
    asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// A warp has written rows to global memory that tile copies of other blocks will read: counts it.
// Ordinary stores and copies go through different proxies, hence the fence on either side. The
// release covers the stores of all lanes, which the barrier of the warp has put before it.
__device__ __forceinline__ void publish(unsigned* count) {
    asm volatile("fence.proxy.async.global;" ::: "memory");
    __syncwarp();
    if (threadIdx.x % kLanes == 0)
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ void wait_published(const unsigned* count, unsigned expected) {
    unsigned found = 0;
    while (true) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
        if (found >= expected) break;
        __nanosleep(100);
    }
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

template <int kCount>
__device__ __forceinline__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Orders the accumulators' registers before the products that follow.
__device__ __forceinline__ void fence_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a batch of products.
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kBatches are in flight. The accumulators d may be touched after kBatches = 0 only;
// they and their operands' type are named for the host.
template <int kBatches, typename T>
__device__ __forceinline__ void wait_products([[maybe_unused]] float (&d)[kFragment]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kBatches) : "memory");
}

#define CKF_NAMES8(a, b, c, e, f, g, h, i) \
    "%" #a ",%" #b ",%" #c ",%" #e ",%" #f ",%" #g ",%" #h ",%" #i
#define CKF_D8(i)                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),         \
        "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define CKF_D64(i)                                                                      \
    CKF_D8(i), CKF_D8(i + 8), CKF_D8(i + 16), CKF_D8(i + 24), CKF_D8(i + 32),           \
        CKF_D8(i + 40), CKF_D8(i + 48), CKF_D8(i + 56)
// clang-format off
#define CKF_NAMES64A                                                                    \
    CKF_NAMES8(0, 1, 2, 3, 4, 5, 6, 7) "," CKF_NAMES8(8, 9, 10, 11, 12, 13, 14, 15) "," \
    CKF_NAMES8(16, 17, 18, 19, 20, 21, 22, 23) ","                                      \
    CKF_NAMES8(24, 25, 26, 27, 28, 29, 30, 31) ","                                      \
    CKF_NAMES8(32, 33, 34, 35, 36, 37, 38, 39) ","                                      \
    CKF_NAMES8(40, 41, 42, 43, 44, 45, 46, 47) ","                                      \
    CKF_NAMES8(48, 49, 50, 51, 52, 53, 54, 55) ","                                      \
    CKF_NAMES8(56, 57, 58, 59, 60, 61, 62, 63)
#define CKF_NAMES64B                                                                    \
    CKF_NAMES8(64, 65, 66, 67, 68, 69, 70, 71) ","                                      \
    CKF_NAMES8(72, 73, 74, 75, 76, 77, 78, 79) ","                                      \
    CKF_NAMES8(80, 81, 82, 83, 84, 85, 86, 87) ","                                      \
    CKF_NAMES8(88, 89, 90, 91, 92, 93, 94, 95) ","                                      \
    CKF_NAMES8(96, 97, 98, 99, 100, 101, 102, 103) ","                                  \
    CKF_NAMES8(104, 105, 106, 107, 108, 109, 110, 111) ","                              \
    CKF_NAMES8(112, 113, 114, 115, 116, 117, 118, 119) ","                              \
    CKF_NAMES8(120, 121, 122, 123, 124, 125, 126, 127)
#define CKF_PRODUCT256(TYPE, ROWS_OF_N)                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                          \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"               \
        CKF_NAMES64A "," CKF_NAMES64B "}, %128, %129, p, 1, 1, 0, " ROWS_OF_N ";\n}"    \
        : CKF_D64(0), CKF_D64(64) : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define CKF_PRODUCT128(TYPE, ROWS_OF_N)                                                 \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                           \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"               \
        CKF_NAMES64A "}, %64, %65, p, 1, 1, 0, " ROWS_OF_N ";\n}"                       \
        : CKF_D64(0) : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define CKF_NAMES24A                                                                    \
    CKF_NAMES8(0, 1, 2, 3, 4, 5, 6, 7) "," CKF_NAMES8(8, 9, 10, 11, 12, 13, 14, 15) "," \
    CKF_NAMES8(16, 17, 18, 19, 20, 21, 22, 23)
#define CKF_NAMES32A CKF_NAMES24A "," CKF_NAMES8(24, 25, 26, 27, 28, 29, 30, 31)
#define CKF_D24 CKF_D8(0), CKF_D8(8), CKF_D8(16)
// Of few columns: NAMES and the rest as the numbers of d, a, b and add.
#define CKF_PRODUCT_FEW(COLUMNS, TYPE, NAMES, A, B, ADD, ...)                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                       \
        "wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {"       \
        NAMES "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                                      \
        : __VA_ARGS__ : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define CKF_PRODUCT48(TYPE)                                                             \
    CKF_PRODUCT_FEW("48", TYPE, CKF_NAMES24A, "%24", "%25", "%26", CKF_D24)
#define CKF_PRODUCT56(TYPE)                                                             \
    CKF_PRODUCT_FEW("56", TYPE, CKF_NAMES24A ",%24,%25,%26,%27", "%28", "%29", "%30",   \
                    CKF_D24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]))
#define CKF_PRODUCT64(TYPE)                                                             \
    CKF_PRODUCT_FEW("64", TYPE, CKF_NAMES32A, "%32", "%33", "%34", CKF_D24, CKF_D8(24))
#define CKF_PRODUCT80(TYPE)                                                             \
    CKF_PRODUCT_FEW("80", TYPE,                                                         \
                    CKF_NAMES32A "," CKF_NAMES8(32, 33, 34, 35, 36, 37, 38, 39), "%40", \
                    "%41", "%42", CKF_D24, CKF_D8(24), CKF_D8(32))
// clang-format on

// d (64 x kColumns, over the warpgroup, in its first values) = a b, plus d where `add`; kStepK of k.
template <typename T, bool kRowsOfN, int kColumns>
__device__ __forceinline__ void product(float (&d)[kFragment], uint64_t a, uint64_t b, bool add) {
    constexpr bool kHalf = std::is_same_v<T, __half>;
    constexpr bool kFew = kColumns == 48 || kColumns == 56 || kColumns == 64 || kColumns == 80;
    static_assert(kColumns == 256 || ((kColumns == 128 || kFew) && !kRowsOfN));
    if constexpr (kColumns == 48 && kHalf)
        CKF_PRODUCT48("f16");
    else if constexpr (kColumns == 48)
        CKF_PRODUCT48("bf16");
    else if constexpr (kColumns == 56 && kHalf)
        CKF_PRODUCT56("f16");
    else if constexpr (kColumns == 56)
        CKF_PRODUCT56("bf16");
    else if constexpr (kColumns == 64 && kHalf)
        CKF_PRODUCT64("f16");
    else if constexpr (kColumns == 64)
        CKF_PRODUCT64("bf16");
    else if constexpr (kColumns == 80 && kHalf)
        CKF_PRODUCT80("f16");
    else if constexpr (kColumns == 80)
        CKF_PRODUCT80("bf16");
    else if constexpr (kColumns == 128 && kHalf)
        CKF_PRODUCT128("f16", "0");
    else if constexpr (kColumns == 128)
        CKF_PRODUCT128("bf16", "0");
    else if constexpr (kHalf && kRowsOfN)
        CKF_PRODUCT256("f16", "1");
    else if constexpr (kHalf)
        CKF_PRODUCT256("f16", "0");
    else if constexpr (kRowsOfN)
        CKF_PRODUCT256("bf16", "1");
    else
        CKF_PRODUCT256("bf16", "0");
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

// Of a (rows, columns) tensor of 16-bit elements, `pitch` of them from row to row; boxes of
// box_rows x 64. The driver's function is looked up, so that nothing links against the driver.
template <typename T>
cudaError_t make_map(TensorMap* map, const void* data, int64_t rows, int64_t columns,
                     int64_t pitch, int box_rows) {
    static const auto encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult state = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &state);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found,
                                                          cudaEnableDefault, &state);
#endif
        if (error != cudaSuccess || state != cudaDriverEntryPointSuccess) found = nullptr;
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    }();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(pitch) * sizeof(T)};
    const cuuint32_t box[2] = {kRowElements, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
    const CUresult result = encode(
        map,
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        2, const_cast<void*>(data), sizes, row_bytes, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif  // CKF_HOST_SHIM

}  // namespace ckf

#ifdef CKF_HOST_SHIM
#define CKF_HAS_WGMMA 1
#include "hopper_host.h"
#endif

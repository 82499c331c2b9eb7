// Launches the decode kernel: which rows and which span of n a block gets, clusters or blocks
// alone.
#include "group_sizes.h"
#include "multi_lora_decode.h"
#include "multi_lora_decode_tile.h"

#include <algorithm>
#include <type_traits>

namespace ckf {
namespace {

constexpr int kCluster = 8;         // the most that every sm_90 device can do
constexpr int kWantedBlocks = 128;  // about one per SM; below it, rows and n are spread wider

// Clusters that cover the n of all linears once, each `wide` of one linear.
template <typename T>
int64_t spans(const Args<T>& p, int64_t wide) {
    int64_t total = 0;
    for (int l = 0; l < p.count; ++l) total += (p.linears[l].n + wide - 1) / wide;
    return total;
}

// kBlocks: of a cluster.
template <typename T, int kRows, int kBlocks, bool kAligned>
cudaError_t launch_kernel(Args<T> p, int device, bool overlap, cudaStream_t stream) {
    constexpr auto kKernel = multi_lora_decode_kernel<T, kRows, kBlocks, kAligned>;
    const int64_t row_blocks = (p.m + kRows - 1) / kRows;
    int64_t widest = 0;
    bool one_window = true;
    for (int l = 0; l < p.count; ++l) {
        widest = std::max<int64_t>(widest, p.linears[l].n);
        one_window = one_window && p.linears[l].rank <= kThreads;
    }
    p.slices = 1;  // the more a block has, the less often S is computed
    while (one_window && int64_t{2} * p.slices * kBlocks * kBlockN<T> <= widest &&
           row_blocks * spans(p, int64_t{2} * p.slices * kBlocks * kBlockN<T>) * kBlocks >=
               kWantedBlocks)
        p.slices *= 2;
    const int64_t clusters = place(p, int64_t{kBlockN<T>} * kBlocks * p.slices);
    Launch how{dim3(static_cast<unsigned>(clusters * kBlocks), static_cast<unsigned>(row_blocks)),
               kThreads, kBlocks, overlap && is_hopper_code<kKernel>(device), stream, {}};
    return launch<kKernel>(how, p);
}

template <typename T, int kRows, bool kAligned>
cudaError_t launch_rows(const Args<T>& p, int device, bool overlap, cudaStream_t stream) {
    constexpr auto kKernel = multi_lora_decode_kernel<T, kRows, kCluster, kAligned>;
    if (most_clusters<kKernel>(device, kThreads, kCluster) > 0)
        return launch_kernel<T, kRows, kCluster, kAligned>(p, device, overlap, stream);
    return launch_kernel<T, kRows, 1, kAligned>(p, device, overlap, stream);
}

// Measured on an H100 at k = n = 4096, R 80, microseconds beyond the base (scalar, tiles): m 1 5.7
// and 8.2, m 16 8.4 and 9.0, m 64 17.2 and 9.9, m 256 47.8 and 26.3.
#ifdef CKF_HOST_SHIM
int64_t scalar_rows = 0;  // tests see the tiles at any m
#else
constexpr int64_t scalar_rows = 16;  // up to here 16-bit types stay with the scalar kernel
#endif
constexpr int kTileBlocks = 64;  // wanted of the tiles: 128 in clusters of eight took two waves

template <typename T, int kN, int kBlocks, bool kAligned, bool kMany>
cudaError_t launch_tile_kernel(Args<T> p, int64_t slices, int device, bool overlap,
                               cudaStream_t stream) {
    constexpr auto kKernel = tile::multi_lora_decode_tile_kernel<T, kN, kBlocks, kAligned, kMany>;
    p.slices = static_cast<int>(slices);
    const int64_t clusters = place(p, slices * kBlocks * tile::kSpanN<kN>);
    const int64_t row_blocks = (p.m + tile::kRows - 1) / tile::kRows;
    Launch how{dim3(static_cast<unsigned>(clusters * kBlocks), static_cast<unsigned>(row_blocks)),
               kThreads, kBlocks, overlap && is_hopper_code<kKernel>(device), stream, {}};
    return launch<kKernel>(how, p);
}

template <typename T, int kN, bool kAligned, bool kMany>
cudaError_t launch_tiles(const Args<T>& p, int64_t slices, int device, bool overlap,
                         cudaStream_t stream) {
    constexpr auto kKernel = tile::multi_lora_decode_tile_kernel<T, kN, kCluster, kAligned, kMany>;
    const bool able = most_clusters<kKernel>(device, kThreads, kCluster) > 0;
    if (able)
        return launch_tile_kernel<T, kN, kCluster, kAligned, kMany>(p, slices, device, overlap,
                                                                    stream);
    constexpr int kNarrow = kMany ? 2 : kN;  // for want of registers
    return launch_tile_kernel<T, kNarrow, 1, kAligned, kMany>(p, slices * kN / kNarrow, device,
                                                              overlap, stream);
}

// Narrow spans of n while they fill the GPU once: each computes S for itself.
template <typename T>
cudaError_t launch_aligned_tiles(const Args<T>& p, int device, bool overlap, cudaStream_t stream) {
    const int64_t row_blocks = (p.m + tile::kRows - 1) / tile::kRows;
    const auto blocks = [&](int64_t width) {
        return spans(p, width * kCluster * tile::kSpanN<1>) * row_blocks * kCluster;
    };
    bool many = false;
    for (int l = 0; l < p.count; ++l) many = many || p.linears[l].rank > tile::kColumns;
    int64_t width = 2, slices = 1;
    if (blocks(width) > kTileBlocks) width = 4;
    while (slices < 64 && blocks(width * slices) > kTileBlocks &&
           blocks(2 * width * slices) < blocks(width * slices))
        slices *= 2;
    if (many) {
        if (width == 2) return launch_tiles<T, 2, true, true>(p, slices, device, overlap, stream);
        return launch_tiles<T, 4, true, true>(p, slices, device, overlap, stream);
    }
    if (width == 2) return launch_tiles<T, 2, true, false>(p, slices, device, overlap, stream);
    return launch_tiles<T, 4, true, false>(p, slices, device, overlap, stream);
}

template <typename T>
cudaError_t launch_typed(const CkfLinear* linears, Args<T> p, int device, bool overlap,
                         cudaStream_t stream) {
    const int64_t size = sizeof(T);
    bool aligned = is_aligned(p.a, p.k * size) && is_aligned(p.x, p.m > 1 ? p.x_stride * size : 0);
    bool aligned_y = true, fits_tiles = sizeof(T) == 2;
    p.rank = 0;
    for (int l = 0; l < p.count; ++l) {
        const CkfLinear& from = linears[l];
        p.linears[l] = {static_cast<T*>(from.y),
                        static_cast<const T*>(from.b),
                        from.y_stride,
                        static_cast<int>(from.n),
                        static_cast<int>(from.rank),
                        p.rank,
                        0};
        p.rank += static_cast<int>(from.rank);
        aligned = aligned && is_aligned(from.b, from.n * size);
        aligned_y = aligned_y && is_aligned(from.y, p.m > 1 ? from.y_stride * size : 0);
        fits_tiles = fits_tiles && from.rank <= tile::kMostGroups * tile::kGroup &&
                     from.rank * from.n < int64_t{1} << 32;
    }
    if constexpr (sizeof(T) == 2) {
        fits_tiles = fits_tiles && int64_t{p.rank} * p.k < int64_t{1} << 31;
        if (fits_tiles && p.m > scalar_rows) {
            if (aligned && aligned_y) return launch_aligned_tiles(p, device, overlap, stream);
            return launch_tiles<T, 2, false, true>(p, 1, device, overlap, stream);
        }
    }
    if (!aligned) return launch_rows<T, 1, false>(p, device, overlap, stream);
    const int64_t blocks = spans(p, int64_t{kCluster} * kBlockN<T>) * kCluster;  // of one row
    if ((p.m + 3) / 4 * blocks >= kWantedBlocks)
        return launch_rows<T, 4, true>(p, device, overlap, stream);
    if ((p.m + 1) / 2 * blocks >= kWantedBlocks)
        return launch_rows<T, 2, true>(p, device, overlap, stream);
    return launch_rows<T, 1, true>(p, device, overlap, stream);
}

}  // namespace
}  // namespace ckf

extern "C" const char* ckf_error_string(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

#ifdef CKF_HOST_SHIM
extern "C" void ckf_host_set_scalar_rows(int64_t rows) { ckf::scalar_rows = rows; }
#endif

extern "C" int ckf_multi_lora_decode(const CkfLinear* linears, int count, const void* x,
                                     const void* a, const float* gates, const int64_t* task_ids,
                                     int64_t m, int64_t k, int64_t tasks, int64_t x_stride,
                                     int dtype, int device, int overlap, void* stream) {
    constexpr int64_t kMostRows = 65535;  // of the grid's second dimension
    const ckf::Sizes sizes = ckf::look_at(linears, count, m, k, tasks, kMostRows);
    if (sizes == ckf::Sizes::kWrong) return cudaErrorInvalidValue;
    if (sizes == ckf::Sizes::kNothingToDo) return cudaSuccess;
    if (const cudaError_t error = ckf::use_device(device); error != cudaSuccess) return error;

    const auto go = [&](auto zero) {
        using T = decltype(zero);
        ckf::Args<T> p{};
        p.x = static_cast<const T*>(x);
        p.a = static_cast<const T*>(a);
        p.gates = gates;
        p.task_ids = task_ids;
        p.m = m;
        p.x_stride = x_stride;
        p.k = static_cast<int>(k);
        p.tasks = static_cast<int>(tasks);
        p.count = count;
        p.early = overlap > 1;
        const auto s = static_cast<cudaStream_t>(stream);
        const cudaError_t error = ckf::launch_typed<T>(linears, p, device, overlap != 0, s);
        cudaGetLastError();  // forget it: no later launch is to be blamed
        return error;
    };
    switch (dtype) {
        case kCkfFloat32:
            return go(float{});
        case kCkfFloat16:
            return go(__half{});
        case kCkfBFloat16:
            return go(__nv_bfloat16{});
        default:
            return cudaErrorInvalidValue;
    }
}

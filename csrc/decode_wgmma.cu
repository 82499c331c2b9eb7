// Launches the kernel of decode_wgmma.h: tensor maps, how wide a tile, how many clusters share n.
#include "decode_wgmma.h"
#include "group_sizes.h"

#include <algorithm>

namespace ckf {
namespace {
namespace decode_wgmma {

constexpr int kLeastRegisters = 40;  // the body of every target but sm_90a has far fewer

// How many spans of kTile columns each block takes one after the other, so that all clusters run at
// once; 0: the kernel cannot run here.
template <int kTile, typename T>
int find_spans(Args<T>& p, int device) {
    constexpr auto kKernel = decode_wgmma_kernel<T, kTile>;
    const int most = most_clusters<kKernel>(device, kThreads, kCluster, Memory<kTile>::kBytes);
    if (most <= 0 || !has_registers<kKernel>(device, kLeastRegisters)) return 0;
    int64_t spans = 1, clusters = place(p, kCluster * kTile);
    while (clusters > most && clusters > p.count) {  // a cluster for each linear at least
        spans = std::max(spans + 1, spans * clusters / most);
        clusters = place(p, spans * kCluster * kTile);
    }
    return static_cast<int>(spans);
}

inline int64_t w_pitch(const CkfFrozenLinear& linear, int k) {
    return linear.n > 1 ? linear.w_stride : k;
}

template <int kTile, typename T>
cudaError_t launch_tile(Args<T>& p, const CkfFrozenLinear* linears, int spans,
                        cudaStream_t stream) {
    for (int l = 0; l < p.count; ++l) {
        const CkfFrozenLinear& from = linears[l];
        if (from.n == 0) continue;
        const cudaError_t error =
            make_map<T>(&p.linears[l].w, from.w, from.n, p.k, w_pitch(from, p.k), kTile);
        if (error != cudaSuccess) return error;
    }
    p.spans = spans;
    p.stages = Memory<kTile>::stages(p.x_rows);
    const int64_t clusters = place(p, int64_t{spans} * kCluster * kTile);
    Launch how{dim3(static_cast<unsigned>(clusters * kCluster)),
               kThreads,
               kCluster,
               false,
               stream,
               {},
               Memory<kTile>::kBytes};
    return launch<decode_wgmma_kernel<T, kTile>>(how, p);
}

template <typename T>
cudaError_t launch_typed(const CkfFrozenLinear* linears, Args<T> p, const void* x, const void* a,
                         int64_t x_stride, int most_spans, int device, cudaStream_t stream) {
    constexpr int64_t kSize = sizeof(T);
    if (p.m > kRows || p.k < 8 || p.k % 8 != 0) return cudaErrorNotSupported;
    const int64_t x_pitch = p.m > 1 ? x_stride : p.k;
    bool aligned = is_aligned(a, p.k * kSize) && is_aligned(x, x_pitch * kSize) && x_pitch >= p.k;
    int most_rank = 0;
    for (int l = 0; l < p.count; ++l) {
        const CkfFrozenLinear& from = linears[l];
        Linear<T>& to = p.linears[l];
        to.y = static_cast<T*>(from.y);
        to.bias = static_cast<const T*>(from.bias);
        to.b = static_cast<const T*>(from.b);
        to.y_stride = from.y_stride;
        to.n = static_cast<int>(from.n);
        to.rank = static_cast<int>(from.rank);
        to.first_column = p.rank;
        to.aligned_b = is_aligned(from.b, from.n * kSize);
        p.rank += to.rank;
        most_rank = std::max(most_rank, to.rank);
        const int64_t pitch = w_pitch(from, p.k);
        aligned = aligned && is_aligned(from.w, pitch * kSize) && pitch >= p.k;
    }
    if (!aligned || most_rank > kMostRank) return cudaErrorNotSupported;
    p.x_rows = (p.m + kAtomRows - 1) / kAtomRows * kAtomRows;
    p.share = (most_rank + kCluster - 1) / kCluster;
    // The widest whose blocks have the fewest columns to go through.
    const int spans[] = {find_spans<32>(p, device), find_spans<40>(p, device),
                         find_spans<48>(p, device), find_spans<64>(p, device)};
    constexpr int kTiles[] = {32, 40, 48, 64};
    int best = -1;
    for (int i = 0; i < 4; ++i)
        if (spans[i] > 0 && (best < 0 || spans[i] * kTiles[i] <= spans[best] * kTiles[best]))
            best = i;
    if (best < 0 || spans[best] > most_spans) return cudaErrorNotSupported;
    cudaError_t error = make_map<T>(&p.x, x, p.m, p.k, x_pitch, p.x_rows);
    if (error == cudaSuccess && p.share > 0)
        error = make_map<T>(&p.a, a, p.rank, p.k, p.k, p.share);
    if (error != cudaSuccess) return error;
    switch (best) {
        case 0:
            return launch_tile<32>(p, linears, spans[0], stream);
        case 1:
            return launch_tile<40>(p, linears, spans[1], stream);
        case 2:
            return launch_tile<48>(p, linears, spans[2], stream);
        default:
            return launch_tile<64>(p, linears, spans[3], stream);
    }
}

}  // namespace decode_wgmma
}  // namespace
}  // namespace ckf

extern "C" int ckf_decode_wgmma(const CkfFrozenLinear* linears, int count, const void* x,
                                const void* a, const float* gates, const int64_t* task_ids,
                                int64_t m, int64_t k, int64_t tasks, int64_t x_stride, int dtype,
                                int device, int most_spans, void* stream) {
    const auto go = [&](auto zero) {
        using T = decltype(zero);
        ckf::decode_wgmma::Args<T> p{};
        p.gates = gates;
        p.task_ids = task_ids;
        p.m = static_cast<int>(m);
        p.k = static_cast<int>(k);
        p.tasks = static_cast<int>(tasks);
        p.count = count;
        return ckf::decode_wgmma::launch_typed(linears, p, x, a, x_stride, most_spans, device,
                                               static_cast<cudaStream_t>(stream));
    };
    return ckf::launch_halves(linears, count, m, k, tasks, dtype, device, go);
}

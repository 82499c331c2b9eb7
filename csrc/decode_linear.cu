// Launches the kernel of decode_linear.h: how many clusters share n.
#include "decode_linear.h"
#include "group_sizes.h"

#include <algorithm>

namespace ckf {
namespace {
namespace decode_linear {

template <typename P, typename T>
cudaError_t launch_plan(Args<T> p, int device, cudaStream_t stream) {
    constexpr auto kKernel = decode_linear_kernel<T, P>;
    constexpr int kCluster = P::kCluster;
    constexpr size_t kBytes = sizeof(Shared<T, P>);
    const int most = most_clusters<kKernel>(device, P::kThreads, kCluster, kBytes);
    if (most <= 0) return cudaErrorNotSupported;
    p.spans = 1;
    int64_t clusters = place(p, kCluster * kOwn);
    while (clusters > most) {  // a second wave would compute S again
        const int before = p.spans;
        p.spans = static_cast<int>(before * ((clusters + most - 1) / most));
        const int64_t fewer = place(p, int64_t{p.spans} * kCluster * kOwn);
        if (fewer == clusters) break;  // a cluster for each linear at least
        clusters = fewer;
    }
    Launch how{dim3(static_cast<unsigned>(clusters * kCluster)),
               P::kThreads,
               kCluster,
               false,
               stream,
               {},
               kBytes};
    return launch<kKernel>(how, p);
}

template <typename T>
cudaError_t launch_typed(const CkfFrozenLinear* linears, Args<T> p, int device,
                         cudaStream_t stream) {
    constexpr int64_t kSize = sizeof(T);
    bool aligned = p.k > 0 && is_aligned(p.a, p.k * kSize) &&
                   is_aligned(p.x, p.m > 1 ? p.x_stride * kSize : 0);
    int most_rank = 0;
    for (int l = 0; l < p.count; ++l) {
        const CkfFrozenLinear& from = linears[l];
        p.linears[l] = {static_cast<T*>(from.y),
                        static_cast<const T*>(from.w),
                        static_cast<const T*>(from.bias),
                        static_cast<const T*>(from.b),
                        from.y_stride,
                        from.w_stride,
                        static_cast<int>(from.n),
                        static_cast<int>(from.rank),
                        p.rank,
                        0,
                        is_aligned(from.b, from.n * kSize)};
        p.rank += static_cast<int>(from.rank);
        most_rank = std::max(most_rank, static_cast<int>(from.rank));
        aligned = aligned && is_aligned(from.w, from.n > 1 ? from.w_stride * kSize : 0);
    }
    if (!aligned) return cudaErrorNotSupported;
    if (p.m > kRows || most_rank > kMostRank) return cudaErrorNotSupported;
    return launch_plan<Plan>(p, device, stream);
}

}  // namespace decode_linear
}  // namespace
}  // namespace ckf

extern "C" int ckf_decode_linear(const CkfFrozenLinear* linears, int count, const void* x,
                                 const void* a, const float* gates, const int64_t* task_ids,
                                 int64_t m, int64_t k, int64_t tasks, int64_t x_stride, int dtype,
                                 int device, void* stream) {
    const auto go = [&](auto zero) {
        using T = decltype(zero);
        ckf::decode_linear::Args<T> p{};
        p.x = static_cast<const T*>(x);
        p.a = static_cast<const T*>(a);
        p.gates = gates;
        p.task_ids = task_ids;
        p.x_stride = x_stride;
        p.m = static_cast<int>(m);
        p.k = static_cast<int>(k);
        p.tasks = static_cast<int>(tasks);
        p.count = count;
        return ckf::decode_linear::launch_typed(linears, p, device,
                                                static_cast<cudaStream_t>(stream));
    };
    return ckf::launch_halves(linears, count, m, k, tasks, dtype, device, go);
}

// Launches the Hopper GEMM: tensor maps, as many pairs of blocks as the device holds at once.
#include "group_sizes.h"
#include "hopper_gemm.h"

namespace ckf {
namespace {

constexpr int kLeastRegisters = 100;  // the body of every target but sm_90a has far fewer

// `rows` rows of the whole tensor, boxes of `box_rows`.
struct Operand {
    TensorMap* map;
    const void* data;
    int64_t rows, columns, pitch;
    int box_rows;
};

template <typename T>
ShrinkArgs<T> shrink_args(const CkfShrink& s) {
    ShrinkArgs<T> p{};
    p.gated = static_cast<T*>(s.gated);
    p.compact = static_cast<T*>(s.compact);
    p.restored = static_cast<T*>(s.restored);
    p.gates = s.gates;
    p.slots = s.slots;
    p.ids = s.task_ids;
    p.done = s.done;
    p.gated_stride = s.gated_stride;
    p.compact_stride = s.compact_stride;
    p.restored_stride = s.restored_stride;
    p.gates_stride = s.gates_stride;
    p.slots_stride = s.slots_stride;
    p.columns = static_cast<int>(s.columns);
    p.tasks = static_cast<int>(s.tasks);
    return p;
}

template <typename T, bool kDx>
cudaError_t launch_gemm(const CkfGemm& g, cudaStream_t stream) {
    constexpr auto kKernel = hopper_gemm_kernel<T, kDx>;
    const int most = most_clusters<kKernel>(g.device, kThreads, kPair, kSharedBytes);
    if (most <= 0 || !has_registers<kKernel>(g.device, kLeastRegisters))
        return cudaErrorNotSupported;
    GemmArgs<T> p{};
    const bool wide = g.shrink.columns > kShrinkN;
    const int64_t w_rows = kDx ? g.k : g.n, w_columns = kDx ? g.n : g.k;
    const Operand operands[] = {
        {&p.x, g.x, g.m, g.k, g.x_stride, kTileM},
        {&p.w, g.w, w_rows, w_columns, g.w_stride, kDx ? kTileK : kTileN / kPair},
        {&p.h, g.h, g.m, g.r, g.h_stride, kTileM},
        {&p.b, g.b, g.r, g.n, g.b_stride, kTileK},
        {&p.a, g.shrink.a, g.shrink.columns, g.k, g.shrink.a_stride,
         (wide ? kTileN : kShrinkN) / kPair},
    };
    for (const Operand& o : operands) {
        if (o.data == nullptr) continue;
        const cudaError_t error =
            make_map<T>(o.map, o.data, o.rows, o.columns, o.pitch, o.box_rows);
        if (error != cudaSuccess) return error;
    }
    p.y = static_cast<T*>(g.y);
    p.bias = static_cast<const T*>(g.bias);
    p.seed = g.seed;
    p.y_stride = g.y_stride;
    p.m = static_cast<int>(g.m);
    p.n = static_cast<int>(g.n);
    p.k = static_cast<int>(g.k);
    p.r = static_cast<int>(g.r);
    p.threshold = g.threshold;
    p.scale = g.scale;
    p.accumulate = g.accumulate != 0;
    const int64_t pairs = (g.m + kPair * kTileM - 1) / (kPair * kTileM);
    const int64_t tiles = pairs * ((g.n + kTileN - 1) / kTileN);
    const auto clusters = static_cast<unsigned>(std::min<int64_t>(most, tiles));
    if (g.shrink.columns > 0) {
        p.shrinkers = shrinkers(static_cast<int>(pairs), tiles, static_cast<int>(clusters),
                                wide ? 2 : 1);
        p.shrink = shrink_args<T>(g.shrink);
        const cudaError_t error =
            cudaMemsetAsync(g.shrink.done, 0, pairs * kPair * sizeof(uint32_t), stream);
        if (error != cudaSuccess) return error;
    }
    Launch how{dim3(clusters * kPair), kThreads, kPair, false, stream, {}, kSharedBytes};
    return launch<kKernel>(how, p);
}

bool is_right(const CkfShrink& s, const CkfGemm& g) {
    if (s.columns == 0) return s.a == nullptr;
    if (s.columns < 0 || s.columns > kTileN || s.columns % 8 != 0) return false;
    if (s.tasks < 1 || s.tasks > (int64_t{1} << 30)) return false;
    const bool compacts = s.compact != nullptr, restores = s.restored != nullptr;
    if (restores && (!g.dx || !compacts)) return false;
    const void* pointers[] = {s.a, s.gated, s.compact, s.restored};
    const int64_t pitches[] = {s.a_stride, s.gated_stride, s.compact_stride, s.restored_stride};
    const int64_t widths[] = {g.k, s.columns, 8, s.columns};
    const bool there[] = {true, true, compacts, restores};
    for (int i = 0; i < 4; ++i) {
        if (!there[i]) continue;
        if (pointers[i] == nullptr || reinterpret_cast<uintptr_t>(pointers[i]) % 16 != 0)
            return false;
        if (pitches[i] < widths[i] || pitches[i] % 8 != 0) return false;
    }
    return s.gates != nullptr && s.task_ids != nullptr && s.done != nullptr &&
           compacts == (s.slots != nullptr);
}

bool is_right(const CkfGemm& g) {
    constexpr int64_t kMost = int64_t{1} << 30;  // tile and element indices of a tile fit an int
    const int64_t sizes[] = {g.m, g.n, g.k, g.r};
    for (const int64_t size : sizes)
        if (size < 1 || size > kMost) return false;
    if ((g.m / 256 + 1) * (g.n / 256 + 1) > kMost || g.n % 8 != 0) return false;
    if (g.accumulate != 0 && !g.dx) return false;
    const void* pointers[] = {g.x, g.w, g.h, g.b, g.y};
    const int64_t pitches[] = {g.x_stride, g.w_stride, g.h_stride, g.b_stride, g.y_stride};
    const int64_t widths[] = {g.k, g.dx ? g.n : g.k, g.r, g.n, g.n};
    for (int i = 0; i < 5; ++i) {
        if (pointers[i] == nullptr || reinterpret_cast<uintptr_t>(pointers[i]) % 16 != 0)
            return false;
        if (pitches[i] < widths[i] || pitches[i] % 8 != 0) return false;
    }
    return reinterpret_cast<uintptr_t>(g.bias) % 4 == 0 && is_right(g.shrink, g);
}

}  // namespace
}  // namespace ckf

extern "C" int ckf_hopper_gemm(const CkfGemm* gemm, void* stream) {
    if (!ckf::is_right(*gemm)) return cudaErrorInvalidValue;
    if (const cudaError_t error = ckf::use_device(gemm->device); error != cudaSuccess) return error;
    const auto s = static_cast<cudaStream_t>(stream);
    cudaError_t error = cudaErrorInvalidValue;
    if (gemm->dtype == kCkfFloat16)
        error = gemm->dx ? ckf::launch_gemm<__half, true>(*gemm, s)
                         : ckf::launch_gemm<__half, false>(*gemm, s);
    if (gemm->dtype == kCkfBFloat16)
        error = gemm->dx ? ckf::launch_gemm<__nv_bfloat16, true>(*gemm, s)
                         : ckf::launch_gemm<__nv_bfloat16, false>(*gemm, s);
    cudaGetLastError();  // as above
    return error;
}

#ifdef CKF_HOST_SHIM
// For a test of the order of the tiles.
extern "C" void ckf_host_tile_at(int index, int pairs, int columns, int* pair, int* column) {
    const ckf::Tile tile = ckf::tile_at(index, pairs, columns);
    *pair = tile.pair;
    *column = tile.column;
}
extern "C" int ckf_host_shrinkers(int pairs, int64_t tiles, int clusters, int halves) {
    return ckf::shrinkers(pairs, tiles, clusters, halves);
}
#endif

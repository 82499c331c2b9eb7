// What device.h has for the GPU, on the host; the end of host_shim.h. Copies and values sent to
// other blocks land as late as they may, so that a missing wait shows.
#pragma once

#define CKF_SHARED(Type, name)                             \
    static_assert(sizeof(Type) <= ckf_host::kSharedBytes); \
    Type& name = *reinterpret_cast<Type*>(ckf_host::own_block().shared)
#define CKF_LARGE_SHARED CKF_SHARED
#define CKF_HAS_CLUSTERS 1

namespace ckf {

inline void prefetch(const void*) {}
inline void prefetch_if(bool, const void*) {}
// Lands as late as it may; until then what was there is NaN.
template <int kBytes>
void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kBytes != 0)
        ckf_host::last_error = cudaErrorLaunchFailure;
    memset(to, 0xff, kBytes);
    ckf_host::fibers[ckf_host::current].copies.emplace_back(to, from, kBytes);
}
inline void wait_for_copies() {
    auto& copies = ckf_host::fibers[ckf_host::current].copies;
    for (const auto& [to, from, bytes] : copies) memcpy(to, from, bytes);
    copies.clear();
}
inline void wait_for_previous_grid() {}

template <int kCluster>
void cluster_arrive() {
    if (kCluster == 1) return;
    ckf_host::Barrier& barrier = ckf_host::own_cluster_barrier();
    ckf_host::fibers[ckf_host::current].cluster_generation = barrier.generation;
    ckf_host::arrive(barrier, ckf_host::cluster_size * ckf_host::block_threads);
    const int lag = ckf_host::current / ckf_host::block_threads * 7 + ckf_host::order_seed;
    for (int i = ckf_host::order_seed > 1 ? lag % 5 * 50 : 0; i > 0; --i) {
        ckf_host::moved = true;  // other blocks may be ahead of this one
        ckf_host::pause();
    }
}

inline void cluster_begin() { cluster_arrive<8>(); }

template <int kCluster>
void cluster_wait() {
    if (kCluster == 1) return __syncthreads();
    ckf_host::wait_past(ckf_host::own_cluster_barrier(),
                        ckf_host::fibers[ckf_host::current].cluster_generation);
}

template <int kCluster>
float read_block(const float* p, unsigned rank) {
    const ckf_host::Block& there = ckf_host::blocks[ckf_host::index_of(rank)];
    if (there.left != 0) ckf_host::last_error = cudaErrorLaunchFailure;
    const size_t offset = reinterpret_cast<const char*>(p) - ckf_host::own_block().shared;
    return *reinterpret_cast<const float*>(there.shared + offset);
}

template <int kCluster>
void write_block(float* p, float value, unsigned rank) {
    ckf_host::Block& there = ckf_host::blocks[ckf_host::index_of(rank)];
    if (there.left != 0) ckf_host::last_error = cudaErrorLaunchFailure;
    const size_t offset = reinterpret_cast<const char*>(p) - ckf_host::own_block().shared;
    *reinterpret_cast<float*>(there.shared + offset) = value;
}

struct alignas(8) Arrivals {
    int64_t bytes;  // that are still to come
};
inline void expect_arrivals(Arrivals* arrivals, int bytes) { arrivals->bytes = bytes; }
// Lands with the last of all that is expected.
inline void send_to_block(float* p, float value, Arrivals* arrivals, unsigned rank) {
    ckf_host::Block& there = ckf_host::blocks[ckf_host::index_of(rank)];
    if (there.left != 0) ckf_host::last_error = cudaErrorLaunchFailure;
    const auto find = [&](auto* own) {
        char* found = there.shared + (reinterpret_cast<char*>(own) - ckf_host::own_block().shared);
        return reinterpret_cast<decltype(own)>(found);
    };
    there.sent.emplace_back(find(p), value);
    if ((find(arrivals)->bytes -= sizeof(float)) > 0) return;
    if (find(arrivals)->bytes < 0) ckf_host::last_error = cudaErrorLaunchFailure;
    for (const auto& [to, sent] : there.sent) *to = sent;
    ckf_host::moved = true;
}
inline void wait_for_arrivals(Arrivals* arrivals) {
    while (arrivals->bytes > 0) ckf_host::pause();
}

struct LaunchAttributes {};
struct Launch {
    dim3 grid;
    int threads, cluster;
    bool overlap;
    cudaStream_t stream;
    LaunchAttributes attributes;
    size_t dynamic_shared = 0;
};

template <auto kKernel, typename Args>
cudaError_t launch(const Launch& how, const Args& args) {
    return ckf_host::launch(how.grid, how.threads, how.cluster, how.dynamic_shared,
                            [&] { kKernel(args); });
}

template <auto kKernel>
bool is_hopper_code(int) {
    return true;
}

template <auto kKernel>
bool has_registers(int, int) {
    return true;
}

template <auto kKernel>
int most_clusters(int, int, int, size_t dynamic_shared = 0) {
    return dynamic_shared > ckf_host::kSharedBytes ? 0 : ckf_host::cluster_limit;
}

}  // namespace ckf

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
extern "C" void ckf_host_set_clusters(int most) { ckf_host::cluster_limit = most; }
// The conversions above, for a test that compares all 65,536 patterns with another library's.
extern "C" float ckf_host_half_to_float(uint16_t bits) { return __half2float(__half{bits}); }
extern "C" uint16_t ckf_host_float_to_half(float v) { return __float2half_rn(v).bits; }
extern "C" uint16_t ckf_host_float_to_bfloat16(float v) { return __float2bfloat16_rn(v).bits; }

// What bulk.h has for the GPU, on the host: copies land in any order, and only while somebody waits
// for some; their target is NaN from the moment they are asked for.
#pragma once

namespace ckf {

struct alignas(8) BulkCopies {
    uint32_t begun;     // kBegun, once it is
    uint32_t phase;     // how many are over
    int64_t bytes;      // of this one, not there yet
    uint32_t expected;  // whether this one's are known
};

}  // namespace ckf

namespace ckf_host {

constexpr uint32_t kBegun = 0x6b6f0001;

struct BulkCopy {
    char* to;
    const void* from;
    int bytes, block;
    ckf::BulkCopies* copies;
};
inline std::vector<BulkCopy> bulk_copies;  // in flight, of all blocks that run
inline std::mt19937 bulk_chance;
inline int64_t bulk_bytes = 0;  // that have landed, in all launches

inline void fail_bulk(bool wrong) {
    if (wrong) last_error = cudaErrorLaunchFailure;
}

inline const bool bulk_hooked = [] {
    cluster_begins = [] {
        bulk_copies.clear();
        bulk_chance.seed(order_seed);
    };
    cluster_ends = [] { fail_bulk(!bulk_copies.empty()); };  // a copy outlives its cluster
    return true;
}();

// Perhaps one of the copies in flight.
inline void land_bulk() {
    if (bulk_copies.empty()) return;
    moved = true;
    if (bulk_chance() % 4 != 0) return;
    std::swap(bulk_copies[bulk_chance() % bulk_copies.size()], bulk_copies.back());
    const BulkCopy copy = bulk_copies.back();
    bulk_copies.pop_back();
    fail_bulk(blocks[copy.block].left != 0);
    memcpy(copy.to, copy.from, copy.bytes);
    bulk_bytes += copy.bytes;
    copy.copies->bytes -= copy.bytes;
    fail_bulk(copy.copies->bytes < 0);
    if (copy.copies->bytes != 0 || copy.copies->expected == 0) return;
    copy.copies->expected = 0;
    ++copy.copies->phase;
}

}  // namespace ckf_host

namespace ckf {

inline void init_bulk(BulkCopies* copies) { *copies = {ckf_host::kBegun, 0, 0, 0}; }

// A phase that begins before the one before it is over is a failure.
inline void expect_bulk(BulkCopies* copies, int bytes) {
    ckf_host::fail_bulk(copies->begun != ckf_host::kBegun || copies->expected != 0);
    ckf_host::fail_bulk(bytes <= 0 || bytes >= 1 << 20);
    copies->expected = 1;
    copies->bytes += bytes;
}

inline void copy_bulk(void* to, const void* from, int bytes, BulkCopies* copies) {
    const int block = ckf_host::current / ckf_host::block_threads;
    const auto at = static_cast<char*>(to);
    const char* shared = ckf_host::blocks[block].shared;
    const bool inside =
        bytes > 0 && at >= shared && at + bytes <= shared + ckf_host::dynamic_bytes;
    const auto places = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    ckf_host::fail_bulk(!inside || (places | bytes) % 16 != 0 || copies->begun != ckf_host::kBegun);
    if (!inside) return;
    memset(to, 0xff, bytes);
    ckf_host::bulk_copies.push_back({at, from, bytes, block, copies});
}

// Before its beginning a barrier says anything: here that all is there. Warps see the end of a phase
// one long after the other.
inline void wait_for_bulk(BulkCopies* copies, unsigned parity) {
    ckf_host::fail_bulk(copies->begun != ckf_host::kBegun);
    while (copies->begun == ckf_host::kBegun && (copies->phase & 1) == parity) {
        ckf_host::land_bulk();
        if ((copies->phase & 1) == parity) ckf_host::pause();
    }
    const int warp = ckf_host::current % ckf_host::block_threads / ckf_host::kWarpSize;
    const int lag = ckf_host::order_seed > 1 ? (warp + ckf_host::order_seed) % 4 * 30 : 0;
    for (int i = 0; i < lag; ++i) {
        ckf_host::moved = true;
        ckf_host::pause();
    }
}

}  // namespace ckf

extern "C" int64_t ckf_host_bulk_bytes() { return ckf_host::bulk_bytes; }

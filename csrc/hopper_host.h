// What hopper.h has for the GPU, on the host: copies land when the scheduler of host_shim.h likes,
// in any order, and their target is NaN from the moment they are asked for; products read shared
// memory as late as they may, and their accumulators are NaN while any is in flight. So a stage that
// is filled or given back too early, or an accumulator touched too soon, shows as a wrong result.
// Layouts follow the PTX ISA's canonical ones and know nothing of the kernel.
#pragma once

#include <cstdio>
#include <deque>
#include <map>

namespace ckf_host {

struct TensorMap {
    const uint16_t* data;
    int64_t rows, columns, pitch;
    int box_rows;
};
struct PhaseBarrier {
    int expected = 0, arrived = 0;
    int64_t bytes = 0;   // expected and not yet copied
    unsigned phase = 0;  // how many are over
};
struct Copy {
    const TensorMap* map;
    uint32_t to, barrier;
    int column, row, block;
    const char* from = nullptr;  // of a copy between blocks, which has no map
    int64_t bytes = 0;
    int sender = 0;
};
struct Product {
    uint64_t a, b;
    bool add, rows_of_n;
    int columns;
};
struct ProductState {
    std::deque<std::deque<Product>> batches;  // committed, the oldest first
    std::deque<Product> open;
    std::vector<float> sums;  // the true ones while the thread's are NaN
    bool in_flight = false, fenced = false;
};

constexpr uint32_t kFirstAddress = 0x430;  // aligned as badly as dynamic shared memory may be
inline std::vector<std::vector<char>> dynamic;  // of the blocks that run
inline std::map<std::pair<int, uint32_t>, PhaseBarrier> phase_barriers;
inline std::deque<Copy> copies;
inline std::vector<ProductState> products;
inline std::vector<Barrier> some_threads;  // a block's barrier of its first threads
inline std::mt19937 chance;

inline void fail(const char* what) {
    if (last_error == cudaSuccess) fprintf(stderr, "host: %s\n", what);
    last_error = cudaErrorLaunchFailure;
}

inline int own_index() { return current / block_threads; }  // of the block, among all that run

inline char* shared_at(int block, uint32_t address, size_t bytes) {
    static char nowhere[64 * 1024];
    if (address < kFirstAddress || address + bytes > kFirstAddress + dynamic[block].size()) {
        fail("an address outside shared memory");
        return nowhere;
    }
    return dynamic[block].data() + (address - kFirstAddress);
}

inline void begin_hopper() {
    dynamic.assign(blocks.size(), std::vector<char>(dynamic_bytes, static_cast<char>(0xff)));
    phase_barriers.clear();
    copies.clear();
    products.assign(fibers.size(), ProductState{});
    some_threads.assign(blocks.size(), Barrier{});
    chance.seed(order_seed);
}
inline void end_hopper() {
    if (!copies.empty()) fail("a copy outlives its cluster");
    for (const auto& [where, barrier] : phase_barriers)
        if (barrier.bytes != 0) fail("a barrier that still waits for bytes");
    for (const ProductState& state : products)
        if (!state.batches.empty() || !state.open.empty()) fail("a product nobody waits for");
}
inline const bool hooked = [] {
    together = true;  // blocks wait for what others of the grid have written
    cluster_begins = begin_hopper;
    cluster_ends = end_hopper;
    return true;
}();

inline PhaseBarrier& barrier_at(int block, uint32_t address) {
    if (block != own_index() && blocks[block].left != 0)
        fail("a barrier of a block that has left");
    const auto found = phase_barriers.find({block, address});
    if (found != phase_barriers.end()) return found->second;
    fail("a barrier before its start");
    return phase_barriers[{block, address}];
}

inline void settle(PhaseBarrier& barrier) {
    if (barrier.arrived > barrier.expected) fail("too many arrivals");
    if (barrier.arrived != barrier.expected || barrier.bytes != 0) return;
    barrier.arrived = 0;
    ++barrier.phase;
    moved = true;
}

inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void complete(const Copy& copy) {
    PhaseBarrier& barrier = barrier_at(copy.block, copy.barrier);
    if (copy.map == nullptr) {
        if (blocks[copy.sender].left != 0) fail("a sender that has left");
        memcpy(shared_at(copy.block, copy.to, copy.bytes), copy.from, copy.bytes);
        barrier.bytes -= copy.bytes;
        return settle(barrier);
    }
    const TensorMap& map = *copy.map;
    for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < 64; ++c) {
            const int64_t row = copy.row + r, column = copy.column + c;
            uint16_t value = 0;
            if (row >= 0 && row < map.rows && column >= 0 && column < map.columns)
                value = map.data[row * map.pitch + column];
            memcpy(shared_at(copy.block, swizzled(copy.to + r * 128 + c * 2), 2), &value, 2);
        }
    }
    barrier.bytes -= map.box_rows * 128;
    settle(barrier);
}

// One of the copies in flight may land; in one of the orders of threads rarely, so that some are long
// on their way while others of the same time are there.
inline void land() {
    if (copies.empty()) return;
    moved = true;
    if (chance() % (order_seed == 3 ? 4000 : 4) != 0) return;
    std::swap(copies[chance() % copies.size()], copies.front());
    const Copy copy = copies.front();
    copies.pop_front();
    complete(copy);
}

template <typename T>
float operand(uint64_t descriptor, bool rows_of_n, int line, int depth) {
    const auto field = [=](int shift) -> uint32_t { return (descriptor >> shift & 0x3fff) << 4; };
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not a 128-byte swizzle");
    uint32_t address = field(0);
    if (rows_of_n)
        address += line / 64 * field(16) + line % 64 * 2 + depth / 8 * field(32) + depth % 8 * 128;
    else
        address += line / 8 * field(32) + line % 8 * 128 + depth * 2;
    T value;
    memcpy(&value, shared_at(own_index(), swizzled(address), 2), 2);
    return ckf::to_float(value);
}

// This thread's share of a product of 64 x columns x 16.
template <typename T>
void execute(const Product& product, std::vector<float>& sums) {
    const int thread = current % block_threads % 128, lane = thread % kWarpSize;
    float a[2][16], b[16];
    for (int h = 0; h < 2; ++h)
        for (int depth = 0; depth < 16; ++depth)
            a[h][depth] = operand<T>(product.a, false, thread / 32 * 16 + lane / 4 + 8 * h, depth);
    for (int j = 0; j < product.columns / 8; ++j) {
        for (int e = 0; e < 2; ++e) {
            for (int depth = 0; depth < 16; ++depth)
                b[depth] = operand<T>(product.b, product.rows_of_n, 8 * j + 2 * (lane % 4) + e,
                                      depth);
            for (int h = 0; h < 2; ++h) {
                float& sum = sums[4 * j + 2 * h + e];
                if (!product.add) sum = 0.0f;
                for (int depth = 0; depth < 16; ++depth) sum += a[h][depth] * b[depth];
            }
        }
    }
}

}  // namespace ckf_host

#define CKF_DYNAMIC_SHARED(name) char* name = ckf_host::dynamic[ckf_host::own_index()].data()

namespace ckf {

using TensorMap = ckf_host::TensorMap;

inline uint32_t shared_address(const void* p) {
    return ckf_host::kFirstAddress +
           static_cast<uint32_t>(static_cast<const char*>(p) -
                                 ckf_host::dynamic[ckf_host::own_index()].data());
}

inline void init_barrier(uint32_t barrier, unsigned arrivals) {
    if (barrier % 8 != 0) ckf_host::fail("a barrier off its alignment");
    ckf_host::shared_at(ckf_host::own_index(), barrier, 8);
    ckf_host::phase_barriers[{ckf_host::own_index(), barrier}].expected =
        static_cast<int>(arrivals);
}
inline void fence_barriers() {}

inline void arrive_at(uint32_t barrier, unsigned rank) {
    ckf_host::PhaseBarrier& there = ckf_host::barrier_at(ckf_host::index_of(rank), barrier);
    ++there.arrived;
    ckf_host::settle(there);
}
inline void expect_bytes(uint32_t barrier, unsigned bytes) {
    ckf_host::barrier_at(ckf_host::own_index(), barrier).bytes += bytes;
    arrive_at(barrier, ckf_host::own_index() % ckf_host::cluster_size);
}
inline void wait_barrier(uint32_t barrier, unsigned parity) {
    const ckf_host::PhaseBarrier& own = ckf_host::barrier_at(ckf_host::own_index(), barrier);
    while ((own.phase & 1) == parity) {
        ckf_host::land();
        if ((own.phase & 1) == parity) ckf_host::pause();
    }
}

inline void load_tile_for(unsigned to_blocks, uint32_t to, const TensorMap& map, uint32_t barrier,
                          int column, int row) {
    if (to % 1024 != 0) ckf_host::fail("a swizzled copy off its alignment");
    for (int rank = 0; rank < ckf_host::cluster_size; ++rank) {
        if ((to_blocks >> rank & 1) == 0) continue;
        const int block = ckf_host::index_of(rank);
        const size_t bytes = map.box_rows * 128;
        ckf_host::barrier_at(block, barrier);
        memset(ckf_host::shared_at(block, to, bytes), 0xff, bytes);
        ckf_host::copies.push_back({&map, to, barrier, column, row, block});
    }
}
inline void load_tile(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row) {
    load_tile_for(1u << ckf_host::own_index() % ckf_host::cluster_size, to, map, barrier, column, row);
}

inline void fence_shared_for_copies() {}
inline void send_rows(uint32_t address, unsigned bytes, uint32_t barrier, unsigned rank) {
    if (address % 16 != 0 || bytes % 16 != 0 || bytes == 0) ckf_host::fail("a copy off its alignment");
    const int block = ckf_host::index_of(rank), own = ckf_host::own_index();
    memset(ckf_host::shared_at(block, address, bytes), 0xff, bytes);
    const char* from = ckf_host::shared_at(own, address, bytes);
    ckf_host::copies.push_back({nullptr, address, barrier, 0, 0, block, from, bytes, own});
}

template <int kThreads>
void sync_threads() {
    ckf_host::wait(ckf_host::some_threads[ckf_host::own_index()], kThreads);
}

inline void store_words(void* to, const uint32_t (&word)[4]) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) ckf_host::fail("a store off its alignment");
    memcpy(to, word, sizeof(word));
}

inline void publish(unsigned* count) {
    __syncwarp();
    if (ckf_host::current % ckf_host::kWarpSize == 0) ++*count;
    ckf_host::moved = true;
}
inline void wait_published(const unsigned* count, unsigned expected) {
    while (*count < expected) ckf_host::pause();
}

template <int kCount>
void raise_registers() {}
template <int kCount>
void lower_registers() {}

inline void fence_products() { ckf_host::products[ckf_host::current].fenced = true; }

template <typename T, bool kRowsOfN, int kColumns>
void product(float (&d)[kFragment], uint64_t a, uint64_t b, bool add) {
    ckf_host::ProductState& state = ckf_host::products[ckf_host::current];
    if (!state.fenced) ckf_host::fail("a product without a fence before it");
    if (!state.in_flight) state.sums.assign(d, d + kFragment);
    state.in_flight = true;
    std::fill(d, d + kFragment, NAN);
    state.open.push_back({a, b, add, kRowsOfN, kColumns});
}
inline void commit_products() {
    ckf_host::ProductState& state = ckf_host::products[ckf_host::current];
    state.batches.push_back(std::move(state.open));
    state.open.clear();
}
template <int kBatches, typename T>
void wait_products(float (&d)[kFragment]) {
    __syncwarp();
    ckf_host::ProductState& state = ckf_host::products[ckf_host::current];
    while (state.batches.size() > kBatches) {
        for (const ckf_host::Product& product : state.batches.front())
            ckf_host::execute<T>(product, state.sums);
        state.batches.pop_front();
    }
    if (state.in_flight && state.batches.empty() && state.open.empty()) {
        std::copy(state.sums.begin(), state.sums.end(), d);
        state.in_flight = state.fenced = false;
    }
    __syncwarp();
}

template <typename T>
cudaError_t make_map(TensorMap* map, const void* data, int64_t rows, int64_t columns,
                     int64_t pitch, int box_rows) {
    const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * sizeof(T) % 16 == 0;
    if (!fits || rows < 1 || columns < 1 || box_rows > 256) return cudaErrorInvalidValue;
    *map = {static_cast<const uint16_t*>(data), rows, columns, pitch, box_rows};
    return cudaSuccess;
}

}  // namespace ckf

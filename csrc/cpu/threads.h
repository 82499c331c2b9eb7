// Work units on the OpenMP threads that PyTorch itself computes with: a pool of one's own would
// wait for cores that PyTorch's idle threads still spin on. The runtime is the one that PyTorch's
// library was loaded with; which that is depends on how PyTorch was built.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace ckf_cpu {

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// libgomp's entry point, which LLVM's and Intel's runtimes have too; null where there is none.
inline Parallel find_parallel() {
    void* found = nullptr;
    for (const char* library : {"libtorch_cpu.so", "libtorch_cpu.dylib"})
        if (void* loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) {
            found = dlsym(loaded, "GOMP_parallel");  // or in what it depends on
            dlclose(loaded);
        }
    if (found == nullptr) found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return reinterpret_cast<Parallel>(found);
}

// body(unit) for each unit, in any order, by one thread or by so many: all of PyTorch's, also where
// some find nothing to do, for libgomp ends those that a smaller team leaves out.
template <typename Body>
void each_unit(int64_t units, int threads, const Body& body) {
    static const Parallel parallel = find_parallel();
    struct Work {
        std::atomic<int64_t> next{0};
        int64_t units;
        const Body* body;
        std::atomic_flag failed = ATOMIC_FLAG_INIT;
        std::exception_ptr error;
    } work;
    work.units = units;
    work.body = &body;
    const auto run = [](void* data) {
        auto& own = *static_cast<Work*>(data);
        try {
            for (int64_t unit; (unit = own.next++) < own.units;) (*own.body)(unit);
        } catch (...) {  // must not leave a thread of the pool
            if (!own.failed.test_and_set()) own.error = std::current_exception();
        }
    };
    if (threads > 1 && units > 1 && parallel != nullptr)
        parallel(run, &work, static_cast<unsigned>(threads), 0);
    else
        run(&work);
    if (work.error) std::rethrow_exception(work.error);
}

}  // namespace ckf_cpu

// The Python module ckf._cpu: pointers and sizes as integers. ckf/kernels/cpu.py is its only caller
// and checks everything that an integer cannot say (device, dtype, contiguity, sizes).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "build_info.h"  // written by setup.py: kCkfBuildInfo, a JSON object
#include "dropout.h"
#include "passes.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using Pointers = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<ckf_cpu::Rows<T>> rows(const Pointers& data, const Sizes& strides) {
    std::vector<ckf_cpu::Rows<T>> found;
    for (size_t i = 0; i < data.size(); ++i)
        found.push_back({pointer<T>(data[i]), strides.at(i)});
    return found;
}

std::vector<const CkfMicro*> usable() {  // best first
    std::vector<const CkfMicro*> found{&kCkfMicro_base};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.insert(found.begin(), &kCkfMicro_avx2);
        if (__builtin_cpu_supports("avx512f")) found.insert(found.begin(), &kCkfMicro_avx512);
    }
#endif
    return found;
}

const CkfMicro& find(const std::string& name) {
    for (const CkfMicro* micro : usable())
        if (name == micro->name) return *micro;
    throw std::invalid_argument("no kernels for " + name + " run here");
}

class MultiLora {
  public:
    MultiLora(int64_t k, int64_t tasks, const Pointers& gates, const Sizes& n, const Sizes& experts,
              const Pointers& a, const Pointers& b, const Sizes& ranks,
              const std::string& instructions)
        : group_(find(instructions), k, tasks, linears(gates, n, experts), flat(a, b, ranks)) {}

    void keep_transposed(int threads) { group_.keep_transposed(threads); }

    void check_ids(uintptr_t ids, int64_t m) const {
        group_.check_ids(pointer<const int64_t>(ids), m);
    }

    void forward(uintptr_t x, int64_t x_stride, uintptr_t ids, int64_t m, const Pointers& y,
                 const Sizes& y_strides, uintptr_t h, int64_t h_width, int threads) const {
        py::gil_scoped_release release;
        group_.forward({pointer<const float>(x), x_stride}, pointer<const int64_t>(ids), m,
                       rows<float>(y, y_strides), {pointer<float>(h), h_width}, threads);
    }

    void backward(const Pointers& dy, const Sizes& dy_strides, uintptr_t x, int64_t x_stride,
                  uintptr_t h, int64_t h_width, uintptr_t ids, int64_t m, uintptr_t dx,
                  uintptr_t da, const Pointers& db, int threads) const {
        py::gil_scoped_release release;
        std::vector<float*> own_db;
        for (uintptr_t address : db) own_db.push_back(pointer<float>(address));
        group_.backward(rows<const float>(dy, dy_strides), {pointer<const float>(x), x_stride},
                        {pointer<const float>(h), h_width}, pointer<const int64_t>(ids), m,
                        pointer<float>(dx), pointer<float>(da), own_db, threads);
    }

  private:
    static std::vector<ckf_cpu::Linear> linears(const Pointers& gates, const Sizes& n,
                                                const Sizes& experts) {
        std::vector<ckf_cpu::Linear> found;
        for (size_t l = 0; l < n.size(); ++l)
            found.push_back({pointer<const float>(gates.at(l)), n[l], experts.at(l)});
        return found;
    }

    static std::vector<ckf_cpu::Expert> flat(const Pointers& a, const Pointers& b,
                                             const Sizes& ranks) {
        std::vector<ckf_cpu::Expert> found;
        for (size_t e = 0; e < ranks.size(); ++e)
            found.push_back(
                {pointer<const float>(a.at(e)), pointer<const float>(b.at(e)), ranks[e]});
        return found;
    }

    ckf_cpu::Group group_;
};

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.def("build_info", [] {
        return py::module_::import("json").attr("loads")(kCkfBuildInfo);
    });
    module.def("instructions", [] {
        std::vector<std::string> names;
        for (const CkfMicro* micro : usable()) names.push_back(micro->name);
        return names;
    });
    module.def("drop", [](uintptr_t x, int64_t stride, int64_t m, int64_t k, int64_t seed,
                          uint32_t threshold, uintptr_t out, int threads) {
        py::gil_scoped_release release;
        ckf_cpu::drop(pointer<const float>(x), stride, m, k, static_cast<uint64_t>(seed), threshold,
                      pointer<float>(out), threads);
    });
    module.def("has_threads", [] { return ckf_cpu::find_parallel() != nullptr; });
    py::class_<MultiLora>(module, "MultiLora")
        .def(py::init<int64_t, int64_t, const Pointers&, const Sizes&, const Sizes&,
                      const Pointers&, const Pointers&, const Sizes&, const std::string&>())
        .def("keep_transposed", &MultiLora::keep_transposed)
        .def("check_ids", &MultiLora::check_ids)
        .def("forward", &MultiLora::forward)
        .def("backward", &MultiLora::backward);
}

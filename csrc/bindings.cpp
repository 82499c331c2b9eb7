// The Python module ckf._C: pointers, sizes and a stream as integers. ckf/kernels/cuda.py is its
// only caller and checks everything that an integer cannot say (device, dtype, contiguity, sizes).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py: kCkfBuildInfo, a JSON object
#include "launchers.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(int code, const char* kernel) {
    if (code == 0) return;
    throw std::runtime_error(std::string(kernel) + ": " + ckf_error_string(code) + " (CUDA error " +
                             std::to_string(code) + ")");
}

void multi_lora_decode(uintptr_t y, uintptr_t x, uintptr_t a, uintptr_t b, uintptr_t gates,
                       uintptr_t task_ids, int64_t m, int64_t k, int64_t n, int64_t rank,
                       int64_t tasks, int64_t y_stride, int64_t x_stride, int dtype, int device,
                       uintptr_t stream) {
    const int code = ckf_multi_lora_decode(
        pointer<void>(y), pointer<const void>(x), pointer<const void>(a), pointer<const void>(b),
        pointer<const float>(gates), pointer<const int64_t>(task_ids), m, k, n, rank, tasks,
        y_stride, x_stride, dtype, device, pointer<void>(stream));
    check(code, "multi_lora_decode");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of ckf over raw pointers; use ckf.kernels.cuda instead.";
    module.def("multi_lora_decode", &multi_lora_decode, py::kw_only(), py::arg("y"), py::arg("x"),
               py::arg("a"), py::arg("b"), py::arg("gates"), py::arg("task_ids"), py::arg("m"),
               py::arg("k"), py::arg("n"), py::arg("rank"), py::arg("tasks"), py::arg("y_stride"),
               py::arg("x_stride"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
    module.def("build_info",
               [] { return py::module_::import("json").attr("loads")(kCkfBuildInfo); });
}

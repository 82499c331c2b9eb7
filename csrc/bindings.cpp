// The Python module ckf._C: pointers, sizes and a stream as integers. ckf/kernels/cuda.py is its
// only caller and checks everything that an integer cannot say (device, dtype, contiguity, sizes).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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

// The adapters of a group: what stays the same from call to call.
class MultiLoraDecode {
  public:
    MultiLoraDecode(uintptr_t a, const std::vector<uintptr_t>& b, const std::vector<int64_t>& n,
                    const std::vector<int64_t>& rank, uintptr_t gates, int64_t k, int64_t tasks,
                    int dtype, int device)
        : a_(pointer<const void>(a)),
          gates_(pointer<const float>(gates)),
          count_(b.size()),
          k_(k),
          tasks_(tasks),
          dtype_(dtype),
          device_(device) {
        if (b.empty() || b.size() > kCkfMostLinears || n.size() != b.size() ||
            rank.size() != b.size())
            throw std::invalid_argument("multi_lora_decode: b, n and rank need one entry a linear");
        for (size_t l = 0; l < count_; ++l)
            linears_[l] = {nullptr, pointer<const void>(b[l]), 0, n[l], rank[l]};
    }

    void operator()(const std::vector<uintptr_t>& y, const std::vector<int64_t>& y_strides,
                    uintptr_t x, int64_t x_stride, uintptr_t task_ids, int64_t m, int overlap,
                    uintptr_t stream) const {
        if (y.size() != count_ || y_strides.size() != count_)
            throw std::invalid_argument("multi_lora_decode: y needs one entry a linear");
        auto linears = linears_;
        for (size_t l = 0; l < count_; ++l) {
            linears[l].y = pointer<void>(y[l]);
            linears[l].y_stride = y_strides[l];
        }
        check(ckf_multi_lora_decode(linears.data(), static_cast<int>(count_),
                                    pointer<const void>(x), a_, gates_,
                                    pointer<const int64_t>(task_ids), m, k_, tasks_, x_stride,
                                    dtype_, device_, overlap, pointer<void>(stream)),
              "multi_lora_decode");
    }

    // The outputs with their bases; false, and nothing done, where that kernel is not for the call.
    bool linears(const std::vector<uintptr_t>& y, const std::vector<uintptr_t>& w,
                 const std::vector<int64_t>& w_strides, const std::vector<uintptr_t>& bias,
                 uintptr_t x, int64_t x_stride, uintptr_t task_ids, int64_t m, int form,
                 uintptr_t stream) const {
        if (y.size() != count_ || w.size() != count_ || w_strides.size() != count_ ||
            bias.size() != count_)
            throw std::invalid_argument("decode_linear: y, w and bias need one entry a linear");
        std::array<CkfFrozenLinear, kCkfMostLinears> frozen{};
        for (size_t l = 0; l < count_; ++l)
            frozen[l] = {pointer<void>(y[l]),
                         pointer<const void>(w[l]),
                         pointer<const void>(bias[l]),
                         linears_[l].b,
                         linears_[l].n,
                         w_strides[l],
                         linears_[l].n,
                         linears_[l].rank};
        constexpr int kNotSupported = 801;  // cudaErrorNotSupported
        const auto launch = [&](auto launcher, auto... others) {
            return launcher(frozen.data(), static_cast<int>(count_), pointer<const void>(x), a_,
                            gates_, pointer<const int64_t>(task_ids), m, k_, tasks_, x_stride,
                            dtype_, device_, others..., pointer<void>(stream));
        };
        constexpr int kAnySpans = 1 << 30;
        int code = kNotSupported;
        if (form != kCkfLoads)
            code = launch(ckf_decode_wgmma, form == kCkfWgmma ? kAnySpans : 1);
        if (code == kNotSupported && form != kCkfWgmma) code = launch(ckf_decode_linear);
        if (code != kNotSupported) check(code, "decode_linear");
        return code != kNotSupported;
    }

  private:
    const void* a_;
    const float* gates_;
    std::array<CkfLinear, kCkfMostLinears> linears_{};
    size_t count_;
    int64_t k_, tasks_;
    int dtype_, device_;
};

// A CkfGemm as ckf/kernels/hopper.py packs it: two dozen arguments by name cost more than the launch.
void hopper_gemm(const std::string& arguments, uintptr_t stream) {
    CkfGemm gemm;
    if (arguments.size() != sizeof(gemm))
        throw std::invalid_argument("hopper_gemm: " + std::to_string(arguments.size()) +
                                    " bytes of arguments; expected " +
                                    std::to_string(sizeof(gemm)));
    memcpy(&gemm, arguments.data(), sizeof(gemm));
    check(ckf_hopper_gemm(&gemm, pointer<void>(stream)), "hopper_gemm");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA kernels of ckf over raw pointers; use ckf.kernels.cuda instead.";
    using Pointers = std::vector<uintptr_t>;
    using Sizes = std::vector<int64_t>;
    py::class_<MultiLoraDecode>(module, "MultiLoraDecode")
        .def(py::init<uintptr_t, const Pointers&, const Sizes&, const Sizes&, uintptr_t, int64_t,
                      int64_t, int, int>(),
             py::kw_only(), py::arg("a"), py::arg("b"), py::arg("n"), py::arg("rank"),
             py::arg("gates"), py::arg("k"), py::arg("tasks"), py::arg("dtype"), py::arg("device"))
        .def("__call__", &MultiLoraDecode::operator(), py::arg("y"), py::arg("y_strides"),
             py::arg("x"), py::arg("x_stride"), py::arg("task_ids"), py::arg("m"),
             py::arg("overlap"), py::arg("stream"))
        .def("linears", &MultiLoraDecode::linears, py::arg("y"), py::arg("w"), py::arg("w_strides"),
             py::arg("bias"), py::arg("x"), py::arg("x_stride"), py::arg("task_ids"), py::arg("m"),
             py::arg("form"), py::arg("stream"));
    module.def(
        "hopper_gemm",
        [](const py::bytes& arguments, uintptr_t stream) { hopper_gemm(arguments, stream); },
        py::arg("arguments"), py::arg("stream"));
    module.def("build_info",
               [] { return py::module_::import("json").attr("loads")(kCkfBuildInfo); });
}

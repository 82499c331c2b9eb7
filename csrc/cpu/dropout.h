// The dropout mask of ckf/kernels/dropout.py, drawn and applied in one pass.
#pragma once

#include <cstdint>

namespace ckf_cpu {

// out (m, k) = x / (1 - p) where kept, else +0 whatever x is; p = threshold / 65536. Rows of x are
// stride elements apart.
void drop(const float* x, int64_t stride, int64_t m, int64_t k, uint64_t seed, uint32_t threshold,
          float* out, int threads);

}  // namespace ckf_cpu

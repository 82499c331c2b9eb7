// What the kernels that compute the base as well (decode_linear.h, decode_wgmma.h) say of a row.
#pragma once

#include "device.h"

namespace ckf {
namespace {

constexpr uint32_t kDead = 0x80000000u;  // -0 in h: the gate is zero; a live h is never -0
constexpr int kInvalid = -2;             // the task of a row that becomes NaN; -1: base only

// Of p's m rows, a task or one of the two above; rows past them are base only.
template <typename Args>
__device__ __forceinline__ int find_task(const Args& p, int row) {
    const int64_t id = row < p.m ? p.task_ids[row] : int64_t{-1};
    return id >= -1 && id < p.tasks ? static_cast<int>(id) : kInvalid;
}

}  // namespace
}  // namespace ckf

// Multi-LoRA of a group of linears on a CPU, float32: each row's own experts and no others. For a
// row of task t, A_t and B_tl being the experts of linear l whose gate is not zero, stacked:
//
//     h = (x A_t^T) * gate_t      y_l += h_l B_tl^T
//     ds = (dy B_t) * gate_t      dx += ds A_t      dA_t += ds^T x      dB_tl += dy_l^T h_l
//
// Rows are taken task by task, in their order within a task, wherever they lie. Units of work are
// tiles of rows, then blocks of the columns of dA and dB, so that no sum is split: the bits depend
// on no number of threads, and those of h, y and dx on no other row.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "micro.h"

namespace ckf_cpu {

struct Expert {
    const float* a;  // (rank, k)
    const float* b;  // (n, rank)
    int64_t rank;
};

struct Linear {
    const float* gates;  // (tasks, experts)
    int64_t n;
    int64_t experts;
};

// Rows of a matrix, stride elements apart (h: no wider than that); data null: no matrix.
template <typename T>
struct Rows {
    T* data;
    int64_t stride;
    T* operator[](int64_t row) const { return data + row * stride; }
};

class Group {
  public:
    // experts: those of all linears, one after the other.
    Group(const CkfMicro& micro, int64_t k, int64_t tasks, std::vector<Linear> linears,
          const std::vector<Expert>& experts);

    // Transposes every B once; else each call does, those of its tasks.
    void keep_transposed(int threads);

    // std::invalid_argument for an id outside [-1, tasks); -1 is the base alone.
    void check_ids(const int64_t* ids, int64_t m) const;

    // ids (m,). ys are added to. h: a row's columns, its first so many; no matrix: not kept. Before
    // anything is written, std::invalid_argument for wrong ids and for an h that is too narrow.
    void forward(Rows<const float> x, const int64_t* ids, int64_t m,
                 const std::vector<Rows<float>>& ys, Rows<float> h, int threads) const;

    // x: as the experts saw it (dropped); h: as forward wrote it. dx (m, k) is added to. da (R, k)
    // and db[l], the (n, rank) of l's experts one after the other, hold zeros before. Null: not
    // wanted.
    void backward(const std::vector<Rows<const float>>& dys, Rows<const float> x,
                  Rows<const float> h, const int64_t* ids, int64_t m, float* dx, float* da,
                  const std::vector<float*>& db, int threads) const;

  private:
    struct Placed : Expert {
        int64_t linear, number;  // the number within its linear
        int64_t column;          // its first among those of all experts
    };
    struct Part;  // the rows of a task and its experts
    struct Plan;  // of a call

    using Transposed = std::vector<std::unique_ptr<float[]>>;  // (rank, n) by expert, or null

    Plan plan(const int64_t* ids, int64_t m, int threads) const;
    static void check_width(const Plan& plan, int64_t width);
    Part part(int64_t task, int64_t first, int64_t last) const;
    void transpose(const std::vector<size_t>& experts, int threads, Transposed& into) const;
    void gradients_of_rows(const Plan& plan, const std::vector<Rows<const float>>& dys,
                           Rows<float> ds, float* dx) const;
    void gradient_of_a(const Plan& plan, int64_t first, int64_t width,
                       const std::vector<const float*>& ds, const std::vector<const float*>& x,
                       float* da) const;
    void gradient_of_b(const Plan& plan, int64_t linear, int64_t first, int64_t width,
                       const std::vector<const float*>& h, const std::vector<const float*>& dy,
                       float* db) const;

    const CkfMicro& micro_;
    int64_t k_, tasks_;
    std::vector<Linear> linears_;
    std::vector<Placed> experts_;
    Transposed kept_;
};

}  // namespace ckf_cpu

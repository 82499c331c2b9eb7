#include "passes.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "threads.h"

namespace ckf_cpu {

namespace {

constexpr int64_t kMostRows = 64, kLeastRows = 8;  // of a unit: more read B less often
constexpr int64_t kUnits = 4;                      // a thread, at least, so that all end together
constexpr double kTeamFlops = 1 << 21;             // that pay for waking the other threads

template <typename T>
std::vector<T*> row_pointers(Rows<T> rows, const int64_t* order, int64_t count) {
    std::vector<T*> pointers(count);
    for (int64_t i = 0; i < count; ++i) pointers[i] = rows[order[i]];
    return pointers;
}

}  // namespace

struct Group::Part {
    int64_t first, last;          // rows, in the plan's order
    std::vector<size_t> experts;  // those whose gate is not zero, and column by column of them:
    std::vector<float> gates;
    std::vector<const float*> a, bt;  // rows of A_t (k) and of B_t transposed (n_l)
    std::vector<int64_t> places;      // among the columns of all experts
    std::vector<int64_t> cuts;        // linear l has columns cuts[l] to cuts[l + 1]

    int64_t columns() const { return static_cast<int64_t>(gates.size()); }
    int64_t columns(size_t linear) const { return cuts[linear + 1] - cuts[linear]; }
};

struct Group::Plan {
    struct Tile {
        const Part* part;
        int64_t first, rows;
    };

    int threads;
    int64_t widest = 0;          // columns of the task that has most
    std::vector<int64_t> order;  // rows, task by task
    std::vector<Part> parts;
    std::vector<Tile> tiles;
    Transposed made;
};

void Group::check_width(const Plan& plan, int64_t width) {
    if (plan.widest > width)
        throw std::invalid_argument("a row of h has " + std::to_string(width) +
                                    " columns; a task's experts have " +
                                    std::to_string(plan.widest));
}

Group::Group(const CkfMicro& micro, int64_t k, int64_t tasks, std::vector<Linear> linears,
             const std::vector<Expert>& experts)
    : micro_(micro), k_(k), tasks_(tasks), linears_(std::move(linears)) {
    auto expert = experts.begin();
    int64_t column = 0;
    for (size_t l = 0; l < linears_.size(); ++l)
        for (int64_t number = 0; number < linears_[l].experts; ++number, ++expert) {
            experts_.push_back({*expert, static_cast<int64_t>(l), number, column});
            column += expert->rank;
        }
}

void Group::transpose(const std::vector<size_t>& experts, int threads, Transposed& into) const {
    constexpr int64_t kBlock = 16;  // rows of B, which stay in L1
    into.resize(experts_.size());
    each_unit(experts.size(), threads, [&](int64_t unit) {
        const Placed& expert = experts_[experts[unit]];
        const int64_t n = linears_[expert.linear].n, rank = expert.rank;
        float* result = new float[rank * n];
        into[experts[unit]].reset(result);
        for (int64_t first = 0; first < n; first += kBlock)
            for (int64_t c = 0; c < rank; ++c)
                for (int64_t i = first; i < std::min(first + kBlock, n); ++i)
                    result[c * n + i] = expert.b[i * rank + c];
    });
}

void Group::keep_transposed(int threads) {
    std::vector<size_t> every(experts_.size());
    for (size_t e = 0; e < every.size(); ++e) every[e] = e;
    transpose(every, threads, kept_);
}

void Group::check_ids(const int64_t* ids, int64_t m) const {
    for (int64_t i = 0; i < m; ++i)
        if (ids[i] < -1 || ids[i] >= tasks_)
            throw std::invalid_argument("task id " + std::to_string(ids[i]) +
                                        " is out of range; expected 0 to " +
                                        std::to_string(tasks_ - 1) + ", or -1 for the base alone");
}

// All but where B lies transposed.
Group::Part Group::part(int64_t task, int64_t first, int64_t last) const {
    Part part{first, last, {}, {}, {}, {}, {}, {0}};
    for (size_t e = 0; e < experts_.size(); ++e) {
        const Placed& expert = experts_[e];
        while (static_cast<int64_t>(part.cuts.size()) <= expert.linear)
            part.cuts.push_back(part.columns());
        const Linear& linear = linears_[expert.linear];
        const float gate = linear.gates[task * linear.experts + expert.number];
        if (gate == 0) continue;
        part.experts.push_back(e);
        for (int64_t c = 0; c < expert.rank; ++c) {
            part.gates.push_back(gate);
            part.a.push_back(expert.a + c * k_);
            part.places.push_back(expert.column + c);
        }
    }
    part.cuts.resize(linears_.size() + 1, part.columns());
    return part;
}

Group::Plan Group::plan(const int64_t* given_ids, int64_t m, int threads) const {
    const std::vector<int64_t> ids(given_ids, given_ids + m);  // nobody changes these meanwhile
    check_ids(ids.data(), m);
    Plan plan;
    std::vector<int64_t> ends(tasks_ + 1, 0);  // ends[t]: first row of task t, then the one past it
    for (int64_t id : ids)
        if (id >= 0) ++ends[id + 1];
    double flops = 0;
    int64_t width = k_;
    for (const Linear& linear : linears_) width += linear.n;
    std::vector<char> wanted(experts_.size(), 0);
    for (int64_t task = 0; task < tasks_; ++task) {
        const int64_t rows = ends[task + 1];
        ends[task + 1] += ends[task];
        if (rows == 0) continue;
        plan.parts.push_back(part(task, ends[task], ends[task + 1]));
        const Part& own = plan.parts.back();
        for (size_t expert : own.experts) wanted[expert] = 1;
        plan.widest = std::max(plan.widest, own.columns());
        flops += 2.0 * rows * own.columns() * width;
    }
    plan.threads = flops >= kTeamFlops ? threads : 1;
    plan.order.resize(ends[tasks_]);
    for (int64_t i = 0; i < m; ++i)
        if (ids[i] >= 0) plan.order[ends[ids[i]]++] = i;

    if (kept_.empty()) {
        std::vector<size_t> experts;
        for (size_t e = 0; e < wanted.size(); ++e)
            if (wanted[e]) experts.push_back(e);
        transpose(experts, plan.threads, plan.made);
    }
    const int64_t share = plan.order.size() / (kUnits * plan.threads);
    const int64_t tile = std::clamp(share / kLeastRows * kLeastRows, kLeastRows, kMostRows);
    const Transposed& made = kept_.empty() ? plan.made : kept_;
    for (Part& own : plan.parts) {
        for (size_t e : own.experts)
            for (int64_t c = 0; c < experts_[e].rank; ++c)
                own.bt.push_back(made[e].get() + c * linears_[experts_[e].linear].n);
        for (int64_t row = own.first; row < own.last; row += tile)
            plan.tiles.push_back({&own, row, std::min(tile, own.last - row)});
    }
    return plan;
}

void Group::forward(Rows<const float> x, const int64_t* ids, int64_t m,
                    const std::vector<Rows<float>>& ys, Rows<float> h, int threads) const {
    const Plan plan = this->plan(ids, m, threads);
    if (h.data != nullptr) check_width(plan, h.stride);
    each_unit(plan.tiles.size(), plan.threads, [&](int64_t unit) {
        const auto& [part, first, rows] = plan.tiles[unit];
        const int64_t* order = plan.order.data() + first;
        const int64_t columns = part->columns();
        std::vector<float> own_h(rows * columns);
        micro_.dot(row_pointers(x, order, rows).data(), rows, part->a.data(), columns, k_,
                   part->gates.data(), own_h.data(), columns);
        for (size_t l = 0; l < linears_.size(); ++l)
            micro_.expand(row_pointers(ys[l], order, rows).data(), rows,
                          own_h.data() + part->cuts[l], columns, part->bt.data() + part->cuts[l],
                          part->columns(l), linears_[l].n);
        for (int64_t r = 0; h.data != nullptr && r < rows; ++r)
            std::copy_n(own_h.data() + r * columns, columns, h[order[r]]);
    });
}

void Group::backward(const std::vector<Rows<const float>>& dys, Rows<const float> x,
                     Rows<const float> h, const int64_t* ids, int64_t m, float* dx, float* da,
                     const std::vector<float*>& db, int threads) const {
    const Plan plan = this->plan(ids, m, threads);
    const bool wants_db = std::any_of(db.begin(), db.end(), [](float* one) { return one; });
    if (wants_db) check_width(plan, h.stride);
    const int64_t all = plan.order.size();
    const std::unique_ptr<float[]> ds_data(new float[all * plan.widest]);  // in the plan's order
    const Rows<float> ds{ds_data.get(), plan.widest};
    if (dx != nullptr || da != nullptr) gradients_of_rows(plan, dys, ds, dx);

    struct Block {  // of the columns of dA (linear -1) or of a dB transposed
        int64_t linear, first, width;
    };
    std::vector<Block> blocks;
    const auto cut = [&](int64_t linear, int64_t n) {
        for (int64_t first = 0; first < n; first += micro_.block)
            blocks.push_back({linear, first, std::min(micro_.block, n - first)});
    };
    std::vector<std::vector<const float*>> dy_rows(linears_.size());
    for (size_t l = 0; l < linears_.size(); ++l) {
        if (db[l] == nullptr) continue;
        cut(static_cast<int64_t>(l), linears_[l].n);
        dy_rows[l] = row_pointers(dys[l], plan.order.data(), all);
    }
    if (da != nullptr) cut(-1, k_);
    const auto x_rows = row_pointers(x, plan.order.data(), all);
    std::vector<const float*> h_rows;
    if (wants_db) h_rows = row_pointers(h, plan.order.data(), all);
    std::vector<const float*> ds_rows(all);
    for (int64_t i = 0; i < all; ++i) ds_rows[i] = ds[i];

    each_unit(blocks.size(), plan.threads, [&](int64_t unit) {
        const auto& [l, first, width] = blocks[unit];
        if (l < 0)
            gradient_of_a(plan, first, width, ds_rows, x_rows, da);
        else
            gradient_of_b(plan, l, first, width, h_rows, dy_rows[l], db[l]);
    });
}

// ds (all rows, widest), and onto dx what it adds.
void Group::gradients_of_rows(const Plan& plan, const std::vector<Rows<const float>>& dys,
                              Rows<float> ds, float* dx) const {
    each_unit(plan.tiles.size(), plan.threads, [&](int64_t unit) {
        const auto& [part, first, rows] = plan.tiles[unit];
        const int64_t* order = plan.order.data() + first;
        for (size_t l = 0; l < linears_.size(); ++l)
            micro_.dot(row_pointers(dys[l], order, rows).data(), rows,
                       part->bt.data() + part->cuts[l], part->columns(l), linears_[l].n,
                       part->gates.data() + part->cuts[l], ds[first] + part->cuts[l], ds.stride);
        if (dx != nullptr)
            micro_.expand(row_pointers(Rows<float>{dx, k_}, order, rows).data(), rows, ds[first],
                          ds.stride, part->a.data(), part->columns(), k_);
    });
}

// Columns first to first + width of dA.
void Group::gradient_of_a(const Plan& plan, int64_t first, int64_t width,
                          const std::vector<const float*>& ds, const std::vector<const float*>& x,
                          float* da) const {
    for (const Part& part : plan.parts) {
        std::vector<float*> out;
        for (int64_t place : part.places) out.push_back(da + place * k_ + first);
        micro_.outer(out.data(), part.columns(), ds.data() + part.first, 0, x.data() + part.first,
                     part.last - part.first, first, width);
    }
}

// Rows first to first + width of the dB of a linear's experts.
void Group::gradient_of_b(const Plan& plan, int64_t linear, int64_t first, int64_t width,
                          const std::vector<const float*>& h, const std::vector<const float*>& dy,
                          float* db) const {
    std::vector<std::unique_ptr<float[]>> found(experts_.size());  // transposed: (rank, width)
    for (const Part& part : plan.parts) {
        std::vector<float*> out;
        for (size_t e : part.experts) {
            if (experts_[e].linear != linear) continue;
            if (!found[e]) found[e].reset(new float[experts_[e].rank * width]());
            for (int64_t c = 0; c < experts_[e].rank; ++c)
                out.push_back(found[e].get() + c * width);
        }
        micro_.outer(out.data(), out.size(), h.data() + part.first, part.cuts[linear],
                     dy.data() + part.first, part.last - part.first, first, width);
    }
    for (size_t e = 0; e < experts_.size(); ++e) {
        const int64_t rank = experts_[e].rank;
        if (experts_[e].linear != linear) continue;
        for (int64_t i = 0; found[e] && i < width; ++i)
            for (int64_t c = 0; c < rank; ++c) db[(first + i) * rank + c] = found[e][c * width + i];
        db += linears_[linear].n * rank;
    }
}

}  // namespace ckf_cpu

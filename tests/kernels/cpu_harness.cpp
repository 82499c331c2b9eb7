// csrc/cpu on drawn cases against sums in double, each matrix in memory of its exact size, so that
// a sanitizer sees whatever is read or written beside it. test_cpu_host.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dropout.h"
#include "../../csrc/cpu/passes.h"

// In place of an OpenMP runtime, found by its name.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> team;
    for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, data);
    body(data);
    for (auto& thread : team) thread.join();
}

namespace {

using Values = std::vector<float>;

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

Values normal(int64_t size) {
    Values values(size);
    for (float& value : values) value = std::normal_distribution<float>()(generator);
    return values;
}

// Rows that lie up to three elements apart; the last ends with the memory.
struct Matrix {
    int64_t rows, columns, stride;
    Values values;

    Matrix(int64_t rows, int64_t columns)
        : rows(rows),
          columns(columns),
          stride(columns + draw(0, 3)),
          values(normal(rows > 0 ? (rows - 1) * stride + columns : 0)) {}

    float at(int64_t i, int64_t j) const { return values[i * stride + j]; }
    template <typename T>
    ckf_cpu::Rows<T> view() {
        return {values.data(), stride};
    }
};

// terms: products of normal values that were summed.
void expect(const char* what, float found, double wanted, double terms) {
    if (std::abs(found - wanted) <= 2e-5 * (std::sqrt(terms) + std::abs(wanted))) return;
    std::printf("%s: %g, expected %g\n", what, found, wanted);
    std::exit(1);
}

struct Linear {
    int64_t n;
    std::vector<int64_t> ranks;
    Values gates;  // (tasks, experts)
    std::vector<Values> a, b;
    Matrix y, dy, base;
    Values db;

    Linear(int64_t m, int64_t k, int64_t n, int64_t tasks) : n(n), y(m, n), dy(m, n), base(y) {
        for (int64_t e = draw(1, 4); e > 0; --e) {
            ranks.push_back(draw(0, 19));
            a.push_back(normal(ranks.back() * k));
            b.push_back(normal(n * ranks.back()));
        }
        gates = normal(tasks * ranks.size());
        for (float& gate : gates)
            if (draw(0, 1)) gate = 0;
        db.assign(n * rank(), 0.0f);
    }

    int64_t rank() const {
        int64_t sum = 0;
        for (int64_t r : ranks) sum += r;
        return sum;
    }

    double gate(int64_t task, size_t expert) const {
        return task < 0 ? 0 : gates[task * ranks.size() + expert];
    }
};

struct Case {
    int64_t tasks = draw(1, 5), m = draw(0, 80), k = draw(1, 150), rank = 0;
    std::vector<int64_t> ids;
    Matrix x{m, k};
    std::vector<Linear> linears;
    Values dx, da, h;
    int64_t width = 0;  // columns of the busiest task that has rows
    bool wants_dx = draw(0, 3), wants_da = draw(0, 3), wants_db = draw(0, 3);

    Case() : dx(m * k, 0.5f) {
        for (int64_t i = 0; i < m; ++i) ids.push_back(draw(-1, tasks - 1));
        for (int64_t l = draw(1, 3); l > 0; --l) linears.emplace_back(m, k, draw(1, 220), tasks);
        for (const Linear& one : linears) rank += one.rank();
        da.assign(rank * k, 0.0f);
        for (int64_t task : ids) {
            int64_t own = 0;
            for (const Linear& one : linears)
                for (size_t e = 0; e < one.ranks.size(); ++e)
                    if (one.gate(task, e) != 0) own += one.ranks[e];
            width = std::max(width, own);
        }
    }

    ckf_cpu::Group group(const CkfMicro& micro) const {
        std::vector<ckf_cpu::Linear> described;
        std::vector<ckf_cpu::Expert> experts;
        for (const Linear& one : linears) {
            described.push_back({one.gates.data(), one.n, static_cast<int64_t>(one.ranks.size())});
            for (size_t e = 0; e < one.ranks.size(); ++e)
                experts.push_back({one.a[e].data(), one.b[e].data(), one.ranks[e]});
        }
        return ckf_cpu::Group(micro, k, tasks, described, experts);
    }
};

void run(Case& one, const CkfMicro& micro) {
    const int threads = static_cast<int>(draw(1, 4));
    ckf_cpu::Group group = one.group(micro);
    if (draw(0, 1)) group.keep_transposed(threads);
    const int64_t h_width = one.width + draw(0, 2);
    one.h.assign(one.m * h_width, NAN);
    std::vector<ckf_cpu::Rows<float>> ys;
    std::vector<ckf_cpu::Rows<const float>> dys;
    std::vector<float*> db;
    for (Linear& linear : one.linears) {
        ys.push_back(linear.y.view<float>());
        dys.push_back(linear.dy.view<const float>());
        db.push_back(one.wants_db ? linear.db.data() : nullptr);
    }
    const auto x = one.x.view<const float>();
    const bool keeps_h = one.wants_db || draw(0, 1);
    const ckf_cpu::Rows<float> h{keeps_h ? one.h.data() : nullptr, h_width};
    group.forward(x, one.ids.data(), one.m, ys, h, threads);
    group.backward(dys, x, {one.h.data(), h_width}, one.ids.data(), one.m,
                   one.wants_dx ? one.dx.data() : nullptr, one.wants_da ? one.da.data() : nullptr,
                   db, threads);
}

void compare(const Case& one) {
    const int64_t m = one.m, k = one.k;
    std::vector<double> want_dx(m * k, 0.5);
    int64_t column = 0;
    for (const Linear& linear : one.linears) {
        const int64_t n = linear.n;
        std::vector<double> want_y(m * n);
        for (int64_t i = 0; i < m * n; ++i) want_y[i] = linear.base.at(i / n, i % n);
        const float* db = linear.db.data();
        for (size_t e = 0; e < linear.ranks.size(); db += n * linear.ranks[e++])
            for (int64_t c = 0, r = linear.ranks[e]; c < r; ++c, ++column) {
                const float* a = linear.a[e].data() + c * k;
                const float* b = linear.b[e].data() + c;
                std::vector<double> want_da(k, 0.0), want_db(n, 0.0);
                for (int64_t i = 0; i < m; ++i) {
                    const double gate = linear.gate(one.ids[i], e);
                    double h = 0, ds = 0;
                    for (int64_t j = 0; j < k; ++j) h += gate * one.x.at(i, j) * a[j];
                    for (int64_t j = 0; j < n; ++j) ds += gate * linear.dy.at(i, j) * b[j * r];
                    for (int64_t j = 0; j < n; ++j) {
                        want_y[i * n + j] += h * b[j * r];
                        want_db[j] += linear.dy.at(i, j) * h;
                    }
                    for (int64_t j = 0; j < k; ++j) {
                        want_dx[i * k + j] += ds * a[j];
                        want_da[j] += ds * one.x.at(i, j);
                    }
                }
                for (int64_t j = 0; j < k; ++j)
                    expect("da", one.da[column * k + j], one.wants_da ? want_da[j] : 0, m * n);
                for (int64_t j = 0; j < n; ++j)
                    expect("db", db[j * r + c], one.wants_db ? want_db[j] : 0, m * k);
            }
        for (int64_t i = 0; i < m * n; ++i)
            expect("y", linear.y.at(i / n, i % n), want_y[i], k * linear.rank());
    }
    for (int64_t i = 0; i < m * k; ++i)
        expect("dx", one.dx[i], one.wants_dx ? want_dx[i] : 0.5, 220.0 * one.rank);
}

template <typename Call>
void expect_refused(const char* what, const Call& call) {
    try {
        call();
    } catch (const std::invalid_argument&) {
        return;
    }
    std::printf("%s was not refused\n", what);
    std::exit(1);
}

void refusals(Case& one, const CkfMicro& micro) {
    const ckf_cpu::Group group = one.group(micro);
    std::vector<ckf_cpu::Rows<float>> ys;
    for (Linear& linear : one.linears) ys.push_back(linear.y.view<float>());
    const auto x = one.x.view<const float>();
    if (one.width > 0)
        expect_refused("a narrow h", [&] {
            Values h(one.m * (one.width - 1) + 1);
            group.forward(x, one.ids.data(), one.m, ys, {h.data(), one.width - 1}, 1);
        });
    for (int64_t wrong : {one.tasks, int64_t{-2}, INT64_MAX, INT64_MIN}) {
        if (one.m == 0) break;
        std::vector<int64_t> ids = one.ids;
        ids[draw(0, one.m - 1)] = wrong;
        expect_refused("an id", [&] { group.forward(x, ids.data(), one.m, ys, {nullptr, 0}, 1); });
    }
}

void drop(Case& one) {
    const uint32_t threshold = static_cast<uint32_t>(draw(0, 65535));
    Values out(one.m * one.k, NAN);
    ckf_cpu::drop(one.x.values.data(), one.x.stride, one.m, one.k, generator(), threshold,
                  out.data(), 3);
    int64_t kept = 0;
    for (int64_t i = 0; i < one.m * one.k; ++i) {
        if (out[i] == 0) continue;
        ++kept;
        const double x = one.x.at(i / one.k, i % one.k);
        expect("dropped", out[i], x * 65536 / (65536 - threshold), 1);
    }
    const double share = 1 - threshold / 65536.0, size = static_cast<double>(out.size());
    if (std::abs(kept - share * size) > 6 * std::sqrt(size * share * (1 - share)) + 1) {
        std::printf("%lld of %g were kept, expected a share of %g\n", static_cast<long long>(kept),
                    size, share);
        std::exit(1);
    }
}

}  // namespace

int main(int, char** arguments) {
    std::vector<const CkfMicro*> every{&kCkfMicro_base};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        every.push_back(&kCkfMicro_avx2);
    if (__builtin_cpu_supports("avx512f")) every.push_back(&kCkfMicro_avx512);
#endif
    for (int i = std::atoi(arguments[1]); i > 0; --i)
        for (const CkfMicro* micro : every) {
            Case one;
            refusals(one, *micro);
            run(one, *micro);
            compare(one);
            drop(one);
        }
    std::puts("right");
}

// csrc/cpu on drawn cases against sums in double, each matrix in memory of its exact size, so that a
// sanitizer sees whatever is read or written beside it. test_cpu_host.py compiles and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
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

using Matrix = std::vector<float>;

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

Matrix normal(int64_t size) {
    Matrix values(size);
    for (float& value : values) value = std::normal_distribution<float>()(generator);
    return values;
}

void expect(const char* what, float found, double wanted, double terms) {
    if (std::abs(found - wanted) <= 1e-5 * terms + 1e-5) return;
    std::printf("%s: %g, expected %g\n", what, found, wanted);
    std::exit(1);
}

struct Linear {
    int64_t n;
    std::vector<int64_t> ranks;
    Matrix gates;
    std::vector<Matrix> a, b;
    Matrix y, dy, base;
};

void run_case(const CkfMicro& micro) {
    const int64_t tasks = draw(1, 5), m = draw(0, 80), k = draw(1, 150), threads = draw(1, 4);
    const bool keep = draw(0, 1);
    std::vector<int64_t> ids(m);
    for (int64_t& id : ids) id = draw(-1, tasks - 1);
    const Matrix x = normal(m * k);
    std::vector<Linear> linears(draw(1, 3));
    std::vector<ckf_cpu::Linear> described;
    std::vector<ckf_cpu::Expert> experts;
    std::vector<int64_t> widths(tasks, 0);
    int64_t rank = 0;
    for (Linear& one : linears) {
        one.n = draw(1, 220);
        for (int64_t e = draw(1, 4); e > 0; --e) {
            one.ranks.push_back(draw(0, 19));
            one.a.push_back(normal(one.ranks.back() * k));
            one.b.push_back(normal(one.n * one.ranks.back()));
            rank += one.ranks.back();
        }
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t own : one.ranks) {
                one.gates.push_back(draw(0, 1) ? std::normal_distribution<float>()(generator) : 0);
                if (one.gates.back() != 0) widths[task] += own;
            }
        one.base = one.y = normal(m * one.n);
        one.dy = normal(m * one.n);
    }
    for (Linear& one : linears) {
        described.push_back({one.gates.data(), one.n, static_cast<int64_t>(one.ranks.size())});
        for (size_t e = 0; e < one.ranks.size(); ++e)
            experts.push_back({one.a[e].data(), one.b[e].data(), one.ranks[e]});
    }
    int64_t width = 0;
    for (int64_t own : widths) width = std::max(width, own);

    ckf_cpu::Group group(micro, k, tasks, described, experts);
    if (keep) group.keep_transposed(threads);
    Matrix h(m * width, NAN), dx(m * k, 0.5f), da(rank * k, 0.0f);
    std::vector<Matrix> db;
    std::vector<ckf_cpu::Rows<float>> ys;
    std::vector<ckf_cpu::Rows<const float>> dys;
    std::vector<float*> db_data;
    for (Linear& one : linears) {
        ys.push_back({one.y.data(), one.n});
        dys.push_back({one.dy.data(), one.n});
        int64_t own = 0;
        for (int64_t r : one.ranks) own += r;
        db.emplace_back(own * one.n, 0.0f);
    }
    for (Matrix& one : db) db_data.push_back(one.data());
    group.forward({x.data(), k}, ids.data(), m, ys, {h.data(), width}, threads);
    group.backward(dys, {x.data(), k}, {h.data(), width}, ids.data(), m, dx.data(), da.data(),
                   db_data, threads);

    std::vector<double> want_dx(m * k, 0.5);
    int64_t column = 0;
    for (size_t l = 0; l < linears.size(); ++l) {
        Linear& one = linears[l];
        std::vector<double> want_y(one.base.begin(), one.base.end());
        int64_t offset = 0;
        for (size_t e = 0; e < one.ranks.size(); ++e) {
            const int64_t r = one.ranks[e];
            for (int64_t c = 0; c < r; ++c, ++column) {
                std::vector<double> want_da(k, 0.0), want_db(one.n, 0.0);
                for (int64_t i = 0; i < m; ++i) {
                    const double gate =
                        ids[i] < 0 ? 0 : one.gates[ids[i] * one.ranks.size() + e];
                    double s = 0, dh = 0;
                    for (int64_t j = 0; j < k; ++j) s += x[i * k + j] * one.a[e][c * k + j];
                    for (int64_t j = 0; j < one.n; ++j) {
                        dh += one.dy[i * one.n + j] * one.b[e][j * r + c];
                        want_y[i * one.n + j] += gate * s * one.b[e][j * r + c];
                        want_db[j] += one.dy[i * one.n + j] * gate * s;
                    }
                    for (int64_t j = 0; j < k; ++j) {
                        want_dx[i * k + j] += gate * dh * one.a[e][c * k + j];
                        want_da[j] += gate * dh * x[i * k + j];
                    }
                }
                for (int64_t j = 0; j < k; ++j)
                    expect("da", da[column * k + j], want_da[j], 5.0 * m * one.n);
                for (int64_t j = 0; j < one.n; ++j)
                    expect("db", db[l][offset + j * r + c], want_db[j], 5.0 * m * k);
            }
            offset += one.n * r;
        }
        for (size_t i = 0; i < want_y.size(); ++i) expect("y", one.y[i], want_y[i], 5.0 * k);
    }
    for (size_t i = 0; i < want_dx.size(); ++i) expect("dx", dx[i], want_dx[i], 2000);

    Matrix dropped(m * k);
    ckf_cpu::drop(x.data(), k, m, k, draw(0, 1 << 30), 6554, dropped.data(), threads);
    for (size_t i = 0; i < dropped.size(); ++i)
        if (dropped[i] != 0) expect("dropped", dropped[i], x[i] * 65536 / (65536 - 6554), 1);
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
        for (const CkfMicro* micro : every) run_case(*micro);
    std::puts("right");
}

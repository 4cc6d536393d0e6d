// bench MODEL ROUNDS: gemv of every build over every matrix of a model, in turn; times as JSON.
// See scripts/bench_builds.py, which compiles this with -DBUILDS=N.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "irq/engine.h"

#define DECLARE(n)                                         \
    void *prepare_##n(const float *, std::size_t, bool);   \
    void multiply_##n(const void *, const void *, float *);
#define ENTRY(n) {prepare_##n, multiply_##n},
#if BUILDS == 1
#define EACH(f) f(0)
#elif BUILDS == 2
#define EACH(f) f(0) f(1)
#elif BUILDS == 3
#define EACH(f) f(0) f(1) f(2)
#elif BUILDS == 4
#define EACH(f) f(0) f(1) f(2) f(3)
#elif BUILDS == 5
#define EACH(f) f(0) f(1) f(2) f(3) f(4)
#else
#error "one to five builds"
#endif
EACH(DECLARE)

namespace {

struct Build {
    void *(*prepare)(const float *, std::size_t, bool);
    void (*multiply)(const void *, const void *, float *);
};
constexpr Build builds[] = {EACH(ENTRY)};

struct Row {
    std::size_t build;
    bool is_fast;
    std::vector<std::pair<std::size_t, void *>> inputs;  // by number of columns
    std::vector<double> cache, layers, head;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void print(const char *name, const std::vector<double> &values) {
    std::printf(", \"%s\": [", name);
    for (std::size_t i = 0; i < values.size(); ++i) std::printf("%s%.9g", i == 0 ? "" : ", ", values[i]);
    std::printf("]");
}

}  // namespace

int main(int, char **arguments) {
    irq::EngineOptions options;
    options.threads = 1;
    options.context = 16;
    const irq::Engine engine(arguments[1], options);
    const irq::Model &model = engine.model();
    const int rounds = std::atoi(arguments[2]);

    std::vector<irq::Matrix> layers;
    for (const irq::Layer &l : model.layers()) {
        for (const irq::Linear *w : {&l.q, &l.k, &l.v, &l.output, &l.gate, &l.up, &l.down}) layers.push_back(w->weight);
    }
    const irq::Matrix head = model.head().weight, cached = model.layers()[0].gate.weight;
    std::vector<float> y(head.rows > cached.rows ? head.rows : cached.rows);

    std::vector<Row> rows;
    for (const bool is_fast : {true, false}) {
        for (std::size_t i = 0; i < BUILDS; ++i) rows.push_back({i, is_fast, {}, {}, {}, {}});
    }
    const auto multiply = [&](Row &row, const irq::Matrix &w) {
        for (const auto &[columns, input] : row.inputs) {
            if (columns == w.columns) return builds[row.build].multiply(&w, input, y.data());
        }
        std::vector<float> x(w.columns);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u % 2001) / 1000.0f - 1.0f;
        row.inputs.emplace_back(w.columns, builds[row.build].prepare(x.data(), w.columns, row.is_fast));
    };
    for (Row &row : rows) {
        for (const irq::Matrix &w : layers) multiply(row, w);
        multiply(row, head);
    }
    for (int round = 0; round < rounds; ++round) {
        for (Row &row : rows) {
            multiply(row, cached);
            double before = now();
            for (int i = 0; i < 20; ++i) multiply(row, cached);
            row.cache.push_back(20 * static_cast<double>(cached.total_bytes()) / (now() - before));
            before = now();
            for (const irq::Matrix &w : layers) multiply(row, w);
            const double between = now();
            multiply(row, head);
            row.layers.push_back(between - before);
            row.head.push_back(now() - between);
        }
    }
    std::printf("{\"rows\": [");
    for (const Row &row : rows) {
        std::printf("%s{\"build\": %zu, \"mode\": \"%s\"", &row == rows.data() ? "" : ", ", row.build,
                    row.is_fast ? "fast" : "exact");
        print("cache_bytes_per_s", row.cache);
        print("layers_s", row.layers);
        print("head_s", row.head);
        std::printf("}");
    }
    std::printf("]}\n");
    return 0;
}

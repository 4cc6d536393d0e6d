// bench MODEL ROUNDS THREADS: gemv of every build over every matrix of a model, in turn, and reading the same bytes;
// times as JSON. See scripts/bench_builds.py, which compiles this with -DBUILDS=N.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "irq/engine.h"
#include "irq/threads.h"

#define DECLARE(n)                                         \
    void *prepare_##n(const float *, std::size_t, bool);   \
    void multiply_##n(const void *, const void *, std::size_t, std::size_t, float *);
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
    void (*multiply)(const void *, const void *, std::size_t, std::size_t, float *);
};
constexpr Build builds[] = {EACH(ENTRY)};

enum class Kind { fast, exact, read };

struct Row {
    std::size_t build;
    Kind kind;
    std::vector<std::pair<std::size_t, void *>> inputs;  // by number of columns
    std::vector<double> cache, layers, head;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The sum of `size` bytes, asked for 6 KiB ahead as the kernels do.
std::uint64_t read(const void *data, std::size_t size) {
    const char *bytes = static_cast<const char *>(data);
    std::uint64_t sums[8] = {};
    for (std::size_t i = 0; i + 64 <= size; i += 64) {
        __builtin_prefetch(bytes + i + 6144);
        std::uint64_t words[8];
        std::memcpy(words, bytes + i, sizeof words);
        for (std::size_t j = 0; j < 8; ++j) sums[j] += words[j];
    }
    return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

// All that a product with rows [r0, r1) reads of the matrix.
std::uint64_t read(const irq::Matrix &w, std::size_t r0, std::size_t r1) {
    const char *codes = static_cast<const char *>(w.data);
    std::uint64_t sum = read(codes + r0 * w.row_bytes(), (r1 - r0) * w.row_bytes());
    for (const irq::BlockValues *v : {&w.scale, &w.tau}) {
        constexpr std::size_t sizes[] = {0, 4, 2, 1};
        const std::size_t size = sizes[static_cast<int>(v->storage)], nb = w.blocks_per_row();
        sum += read(static_cast<const char *>(v->values) + size * nb * r0, size * nb * (r1 - r0));
    }
    return sum;
}

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
    irq::ThreadPool pool(static_cast<unsigned>(std::atoi(arguments[3])));
    std::atomic<std::uint64_t> total{0};  // so that no read can be left out

    std::vector<irq::Matrix> layers;
    for (const irq::Layer &l : model.layers()) {
        for (const irq::Linear *w : {&l.q, &l.k, &l.v, &l.output, &l.gate, &l.up, &l.down}) layers.push_back(w->weight);
    }
    const irq::Matrix head = model.head().weight, cached = model.layers()[0].gate.weight;
    std::vector<float> y(head.rows > cached.rows ? head.rows : cached.rows);

    std::vector<Row> rows;
    for (const Kind kind : {Kind::fast, Kind::exact}) {
        for (std::size_t i = 0; i < BUILDS; ++i) rows.push_back({i, kind, {}, {}, {}, {}});
    }
    rows.push_back({0, Kind::read, {}, {}, {}, {}});
    // Ranges of rows as Engine::multiply cuts them.
    const auto share_out = [&](const irq::Matrix &w, const auto &range) {
        const std::size_t threads = pool.size(), tile = irq::row_tile;
        const std::size_t wanted = threads == 1 ? 1 : std::clamp(w.total_bytes() >> 20, threads, 6 * threads);
        const std::size_t chunk = std::max(w.rows / wanted / tile, std::size_t{1}) * tile;
        pool.for_each((w.rows + chunk - 1) / chunk,
                      [&](std::size_t i, unsigned) { range(i * chunk, std::min((i + 1) * chunk, w.rows)); });
    };
    const auto multiply = [&](Row &row, const irq::Matrix &w) {
        if (row.kind == Kind::read) {
            return share_out(w, [&](std::size_t r0, std::size_t r1) { total += read(w, r0, r1); });
        }
        for (const auto &[columns, input] : row.inputs) {
            if (columns != w.columns) continue;
            const auto &build = builds[row.build];
            const void *const x = input;
            return share_out(w, [&](std::size_t r0, std::size_t r1) { build.multiply(&w, x, r0, r1, y.data()); });
        }
        std::vector<float> x(w.columns);
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 2654435761u % 2001) / 1000.0f - 1.0f;
        row.inputs.emplace_back(w.columns, builds[row.build].prepare(x.data(), w.columns, row.kind == Kind::fast));
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
    std::size_t layer_bytes = 0;
    for (const irq::Matrix &w : layers) layer_bytes += w.total_bytes();
    const char *const modes[] = {"fast", "exact", total == 0 ? "nothing" : "read"};
    std::printf("{\"layer_bytes\": %zu, \"rows\": [", layer_bytes);
    for (const Row &row : rows) {
        std::printf("%s{\"build\": %zu, \"mode\": \"%s\"", &row == rows.data() ? "" : ", ", row.build,
                    modes[static_cast<int>(row.kind)]);
        print("cache_bytes_per_s", row.cache);
        print("layers_s", row.layers);
        print("head_s", row.head);
        std::printf("}");
    }
    std::printf("]}\n");
    return 0;
}

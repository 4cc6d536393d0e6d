// Norm, SwiGLU and attention of every instruction set of this machine against float64, within the rounding of
// float32. Needs no files, so it also runs under qemu and sanitizers; buffers are of exact size.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../src/engine/half.h"
#include "../src/engine/vector_ops.h"
#include "check.h"
#include "irq/cpu.h"

namespace {

constexpr double roundoff = 0x1p-24;  // half the distance from 1 to the next float

std::mt19937 random_engine(3);

std::vector<float> normal(std::size_t size, float deviation) {
    std::normal_distribution<float> values(0, deviation);
    std::vector<float> x(size);
    for (float &v : x) v = values(random_engine);
    return x;
}

std::string text(const char *what, std::size_t a, std::size_t b) {
    return std::string(what) + " " + std::to_string(a) + ", " + std::to_string(b);
}

void check_rms_norm(std::size_t size) {
    const std::vector<float> x = normal(size, 3), weight = normal(size, 1);
    std::vector<float> out(size), same = x;
    irq::vector_ops().rms_norm(x.data(), weight.data(), size, 1e-5F, out.data());
    irq::vector_ops().rms_norm(same.data(), weight.data(), size, 1e-5F, same.data());
    double squares = 0;
    for (const float v : x) squares += double{v} * v;
    const double root = std::sqrt(squares / static_cast<double>(size) + double{1e-5F});
    bool good = out == same;
    for (std::size_t i = 0; i < size; ++i) {  // squares are positive: their sum keeps its relative error
        const double expected = double{weight[i]} * x[i] / root;
        good &= std::abs(out[i] - expected) <= (static_cast<double>(size) + 8) * roundoff * std::abs(expected);
    }
    expect(good, text("rms_norm", size, 0));
}

void check_swiglu(std::size_t size) {
    std::vector<float> gate = normal(size, 8);
    const std::vector<float> up = normal(size, 1);
    const float extremes[] = {0.0F, -0.0F, 87.5F, -86.9F, -87.1F, 1e4F, -1e4F, 1e-30F};
    std::copy_n(extremes, std::min(size, std::size(extremes)), gate.begin());
    std::vector<float> out = gate;
    irq::vector_ops().swiglu(out.data(), up.data(), size);
    bool good = true;
    for (std::size_t i = 0; i < size; ++i) {  // the sum 1 + e^-x ends at e^88
        const double x = gate[i], expected = x / (1 + std::exp(-x)) * up[i];
        good &= std::abs(out[i] - expected) <= 16 * roundoff * std::abs(expected) + std::abs(x * up[i]) * std::exp(-87.5);
    }
    expect(good, text("swiglu", size, 0));
}

// Keys and values of one head as the engine lays them out, and as numbers.
class Cache {
  public:
    Cache(std::size_t head_dim, std::size_t length, bool is_half)
        : keys(normal(length * head_dim, 1)),
          values(normal(length * head_dim, 1)),
          key_bytes_(std::make_unique<std::uint8_t[]>(irq::padded(length) * head_dim * element(is_half))),
          value_bytes_(std::make_unique<std::uint8_t[]>(length * irq::padded(head_dim) * element(is_half))),
          is_half_(is_half) {
        for (std::size_t i = 0; i < length; ++i) {
            const std::size_t key = i / irq::lanes * irq::lanes * head_dim + i % irq::lanes;
            store(&keys[i * head_dim], head_dim, irq::lanes, key_bytes_.get() + key * element(is_half));
            store(&values[i * head_dim], head_dim, 1, value_bytes_.get() + i * irq::padded(head_dim) * element(is_half));
        }
    }

    irq::HeadCache view() const { return {key_bytes_.get(), value_bytes_.get(), is_half_}; }

    std::vector<float> keys, values;  // (length, head_dim), as stored

  private:
    static std::size_t element(bool is_half) { return is_half ? 2 : 4; }

    void store(float *from, std::size_t size, std::size_t stride, std::uint8_t *to) const {
        irq::vector_ops().store(from, size, is_half_, stride, to);
        for (std::size_t i = 0; is_half_ && i < size; ++i) from[i] = irq::from_half(irq::to_half(from[i]));
    }

    std::unique_ptr<std::uint8_t[]> key_bytes_, value_bytes_;
    bool is_half_;
};

void check_attend(std::size_t head_dim, std::size_t length, bool is_half) {
    const Cache cache(head_dim, length, is_half);
    constexpr std::size_t queries = 2 * irq::most_queries - 1;  // of every number that goes together
    const std::vector<float> all = normal(queries * head_dim, 2), q(all.end() - static_cast<long>(head_dim), all.end());
    std::vector<float> scores(irq::most_queries * irq::padded(length)), outs(all.size()), out(head_dim);
    irq::vector_ops().attend(all.data(), queries, cache.view(), head_dim, length, scores.data(), outs.data());
    bool alike = true;
    for (std::size_t k = 0; k < queries; ++k) {
        irq::vector_ops().attend(&all[k * head_dim], 1, cache.view(), head_dim, length, scores.data(), out.data());
        alike &= std::equal(out.begin(), out.end(), &outs[k * head_dim]);
    }
    expect(alike, text(is_half ? "queries together, fp16" : "queries together", head_dim, length));

    const double scale = 1 / std::sqrt(static_cast<double>(head_dim));
    std::vector<double> weights(length);
    double score_error = 0;  // the largest
    for (std::size_t i = 0; i < length; ++i) {
        double terms = 0;
        for (std::size_t d = 0; d < head_dim; ++d) {
            weights[i] += double{q[d]} * cache.keys[i * head_dim + d] * scale;
            terms += std::abs(double{q[d]} * cache.keys[i * head_dim + d]) * scale;
        }
        score_error = std::max(score_error, (static_cast<double>(head_dim) + 4) * roundoff * terms);
    }
    const double most = *std::max_element(weights.begin(), weights.end());
    double total = 0;
    for (double &weight : weights) total += weight = std::exp(weight - most);
    // A weight is off by twice the error of a score (its own, and the largest one's), four units of exp, and the
    // rounding of what is subtracted; sums of `length` terms by as many units.
    const double relative = 4 * score_error + (2 * static_cast<double>(length) + 64) * roundoff;
    bool good = true;
    for (std::size_t d = 0; d < head_dim; ++d) {
        double expected = 0, terms = 0;
        for (std::size_t i = 0; i < length; ++i) {
            expected += weights[i] / total * cache.values[i * head_dim + d];
            terms += weights[i] / total * std::abs(cache.values[i * head_dim + d]);
        }
        good &= std::abs(out[d] - expected) <= relative * terms;
    }
    expect(good, text(is_half ? "attend in fp16" : "attend", head_dim, length));
}

void check_all() {
    for (std::size_t size = 1; size <= 70; ++size) {
        check_rms_norm(size);
        check_swiglu(size);
    }
    for (const std::size_t size : {576, 1536, 2048}) check_rms_norm(size);
    for (const std::size_t head_dim : {2, 6, 16, 20, 32, 64, 80, 128, 130}) {
        for (const std::size_t length : {1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 300}) {
            for (const bool is_half : {false, true}) check_attend(head_dim, length, is_half);
        }
    }
}

}  // namespace

int main() {
    for (const irq::Isa isa : irq::all_isas) {
        if (!irq::set_active_isa(isa)) continue;
        std::printf("%s\n", irq::isa_name(isa));
        check_all();
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}

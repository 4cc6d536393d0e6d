// Included by vector_ops_*.cpp, each compiled for one instruction set. Vectors are GCC/Clang extensions as wide as one
// register: arrays of wider ones GCC keeps in memory.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "half.h"
#include "vector_ops.h"

namespace irq {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t width = 16, registers = 32;
#elif defined(__AVX__)
constexpr std::size_t width = 8, registers = 16;
#elif defined(__aarch64__)
constexpr std::size_t width = 4, registers = 32;
#else
constexpr std::size_t width = 4, registers = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * width)));
typedef std::int32_t Integers __attribute__((vector_size(4 * width)));

inline Vector load(const float *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void save(const Vector &v, float *to) { std::memcpy(to, &v, sizeof v); }

inline Vector load(const std::uint16_t *from) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
    return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__)
    return (Vector)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    Vector v;
    for (std::size_t i = 0; i < width; ++i) v[i] = from_half(from[i]);
    return v;
#endif
}

inline float sum(const Vector &v) {
    float part[width];
    save(v, part);
    for (std::size_t n = width / 2; n >= 4; n /= 2) {
        for (std::size_t i = 0; i < n; ++i) part[i] += part[i + n];
    }
    return (part[0] + part[1]) + (part[2] + part[3]);
}

inline float maximum(const Vector &v) {
    float most = v[0];
    for (std::size_t i = 1; i < width; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// exp within 2 ulp for -87 <= x <= 88; 0 below, exp(88) above. x = n ln 2 + r, |r| <= ln(2) / 2; the
// Taylor series of e^r to r^7 leaves 5e-9.
inline Vector exponential(const Vector &x) {
    const Vector zero = {};
    const Vector low = zero - 87.0F, high = zero + 88.0F;
    const auto underflow = x < low;
    Vector y = underflow ? low : x;
    y = y > high ? high : y;
    const Vector magic = zero + 0x1.8p23F;  // adding it rounds to an integer
    const Vector n = (y * 0x1.715476p+0F + magic) - magic;
    const Vector r = (y - n * 0x1.62e4p-1F) - n * 0x1.7f7d1cp-20F;  // ln 2 in two parts, the first exact times n
    Vector e = zero + 1.0F / 5040;
    e = e * r + 1.0F / 720;
    e = e * r + 1.0F / 120;
    e = e * r + 1.0F / 24;
    e = e * r + 1.0F / 6;
    e = e * r + 0.5F;
    e = e * r + 1.0F;
    e = e * r + 1.0F;
    const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector scale;
    std::memcpy(&scale, &power, sizeof scale);
    return underflow ? zero : e * scale;
}

void rms_norm(const float *x, const float *weight, std::size_t size, float eps, float *out) {
    Vector squares = {};
    std::size_t i = 0;
    for (; i + width <= size; i += width) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; ++i) total += x[i] * x[i];
    const float root = std::sqrt(total / static_cast<float>(size) + eps);
    for (i = 0; i + width <= size; i += width) save(load(weight + i) * (load(x + i) / root), out + i);
    for (; i < size; ++i) out[i] = weight[i] * (x[i] / root);
}

inline Vector gated(const Vector &gate, const Vector &up) { return gate / (1.0F + exponential(-gate)) * up; }

void swiglu(float *gate, const float *up, std::size_t size) {
    std::size_t i = 0;
    for (; i + width <= size; i += width) save(gated(load(gate + i), load(up + i)), gate + i);
    if (i == size) return;
    float g[width] = {}, u[width] = {};
    std::memcpy(g, gate + i, (size - i) * sizeof *g);
    std::memcpy(u, up + i, (size - i) * sizeof *u);
    save(gated(load(g), load(u)), g);
    std::memcpy(gate + i, g, (size - i) * sizeof *g);
}

// Scores of Q queries at V vectors of positions from `keys` on, U dimensions at a time: Q * V * U sums in flight hide
// the latency of addition.
template <std::size_t Q, std::size_t V, std::size_t U, typename Element>
void score_tile(const float *q, const Element *keys, std::size_t head_dim, float scale, float *scores,
                std::size_t stride) {
    Vector total[U][Q][V] = {};
    const auto add = [&](std::size_t d, std::size_t u) {
        Vector key[V];
        for (std::size_t v = 0; v < V; ++v) {
            const std::size_t position = v * width, tile = position / lanes;
            key[v] = load(keys + (tile * head_dim + d) * lanes + position % lanes);
        }
        for (std::size_t i = 0; i < Q; ++i) {
            for (std::size_t v = 0; v < V; ++v) total[u][i][v] += q[i * head_dim + d] * key[v];
        }
    };
    std::size_t d = 0;
    for (; d + U <= head_dim; d += U) {
        for (std::size_t u = 0; u < U; ++u) add(d + u, u);
    }
    for (; d < head_dim; ++d) add(d, 0);
    for (std::size_t i = 0; i < Q; ++i) {
        for (std::size_t v = 0; v < V; ++v) {
            for (std::size_t u = 1; u < U; ++u) total[0][i][v] += total[u][i][v];
            save(total[0][i][v] * scale, scores + i * stride + v * width);
        }
    }
}

// How many vectors beside Q queries fill the registers, of which each pair takes two; a power of two, `most` at most.
constexpr std::size_t beside(std::size_t queries, std::size_t most) {
    std::size_t vectors = most;
    while (vectors > 1 && 2 * queries * vectors > registers * 3 / 4) vectors /= 2;
    return vectors;
}

// scores[i] = q . keys[i] / sqrt(head_dim), minus infinity beyond length.
template <std::size_t Q, typename Element>
void score(const float *q, const Element *keys, std::size_t head_dim, std::size_t length, float *scores,
           std::size_t stride) {
    constexpr std::size_t together = 4 * lanes, V = beside(Q, 4);
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    const std::size_t end = padded(length), whole = end / together * together;
    const auto at = [&](std::size_t i) { return keys + i / lanes * lanes * head_dim + i % lanes; };
    std::size_t i = 0;
    for (; i < whole; i += V * width) score_tile<Q, V, 2>(q, at(i), head_dim, scale, scores + i, stride);
    for (; i < end; i += width) {
        for (std::size_t k = 0; k < Q; ++k) {
            score_tile<1, 1, 8>(q + k * head_dim, at(i), head_dim, scale, scores + k * stride + i, stride);
        }
    }
    for (std::size_t k = 0; k < Q; ++k) {
        for (i = length; i < end; ++i) scores[k * stride + i] = -std::numeric_limits<float>::infinity();
    }
}

// Scores become weights, e to their distance from the largest; returns what the weights are to be multiplied by.
inline float soften(float *scores, std::size_t length) {
    Vector most = load(scores), total = {};
    for (std::size_t i = width; i < padded(length); i += width) {
        const Vector s = load(scores + i);
        most = s > most ? s : most;
    }
    const float largest = maximum(most);
    for (std::size_t i = 0; i < padded(length); i += width) {
        const Vector e = exponential(load(scores + i) - largest);
        total += e;
        save(e, scores + i);
    }
    return 1.0F / sum(total);
}

// For Q queries out[0 .. V * width) = norm * sum_i weights[i] * values[i, 0 .. V * width), two positions at a time.
template <std::size_t Q, std::size_t V, typename Element>
void mix_columns(const float *weights, std::size_t weights_stride, const Element *values, std::size_t stride,
                 std::size_t length, const float *norm, float *out, std::size_t out_stride) {
    Vector total[2][Q][V] = {};
    const auto add = [&](std::size_t i, std::size_t u) {
        Vector value[V];
        for (std::size_t v = 0; v < V; ++v) value[v] = load(values + i * stride + v * width);
        for (std::size_t k = 0; k < Q; ++k) {
            for (std::size_t v = 0; v < V; ++v) total[u][k][v] += weights[k * weights_stride + i] * value[v];
        }
    };
    std::size_t i = 0;
    for (; i + 2 <= length; i += 2) {
        add(i, 0);
        add(i + 1, 1);
    }
    if (i < length) add(i, 0);
    for (std::size_t k = 0; k < Q; ++k) {
        for (std::size_t v = 0; v < V; ++v) {
            save((total[0][k][v] + total[1][k][v]) * norm[k], out + k * out_stride + v * width);
        }
    }
}

// out[d] = norm * sum_i weights[i] * values[i, d]
template <std::size_t Q, typename Element>
void mix(const float *weights, std::size_t weights_stride, const Element *values, std::size_t head_dim,
         std::size_t length, const float *norm, float *out) {
    constexpr std::size_t V = beside(Q, 4);
    const std::size_t stride = padded(head_dim);
    std::size_t d = 0;
    for (; d + V * width <= head_dim; d += V * width) {
        mix_columns<Q, V>(weights, weights_stride, values + d, stride, length, norm, out + d, head_dim);
    }
    for (; d < head_dim; d += width) {
        float last[Q * width];
        mix_columns<Q, 1>(weights, weights_stride, values + d, stride, length, norm, last, width);
        const std::size_t left = head_dim - d < width ? head_dim - d : width;
        for (std::size_t k = 0; k < Q; ++k) std::memcpy(out + k * head_dim + d, last + k * width, left * sizeof *out);
    }
}

template <std::size_t Q, typename Element>
void attend_together(const float *q, const HeadCache &cache, std::size_t head_dim, std::size_t length, float *scores,
                     float *out) {
    const std::size_t stride = padded(length);
    float norm[Q];
    score<Q>(q, static_cast<const Element *>(cache.keys), head_dim, length, scores, stride);
    for (std::size_t k = 0; k < Q; ++k) norm[k] = soften(scores + k * stride, length);
    mix<Q>(scores, stride, static_cast<const Element *>(cache.values), head_dim, length, norm, out);
}

// Q queries at a time, then the rest.
template <std::size_t Q, typename Element>
void attend_as(const float *q, std::size_t queries, const HeadCache &cache, std::size_t head_dim, std::size_t length,
               float *scores, float *out) {
    for (; queries >= Q; queries -= Q, q += Q * head_dim, out += Q * head_dim) {
        attend_together<Q, Element>(q, cache, head_dim, length, scores, out);
    }
    if constexpr (Q > 1) attend_as<Q - 1, Element>(q, queries, cache, head_dim, length, scores, out);
}

void attend(const float *q, std::size_t queries, const HeadCache &cache, std::size_t head_dim, std::size_t length,
            float *scores, float *out) {
    const auto run = cache.is_half ? attend_as<most_queries, std::uint16_t> : attend_as<most_queries, float>;
    run(q, queries, cache, head_dim, length, scores, out);
}

void store(const float *from, std::size_t size, bool is_half, std::size_t stride, void *to) {
    if (is_half) {
        auto *half = static_cast<std::uint16_t *>(to);
        for (std::size_t i = 0; i < size; ++i) half[i * stride] = to_half(from[i]);
    } else {
        auto *full = static_cast<float *>(to);
        for (std::size_t i = 0; i < size; ++i) full[i * stride] = from[i];
    }
}

constexpr VectorOps ops{rms_norm, swiglu, attend, store};

}  // namespace
}  // namespace irq

// Included by vector_ops_*.cpp, each compiled for one instruction set. Vectors are GCC/Clang extensions:
// sixteen floats, which the compiler maps to one, two or four registers.
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

typedef float Vector __attribute__((vector_size(64)));
typedef std::int32_t Integers __attribute__((vector_size(64)));

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
    float wide[lanes];
    _mm256_storeu_ps(wide, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
    _mm256_storeu_ps(wide + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8))));
    return load(wide);
#elif defined(__aarch64__)
    float wide[lanes];
    for (std::size_t i = 0; i < lanes; i += 4) {
        vst1q_f32(wide + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
    }
    return load(wide);
#else
    Vector v;
    for (std::size_t i = 0; i < lanes; ++i) v[i] = from_half(from[i]);
    return v;
#endif
}

inline float sum(const Vector &v) {
    float half[8];
    for (std::size_t i = 0; i < 8; ++i) half[i] = v[i] + v[i + 8];
    return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
}

inline float maximum(const Vector &v) {
    float most = v[0];
    for (std::size_t i = 1; i < lanes; ++i) most = v[i] > most ? v[i] : most;
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
    for (; i + lanes <= size; i += lanes) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; ++i) total += x[i] * x[i];
    const float root = std::sqrt(total / static_cast<float>(size) + eps);
    for (i = 0; i + lanes <= size; i += lanes) save(load(weight + i) * (load(x + i) / root), out + i);
    for (; i < size; ++i) out[i] = weight[i] * (x[i] / root);
}

inline Vector gated(const Vector &gate, const Vector &up) { return gate / (1.0F + exponential(-gate)) * up; }

void swiglu(float *gate, const float *up, std::size_t size) {
    std::size_t i = 0;
    for (; i + lanes <= size; i += lanes) save(gated(load(gate + i), load(up + i)), gate + i);
    if (i == size) return;
    float g[lanes] = {}, u[lanes] = {};
    std::memcpy(g, gate + i, (size - i) * sizeof *g);
    std::memcpy(u, up + i, (size - i) * sizeof *u);
    save(gated(load(g), load(u)), g);
    std::memcpy(gate + i, g, (size - i) * sizeof *g);
}

// Scores of T tiles of 16 positions side by side, by U dimensions at a time: T * U sums in flight hide the latency of
// addition.
template <std::size_t T, std::size_t U, typename Element>
void score_tiles(const float *q, const Element *keys, std::size_t head_dim, float scale, float *scores) {
    Vector total[U][T] = {};
    std::size_t d = 0;
    for (; d + U <= head_dim; d += U) {
        for (std::size_t u = 0; u < U; ++u) {
            const Element *of_dimension = keys + (d + u) * lanes;
            for (std::size_t t = 0; t < T; ++t) total[u][t] += q[d + u] * load(of_dimension + t * head_dim * lanes);
        }
    }
    for (; d < head_dim; ++d) {
        for (std::size_t t = 0; t < T; ++t) total[0][t] += q[d] * load(keys + (t * head_dim + d) * lanes);
    }
    for (std::size_t t = 0; t < T; ++t) {
        for (std::size_t u = 1; u < U; ++u) total[0][t] += total[u][t];
        save(total[0][t] * scale, scores + t * lanes);
    }
}

// scores[i] = q . keys[i] / sqrt(head_dim), minus infinity beyond length; returns the largest.
template <typename Element>
float score(const float *q, const Element *keys, std::size_t head_dim, std::size_t length, float *scores) {
    constexpr std::size_t together = 4;
    const float scale = 1.0F / std::sqrt(static_cast<float>(head_dim));
    const std::size_t end = padded(length);
    std::size_t i = 0;
    for (; i + together * lanes <= end; i += together * lanes) {
        score_tiles<together, 2>(q, keys + i * head_dim, head_dim, scale, scores + i);
    }
    for (; i < end; i += lanes) score_tiles<1, 8>(q, keys + i * head_dim, head_dim, scale, scores + i);
    for (i = length; i < end; ++i) scores[i] = -std::numeric_limits<float>::infinity();
    Vector most = load(scores);
    for (i = lanes; i < end; i += lanes) {
        const Vector s = load(scores + i);
        most = s > most ? s : most;
    }
    return maximum(most);
}

// out[0 .. V * 16) = norm * sum_i weights[i] * values[i, 0 .. V * 16), two positions at a time.
template <std::size_t V, typename Element>
void mix_columns(const float *weights, const Element *values, std::size_t stride, std::size_t length, float norm,
                 float *out) {
    Vector even[V] = {}, odd[V] = {};
    std::size_t i = 0;
    for (; i + 2 <= length; i += 2, values += 2 * stride) {
        for (std::size_t k = 0; k < V; ++k) even[k] += weights[i] * load(values + k * lanes);
        for (std::size_t k = 0; k < V; ++k) odd[k] += weights[i + 1] * load(values + stride + k * lanes);
    }
    if (i < length) {
        for (std::size_t k = 0; k < V; ++k) even[k] += weights[i] * load(values + k * lanes);
    }
    for (std::size_t k = 0; k < V; ++k) save((even[k] + odd[k]) * norm, out + k * lanes);
}

// out[d] = norm * sum_i weights[i] * values[i, d]
template <typename Element>
void mix(const float *weights, const Element *values, std::size_t head_dim, std::size_t length, float norm, float *out) {
    constexpr std::size_t wide = 4 * lanes;
    const std::size_t stride = padded(head_dim);
    std::size_t d = 0;
    for (; d + wide <= head_dim; d += wide) mix_columns<4>(weights, values + d, stride, length, norm, out + d);
    for (; d < head_dim; d += lanes) {
        float last[lanes];
        mix_columns<1>(weights, values + d, stride, length, norm, last);
        std::memcpy(out + d, last, (head_dim - d < lanes ? head_dim - d : lanes) * sizeof *out);
    }
}

template <typename Element>
void attend_as(const float *q, const HeadCache &cache, std::size_t head_dim, std::size_t length, float *scores,
               float *out) {
    const float most = score(q, static_cast<const Element *>(cache.keys), head_dim, length, scores);
    Vector total = {};
    for (std::size_t i = 0; i < length; i += lanes) {
        const Vector e = exponential(load(scores + i) - most);
        total += e;
        save(e, scores + i);
    }
    mix(scores, static_cast<const Element *>(cache.values), head_dim, length, 1.0F / sum(total), out);
}

void attend(const float *q, const HeadCache &cache, std::size_t head_dim, std::size_t length, float *scores,
            float *out) {
    const auto run = cache.is_half ? attend_as<std::uint16_t> : attend_as<float>;
    run(q, cache, head_dim, length, scores, out);
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

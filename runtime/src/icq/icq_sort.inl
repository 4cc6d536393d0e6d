// Part of icq.inl: registers of floats, and sorting a block a lane.
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace irq {
namespace {

// A register of floats (a GCC and Clang extension).
#if defined(__AVX512F__)
constexpr std::size_t lanes = 16;
#elif defined(__AVX2__)
constexpr std::size_t lanes = 8;
#else
constexpr std::size_t lanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * lanes)));
typedef std::int32_t Integers __attribute__((vector_size(4 * lanes)));

inline Vector load(const float *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void save(const Vector &v, float *to) { std::memcpy(to, &v, sizeof v); }

inline Vector all(float x) { return x - Vector{}; }

// How often the lanes of one vector are below those of another.
class Tally {
  public:
#if defined(__AVX512F__)
    void add_below(Vector a, Vector b) { count_ += __builtin_popcount(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)); }
    std::size_t count() const { return static_cast<std::size_t>(count_); }

  private:
    int count_ = 0;
#elif defined(__AVX2__)
    void add_below(Vector a, Vector b) { count_ += __builtin_popcount(mask(_mm256_cmp_ps(a, b, _CMP_LT_OQ))); }
    std::size_t count() const { return static_cast<std::size_t>(count_); }

  private:
    static unsigned mask(__m256 v) { return static_cast<unsigned>(_mm256_movemask_ps(v)); }
    int count_ = 0;
#else
    void add_below(Vector a, Vector b) { counts_ -= a < b; }
    std::size_t count() const {
        return static_cast<std::size_t>((counts_[0] + counts_[1]) + (counts_[2] + counts_[3]));
    }

  private:
    Integers counts_{};
#endif
};

struct Comparators {
    std::size_t count;
    std::uint8_t low[543], high[543];
};

// Batcher's odd-even merge sort of B values.
template <std::size_t B>
constexpr Comparators sorting_network() {
    Comparators network{};
    for (std::size_t p = 1; p < B; p *= 2) {
        for (std::size_t k = p; k > 0; k /= 2) {
            for (std::size_t j = k % p; j + k < B; j += 2 * k) {
                for (std::size_t i = j; i < j + k && i + k < B; ++i) {
                    if (i / (2 * p) != (i + k) / (2 * p)) continue;
                    network.low[network.count] = static_cast<std::uint8_t>(i);
                    network.high[network.count++] = static_cast<std::uint8_t>(i + k);
                }
            }
        }
    }
    return network;
}

// Sorted blocks.
template <std::size_t B>
struct Group {
    alignas(64) float sorted[lanes][B];
};

// Sorts n <= lanes blocks.
template <std::size_t B>
void sort(const float *blocks, std::size_t n, Group<B> &group) {
    static constexpr Comparators network = sorting_network<B>();
    alignas(64) float rows[B][lanes] = {};
    for (std::size_t lane = 0; lane < n; ++lane) {
        for (std::size_t j = 0; j < B; ++j) rows[j][lane] = blocks[lane * B + j];
    }
    for (std::size_t c = 0; c < network.count; ++c) {
        const Vector a = load(rows[network.low[c]]), b = load(rows[network.high[c]]);
        save(a < b ? a : b, rows[network.low[c]]);
        save(a < b ? b : a, rows[network.high[c]]);
    }
    for (std::size_t lane = 0; lane < n; ++lane) {
        for (std::size_t j = 0; j < B; ++j) group.sorted[lane][j] = rows[j][lane];
    }
}

}  // namespace
}  // namespace irq

// Searching, fitting and encoding blocks of weights: steps 1 to 7 of irq_export/icq_search.py, which defines
// them, and the codes of spec/irq-blocks.md. Bit-equal to both on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace irq {

inline constexpr std::size_t icq_max_candidates = 4096;

// A codebook of 2, 3 or 4 bits over blocks of 32 or 64 weights. Arrays belong to the caller.
struct IcqBook {
    std::size_t block_size;     // B
    std::size_t codes;          // 4, 8 or 16
    const float *levels;        // (codes,), ascending
    const float *midpoints;     // (codes - 1,), ascending
    std::size_t zero_code;      // code of every weight where the scale is zero
    float half_range;           // (codes - 1) / 2 for int-k, 0 for nf
    const std::int64_t *table;  // (B + 1,): fixed-point entropy of a count
};

struct IcqSearch {
    const float *factors;    // (candidates,), ascending
    std::size_t candidates;  // at most icq_max_candidates; 0: no search, the absolute maximum and offset 0
    bool by_entropy;         // else by squared error
    bool tie_first;          // of equally entropic candidates the first, else the least squared error
    bool refit;              // step 7
    bool with_tau;           // whether the file will hold an offset
};

struct IcqMeasure {
    std::int64_t entropy;  // of the codes, fixed point
    double error, norm;    // sums of (w - decoded)^2 and of w^2
};

// Scale and offset (n,) of blocks (n, B), finite and at most 2^125 in magnitude.
void icq_search(const IcqBook &book, const IcqSearch &search, const float *blocks, std::size_t n, float *scale,
                float *tau);

// Entropy of the codes at the absolute maximum and offset 0, summed over blocks.
std::int64_t icq_plain_entropy(const IcqBook &book, const float *blocks, std::size_t n);

// Codes of blocks at scale and offset (n,), packed, (n, B * bits / 8); and what they do to the weights.
IcqMeasure icq_encode(const IcqBook &book, const float *blocks, const float *scale, const float *tau, std::size_t n,
                      std::uint8_t *packed);

}  // namespace irq

// The exact ICQ search (irq_export/icq_search.py defines it, steps 1 to 6; bit-equal to it).
#pragma once

#include <cstddef>
#include <cstdint>

namespace irq {

// What is searched for. Arrays belong to the caller.
struct IcqSearch {
    std::size_t block_size;     // B: 32 or 64
    int codes;                  // levels of the codebook, 4, 8 or 16
    const float *levels;        // (codes,), ascending
    const float *midpoints;     // (codes - 1,)
    int zero_code;              // code of every weight where the scale is zero
    float half_range;           // (codes - 1) / 2 for int-k, 0 for nf
    const std::int64_t *table;  // (B + 1,): fixed-point entropy of a count
    const float *factors;       // (candidates,), ascending
    std::size_t candidates;
    bool by_entropy;  // else by squared error
    bool tie_first;   // of equally entropic candidates the first, else the least squared error
};

// Scale and offset (n,) of blocks (n, B), finite and at most 2^125 in magnitude.
void icq_search(const IcqSearch &search, const float *blocks, std::size_t n, float *scale, float *tau);

}  // namespace irq

// Where the codes of a block lie, as compile-time constants, and the loops over them every instruction
// set shares. Everything here has internal linkage (see float16.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float16.h"
#include "kernel_table.h"

namespace irq {
namespace {

// Bits per code, weights per block, bytes from block to block, bytes in front of the codes.
template <int Bits, int Block, int Stride, int Lead = 0>
struct Layout {
    static constexpr int bits = Bits, block = Block, stride = Stride, lead = Lead;
    // The specification adds tau even where it is 0 (which turns -0 into 0); int8, Q8_0 and Q4_0 have none.
    static constexpr bool adds_tau = Bits != 8 && Stride != 18;
};

// Calls visit(Layout<...>{}) with the layout of a block format. The switch stands outside every loop.
template <class Visit>
void with_layout(const Matrix &w, Visit &&visit) {
    switch (w.format) {
        case Format::q8_0: return visit(Layout<8, 32, 34, 2>{});
        case Format::q4_0: return visit(Layout<4, 32, 18, 2>{});
        case Format::q4_1: return visit(Layout<4, 32, 20, 4>{});
        default: break;
    }
    const bool wide = w.block_size == 64;
    switch (code_bits(w)) {
        case 8: return visit(Layout<8, 32, 32>{});
        case 4: return wide ? visit(Layout<4, 64, 32>{}) : visit(Layout<4, 32, 16>{});
        case 3: return wide ? visit(Layout<3, 64, 24>{}) : visit(Layout<3, 32, 12>{});
        default: return wide ? visit(Layout<2, 64, 16>{}) : visit(Layout<2, 32, 8>{});
    }
}

// The code of element j, one at a time.
template <class L>
unsigned code_at(const std::uint8_t *block, std::size_t j) {
    constexpr std::size_t size = L::block;
    const std::uint8_t *codes = block + L::lead;
    if constexpr (L::bits == 8) {
        return codes[j];
    } else if constexpr (L::bits == 4) {
        return (codes[j % (size / 2)] >> (4 * (j / (size / 2)))) & 15u;
    } else {
        const unsigned low = (codes[j % (size / 4)] >> (2 * (j / (size / 4)))) & 3u;
        if constexpr (L::bits == 2) return low;
        return low | ((codes[size / 4 + j / 8] >> (j % 8)) & 1u) << 2;
    }
}

inline float dq8_value(const BlockValues &v, std::size_t k) {
    const float mapped = irq_dynamic_map[static_cast<const std::uint8_t *>(v.values)[k]];
    const float value = mapped * v.absmax[k / IRQ_GROUP_SIZE] + v.offset;
    return v.round_to_f16 ? round_to_f16(value) : value;
}

// The effective value of block k, counted over the whole matrix.
inline float block_value(const BlockValues &v, std::size_t k) {
    const auto *bytes = static_cast<const std::uint8_t *>(v.values);
    switch (v.storage) {
        case Storage::none: return 0.0f;
        case Storage::f32: return load_as<float>(bytes + 4 * k);
        case Storage::f16: return load_f16(bytes + 2 * k);
        default: return dq8_value(v, k);
    }
}

inline float block_scale(const Matrix &w, const std::uint8_t *block, std::size_t k) {
    return w.format == Format::blocks ? block_value(w.scale, k) : load_f16(block);
}

inline float block_tau(const Matrix &w, const std::uint8_t *block, std::size_t k) {
    return w.format == Format::q4_1 ? load_f16(block + 2) : block_value(w.tau, k);
}

// Sums of the inputs that meet each block.
template <class L>
const float *block_sums(const TokenInput &in) {
    return L::block == span_size ? in.span_sum : in.sum;
}

// What is taken off the integer products of each block.
template <class L>
const std::int32_t *block_starts(const TokenInput &in) {
    return L::block == span_size ? in.span_start : in.start;
}

// What turns inputs into codes; 0, as for no input at all, where the quotient would overflow.
inline float code_rate(float largest, int largest_code) {
    return largest > 0x1p-110f ? static_cast<float>(largest_code) / largest : 0.0f;
}

// What of the offset of a table's codes is not taken off in integers: it joins tau.
inline float residual_offset(const ByteTable &table) {
    return table.offset + table.step * static_cast<float>(table.bias);
}

inline const std::uint8_t *row_data(const Matrix &w, std::size_t row) {
    return static_cast<const std::uint8_t *>(w.data) + row * w.row_bytes();
}

inline bool is_float(Format format) {
    return format == Format::f32 || format == Format::f16 || format == Format::bf16;
}

inline float float_at(Format format, const std::uint8_t *row, std::size_t i) {
    switch (format) {
        case Format::f32: return load_as<float>(row + 4 * i);
        case Format::f16: return load_f16(row + 2 * i);
        default: return float_of_bf16(load_as<std::uint16_t>(row + 2 * i));
    }
}

// For a span whose sum is not finite: every fast product with it is NaN. A fuzzer found the conversion of NaN to an
// integer that this avoids (a file may hold NaN weights).
inline void mark_not_finite(const TokenInput &out, std::size_t span) {
    std::memset(out.codes + span * span_size, 0, span_size * sizeof *out.codes);
    out.scale[span] = std::numeric_limits<float>::quiet_NaN();
}

inline void mark_not_finite_bytes(const TokenInput &out, bool for_gemv, std::size_t span) {
    const std::size_t size = for_gemv ? 2 * span_size : span_size;
    std::memset(out.bytes + span * size, 0, size);
    if (for_gemv) out.scale[span] = std::numeric_limits<float>::quiet_NaN();
    else out.scale[2 * span] = out.scale[2 * span + 1] = std::numeric_limits<float>::quiet_NaN();
    out.start[2 * span] = out.start[2 * span + 1] = out.span_start[span] = 0;
}

inline void store_to(float *y, float value, Store store) { *y = store == Store::add ? *y + value : value; }

}  // namespace
}  // namespace irq

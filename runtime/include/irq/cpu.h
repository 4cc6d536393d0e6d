// Which instruction set the kernels run on: chosen once, by what the processor has *and* what the
// operating system saves on a context switch (cpuid and XCR0). AMX is never used: virtual machines
// advertise it without granting it.
#pragma once

#include <cstdint>

namespace irq {

// avx2 means AVX2, FMA and F16C. avx512 means in addition F, BW, DQ, VL, VNNI and VBMI: Ice Lake,
// Zen 4 and later; older AVX-512 machines run avx2. neon means any AArch64, dotprod one with the dot-product
// extension: Cortex-A55, A76 and Neoverse N1 and later, Apple M1 and later; not the Cortex-A53 and A72.
// scalar8 is scalar too, with the 8-bit codes that avx512 and dotprod have in fast mode: what tests hold them to.
enum class Isa : std::uint8_t { scalar, scalar8, avx2, avx512, neon, dotprod };
inline constexpr Isa all_isas[] = {Isa::scalar, Isa::scalar8, Isa::avx2, Isa::avx512, Isa::neon, Isa::dotprod};

const char *isa_name(Isa isa);

// Finds "scalar", "scalar8", "avx2", "avx512", "neon" or "dotprod". Returns false for any other name.
bool isa_from_name(const char *name, Isa *isa);

// True if this build has kernels for `isa` and this machine can run them.
bool isa_supported(Isa isa);

// The set in use: the best supported, or what the environment variable IRQ_ISA names (ignored, with the
// best one in its place, if unknown or unsupported: `isa_request_refused`). Read once.
Isa active_isa();
bool isa_request_refused();

// Forces a set, for tests and benchmarks. Not to be called while kernels run. False if not supported.
bool set_active_isa(Isa isa);

}  // namespace irq

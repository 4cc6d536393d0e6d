#include "irq/cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace irq {
namespace {

constexpr const char *names[] = {"scalar", "scalar8", "avx2", "avx512", "neon", "dotprod"};

#if defined(__x86_64__)

struct Registers {
    unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
    Registers r{};
    __cpuid_count(leaf, subleaf, r.a, r.b, r.c, r.d);
    return r;
}

// Extended control register 0: the register files that the operating system saves. Only to be read where
// cpuid says OSXSAVE.
std::uint64_t xcr0() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t{high} << 32 | low;
}

constexpr bool all(std::uint64_t value, std::uint64_t bits) { return (value & bits) == bits; }
constexpr unsigned bit(int n) { return 1u << n; }

Isa best_isa() {
    if (cpuid(0).a < 7) return Isa::scalar;
    const Registers one = cpuid(1), seven = cpuid(7);
    const unsigned osxsave = bit(27), avx = bit(28), fma = bit(12), f16c = bit(29);
    if (!all(one.c, osxsave | avx | fma | f16c)) return Isa::scalar;
    const std::uint64_t saved = xcr0();
    const std::uint64_t ymm_state = 0x06, zmm_state = 0xe6;  // SSE, AVX; and opmask, ZMM_Hi256, Hi16_ZMM
    if (!all(saved, ymm_state) || !all(seven.b, bit(5))) return Isa::scalar;
    const unsigned f = bit(16), dq = bit(17), bw = bit(30), vl = bit(31);
    const unsigned vbmi = bit(1), vnni = bit(11);
    const bool avx512 = all(saved, zmm_state) && all(seven.b, f | dq | bw | vl) && all(seven.c, vbmi | vnni);
    return avx512 ? Isa::avx512 : Isa::avx2;
}

bool runs(Isa isa) { return isa == Isa::scalar8 || isa <= best_isa(); }  // each x86 set contains the ones before it

#elif defined(__aarch64__)

Isa best_isa() {
#if defined(__linux__)
    const unsigned long dot_product = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & dot_product) != 0 ? Isa::dotprod : Isa::neon;
#else
    return Isa::dotprod;  // every Apple M processor has it
#endif
}

bool runs(Isa isa) { return isa <= Isa::scalar8 || isa == Isa::neon || isa == best_isa(); }

#else

Isa best_isa() { return Isa::scalar; }
bool runs(Isa isa) { return isa <= Isa::scalar8; }

#endif

struct Choice {
    Isa isa;
    bool refused;
};

Choice choose() {
    const char *wanted = std::getenv("IRQ_ISA");
    if (wanted == nullptr || *wanted == '\0') return {best_isa(), false};
    Isa isa{};
    if (!isa_from_name(wanted, &isa) || !runs(isa)) return {best_isa(), true};
    return {isa, false};
}

Choice &choice() {
    static Choice chosen = choose();
    return chosen;
}

}  // namespace

const char *isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

bool isa_from_name(const char *name, Isa *isa) {
    for (const Isa one : all_isas) {
        if (std::strcmp(name, isa_name(one)) == 0) {
            *isa = one;
            return true;
        }
    }
    return false;
}

bool isa_supported(Isa isa) { return runs(isa); }

Isa active_isa() { return choice().isa; }

bool isa_request_refused() { return choice().refused; }

bool set_active_isa(Isa isa) {
    if (!runs(isa)) return false;
    choice() = {isa, false};
    return true;
}

}  // namespace irq

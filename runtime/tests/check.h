// What the tests of instruction sets count and report.
#pragma once

#include <cstdio>
#include <string>

#include "irq/cpu.h"

namespace {

int failures = 0, checks = 0;

void expect(bool good, const std::string &what) {
    ++checks;
    if (good) return;
    ++failures;
    std::fprintf(stderr, "FAILED %s on %s\n", what.c_str(), irq::isa_name(irq::active_isa()));
}

}  // namespace

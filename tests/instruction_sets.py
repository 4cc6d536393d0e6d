"""The sets of instructions that the native kernels may run; the fixture ``isa`` takes them in turn."""

from __future__ import annotations

ISAS = ("scalar", "scalar8", "avx2", "avx512", "neon", "dotprod")
BYTES = ("scalar8", "avx512", "dotprod")  # multiply bytes in fast mode, the others words

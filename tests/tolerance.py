"""Every tolerance of the tests, with its derivation. Where a claim is bit-exact there is none."""

from __future__ import annotations

__all__ = ["NMSE_FLOAT32", "NMSE_FLOAT64"]

#: reference (float64) against torch (float64), logits: mean squared difference over variance. Both sides
#: round at 1e-16 per operation; a few thousand operations deep that is below 1e-24. What is allowed for is
#: one float32 rounding of rotary angles and of folded adapters (6e-8 relative, squared 4e-15), amplified
#: by at most two orders through the layers: design.md section 6.
NMSE_FLOAT64 = 1e-12

#: float32 runtimes against torch float32, logits: summation order alone. Measured 1e-9..2e-10 on stock
#: llama.cpp (facts/gguf.md [M]); design.md section 6.
NMSE_FLOAT32 = 1e-9

"""The bounds that decide (design: one place, with the reason of each).

All are on the NMSE of log-probabilities, except where said otherwise.
"""

from __future__ import annotations

__all__ = [
    "FAST_NMSE",
    "FLOAT32_NMSE",
    "FLOAT64_NMSE",
    "KERNEL_RATIO",
    "LOAD_MEMORY_RATIO",
    "LOSSY_NMSE",
    "SESSION_BYTES",
]

#: numpy in float64 against torch in float64. Both round at 1e-16; what remains is the float32 rounding of
#: norms, rotary angles and folded adapters that transformers itself prescribes (6e-8 relative).
FLOAT64_NMSE = 1e-12

#: float32 runtimes against torch in float32: another order of summation. Stock llama.cpp measures 1e-9 to
#: 2e-10 on models of a few layers.
FLOAT32_NMSE = 1e-9

#: Kernels that round activations to 8 bits may be this much noisier, in NMSE and in KL, than stock
#: llama.cpp's own kernels are against its float32 evaluation of the same weights, in the same run. (Two
#: stock builds, AVX2 and AVX-512, differ from each other by NMSE 1.8e-3 on SmolLM2.)
KERNEL_RATIO = 1.5

#: Carriers that cannot hold the weights exactly (nf codes in Q8_0, f16 and bf16 merges) are stated as
#: lossy; this only catches a broken file. It is where llama.cpp's own check-nmse.py stops saying "good".
LOSSY_NMSE = 1e-2

#: The native engine's fast mode, where llama.cpp's noise on the same weights is not at hand. A product
#: rounds its inputs by 2.3e-5 of their power (127 steps of the largest of 32 normal numbers) and nf levels by
#: 1.1e-5; two products in a row make a branch of the residual stream, 7e-5. Later layers amplify: by 17 on
#: SmolLM2 (30 layers, 1.2e-3 measured); 70 is let pass.
FAST_NMSE = 5e-3

#: Memory that loading an ONNX model may take, times the bytes of its files: a second copy of the codes is
#: more (two of five parts of an nf4 file), the weights in float32 are six times as much.
LOAD_MEMORY_RATIO = 1.3

#: Below that size the ratio is not decided on: a session of onnxruntime takes some megabytes for any model.
SESSION_BYTES = 64 << 20

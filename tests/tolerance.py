"""Every tolerance of the tests, with its derivation. Where a claim is bit-exact there is none."""

from __future__ import annotations

__all__ = [
    "CALIBRATED_CODES",
    "DDP_GRADIENT",
    "FOLD_FLOAT32",
    "FOLD_FLOAT64",
    "FOLD_PEFT_LOGITS",
    "HALF_ROUNDOFF",
    "HALF_SMALLEST",
    "HEADER_SECONDS",
    "IMPORTANCE_BFLOAT16",
    "KERNEL_BYTES_NMSE",
    "KERNEL_EXACT_NMSE",
    "KERNEL_FAST_NMSE",
    "LINEAR_BFLOAT16",
    "LINEAR_FLOAT32",
    "LLAMACPP_FORCED_LOGPROB",
    "LOGLIKELIHOOD_FLOAT32",
    "LOGLIKELIHOOD_FLOAT64",
    "MALFORMED_MEMORY_BYTES",
    "MALFORMED_SECONDS",
    "NF_IN_Q8_0_NMSE",
    "NMSE_BITSANDBYTES",
    "NMSE_FAST_TINY",
    "NMSE_FLOAT16_TINY",
    "NMSE_FLOAT32",
    "NMSE_FLOAT64",
    "NMSE_SUM_ORDER",
    "ONNX_BODY_FLOAT16",
    "ONNX_BODY_RELATIVE",
    "SAMPLING_SIGMAS",
    "SERVED_LOGPROB",
    "SUM_ORDER_FLOAT32",
    "SUM_ORDER_FLOAT64",
    "UNIT_ROUNDOFF",
]

#: reference (float64) against torch (float64), logits: mean squared difference over variance. Both sides
#: round at 1e-16 per operation; a few thousand operations deep that is below 1e-24. What is allowed for is
#: one float32 rounding of rotary angles and of folded adapters (6e-8 relative, squared 4e-15), amplified
#: by at most two orders through the layers: design.md section 6.
NMSE_FLOAT64 = 1e-12

#: float32 runtimes against torch float32, logits: summation order alone. Measured 1e-9..2e-10 on stock
#: llama.cpp (facts/gguf.md [M]); design.md section 6.
NMSE_FLOAT32 = 1e-9

#: next_token_logprobs against the renormalised whole distribution, 259 tokens: llama.cpp sums the softmax in
#: float32, 259 * 2^-24 = 1.5e-5 at most in the logarithm. Measured 4e-6.
LLAMACPP_FORCED_LOGPROB = 2e-5

#: Folded against unfolded adapter in float64, relative to the largest element: sums of a few thousand terms
#: round at 1.1e-16·sqrt(n). Measured 6e-16 at in = 4096 and 1e-15 over hypothesis' shapes.
FOLD_FLOAT64 = 1e-13

#: The same with A and B rounded once to float32 (6e-8 relative each); half an ulp per factor, two factors.
FOLD_FLOAT32 = 2.5e-7

#: Logits of a tiny model with the folded adapter in stock PEFT, float32, against our unfolded module:
#: largest difference over largest logit; float32 summation order through two layers. Measured
#: 5e-7..1.1e-6.
FOLD_PEFT_LOGITS = 5e-6

#: The same float64 arithmetic with sums in another order (stepping through a cache against one pass): an
#: error of 1e-16 per operation, squared, times 1e4 operations in a row and 1e2 of amplification.
NMSE_SUM_ORDER = 1e-26

#: What a malformed file may cost before it is refused (design.md section 6, facts/peers-style.md D.5).
MALFORMED_SECONDS = 1.0
MALFORMED_MEMORY_BYTES = 64 << 20

#: Counts of sampled tokens: 6 binomial standard deviations fail by chance once in 5e8 per token.
SAMPLING_SIGMAS = 6.0

#: Opening a file with a 49152-token vocabulary and its merges, CPU time. Measured 0.08 s on one core.
HEADER_SECONDS = 1.0

#: nf codebooks in Q8_0 (repack.NF_TABLES): squared error over sum of squares, tau left out. Expectation over
#: blocks of 64 normal weights with the best step: 2.17e-5, 6.98e-6, 6.5e-9; the step in fp16 (2^-11 at most,
#: uniform, more where it is subnormal) adds up to 5e-7. Measured 2.22e-5, 7.5e-6, 5e-8.
NF_IN_Q8_0_NMSE = {"nf4": 2.4e-5, "nf3": 8.2e-6, "nf2": 5e-7}

#: Half the distance from 1 to the next float32. A float32 sum of n products is off by at most (n + few) * u *
#: sum |terms| (Higham, Accuracy and Stability, section 3.1); "few" covers scale, tau and block sum.
UNIT_ROUNDOFF = 2.0**-24

#: Exact kernels, output against float64: a float32 sum of m terms of random sign, one after the other, has a
#: relative mean square error of about m * u^2 / 3. The longest chain is the scalar kernel's: 64 in a block,
#: then up to 1031 blocks, 1100 * 1.2e-15 = 1.3e-12 / 3 = 4e-13.
KERNEL_EXACT_NMSE = 1e-12

#: Fast kernels on Gaussian inputs: codes of up to 2047 in groups of 64 have step d = max / 2047 and error
#: d^2 / 12; for 64 normal values E[max^2] = 6.5, so 6.5 / 2047^2 / 12 = 1.3e-7. The 15-bit normal-float table
#: adds (1 / 16383)^2 / 12 = 3e-10 over a mean square level of 0.13 (0.3 for uniform codes): 2e-9. Three times
#: that, for one input of 600 columns against 71 rows scatters by up to a factor of 2 (measured 2.4e-7).
KERNEL_FAST_NMSE = 4e-7

#: The same where bytes are multiplied (avx512, dotprod, scalar8). Inputs, gemm: step d = max / 127 in groups
#: of 32, d^2 / 12; for 32 normal values E[max^2] = 5.2, so 5.2 / 127^2 / 12 = 2.7e-5. gemv: groups of 64, a
#: step 256 times smaller, 5.1e-10; and avx512 takes 128 times the inputs off in float32, up to a hundred
#: times what is left (nf2, int2): (100 * 2^-24)^2 = 4e-11; dotprod, whose codes are signed, has nothing to
#: take off. Table: 1.1e-5 of the weights (src/kernels/matrix.cpp), with uniformly random codes up to half as
#: much again. Twice that for scatter, as above.
KERNEL_BYTES_NMSE = {"gemm": 2 * 2.7e-5, "gemv": 2 * 5.5e-10, "table": 2 * 1.7e-5}

#: Engine in fast mode against exact, logits of a tiny model. Words: 1.3e-7 a product (KERNEL_FAST_NMSE), ten
#: in a row, a factor 3 of amplification: 4e-6. Bytes: 2.8e-5 and nf 1.1e-5 a product, by the same factors:
#: 1.2e-3.
NMSE_FAST_TINY = {"words": 5e-6, "bytes": 1.2e-3}

#: Log-likelihood of one token of a tiny model, batched or cached against alone. float64: transformers takes
#: cos and sin in float32, whose last place (6e-8) depends on where a position falls in a vector register;
#: logits of order 10 amplify it. Measured 1e-7. float32: all of it at 6e-8, and llama.cpp's softmax
#: (LLAMACPP_FORCED_LOGPROB).
LOGLIKELIHOOD_FLOAT64 = 2e-6
LOGLIKELIHOOD_FLOAT32 = 5e-5

#: Gradients of two processes against one, float32, relative to the largest of a tensor: the same products,
#: summed over half the batch each and then added; 2^-24 per operation, sums of a few hundred tokens, four
#: layers deep (each amplifies by its norm): a few 1e-6. A wrong weighting of the halves shows at 1e-1.
DDP_GRADIENT = 1e-4

#: Rounding a result to float16: half a unit in the last place, 2^-11 of its magnitude, or, where it is
#: denormal, half of 2^-24.
HALF_ROUNDOFF = 2.0**-11
HALF_SMALLEST = 2.0**-25

#: transformers' bitsandbytes forward with PEFT's adapter (torch, float32) against the exported file in the
#: engine (float32), a tiny model of two layers: the weights are bit-equal, the order of sums differs. A sum
#: of n <= 192 terms errs by n * 2^-48 / 3 of its power, 2.3e-13; ten products in a row, amplified by ten at
#: most in norms and softmax: 2.3e-11, doubled. Measured 6.6e-13; bitsandbytes' bfloat16 kernel is at 1.3e-4.
NMSE_BITSANDBYTES = 5e-11

#: A layer and its gradients against another order of the same sums, or float64, relative to the norm: float32
#: sums of n terms of random sign err by about sqrt(n) * u, sqrt(1e4) * 6e-8 = 6e-6, and seldom so much.
LINEAR_FLOAT32 = 1e-5

#: The same with operands and results in bfloat16: each rounds by 2^-9 / sqrt(3) = 1.1e-3 of its norm. Weight,
#: input, branch matrices, hidden and result are six; a gradient passes them twice: sqrt(12) * 1.1e-3 = 4e-3.
#: What is allowed for is that a gradient of a beta is one number, whose terms cancel: five times that.
LINEAR_BFLOAT16 = 2e-2

#: Two orders of one sum, relative to the sum of magnitudes: log2(n) * u in a tree, 20 * 6e-8 = 1.2e-6 at most
#: for a million terms and the square root of that with random signs. In float64 likewise, with a thousandfold
#: margin.
SUM_ORDER_FLOAT32 = 1e-6
SUM_ORDER_FLOAT64 = 1e-12

#: A function body of domain irq against float64, relative 2-norm: float32 sums of K = 192 products and of
#: their block sums, sqrt(192) * 2^-24 = 8e-7. Measured 4e-8..4e-7 on onnxruntime 1.20, 1.24 and 1.31.
ONNX_BODY_RELATIVE = 1e-6

#: The same in float16, K = 192: inputs exact, tau rounded (2^-11), sums and result rounded to float16 once
#: or, in kernels that accumulate in float16, sqrt(192) * 2^-11 = 7e-3 at worst. Measured 4e-4..2e-3.
ONNX_BODY_FLOAT16 = 5e-3

#: An ONNX model in float16 against torch float32, logits of a tiny model: 2^-11 relative a rounding, squared
#: and over 3: 8e-8 each; some 30 in a row, a factor 10 of amplification. Measured 1e-6.
NMSE_FLOAT16_TINY = 2.5e-5

#: Mean squares of a layer's inputs, measured in bf16 on a GPU against float32 on a CPU: sum of the errors,
#: of the sum. Activations carry a few roundings of 2^-9 a layer, squares twice that: about 1e-2 four layers
#: deep (measured on a CPU in bf16: 9e-3).
IMPORTANCE_BFLOAT16 = 3e-2

#: Share of equal codes of a fit to the same importance on two devices: sums in another order differ by 1e-7,
#: which stores another index for a scale or an offset in about one block of 1e-7 * 2^8 / 2^-9 = 1e-2 at most;
#: there a step of 2^-7 of the scale moves few of the codes.
CALIBRATED_CODES = 0.999

#: A log probability of the server, which reads prompts in chunks, against that of the whole text at once:
#: sums of float32 in another order. A logit below 32 is rounded to 2e-6; ten times that. Measured 2e-6.
SERVED_LOGPROB = 2e-5

#: Keys and values in fp16 against float32, logits of a tiny model: rounding by up to 2^-11, uniform, squared
#: 2^-22 / 3 = 8e-8 for keys and values each, a factor 3 of amplification (NMSE_FAST_TINY): 5e-7. Twice that.
NMSE_HALF_CACHE = 1e-6

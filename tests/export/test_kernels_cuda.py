"""The Triton kernels equal the torch code bit for bit; they need an NVIDIA GPU."""

from __future__ import annotations

from math import gcd
from unittest import mock

import numpy as np
import pytest
import torch
from icq_oracle import in_torch
from tiny_checkpoints import random_block_tensor
from tolerance import LINEAR_BFLOAT16, LINEAR_FLOAT32, SUM_ORDER_FLOAT32, SUM_ORDER_FLOAT64

from irq_export import kernels
from irq_export.block_iec import block_iec_linear
from irq_export.block_linear import _decode as decode
from irq_export.block_modules import IrqEmbedding, IrqLinear
from irq_export.elastic import Elastic, elastic_gradients, elastic_weight, elastic_weights
from irq_export.icq import quantize_tensor
from irq_export.icq_search import SearchConfig, _book, _refit, _search
from irq_formats.blocks import BlockSpec, BlockTensor

if not torch.cuda.is_available():
    pytest.skip("the Triton kernels need CUDA, and there is none here", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch, in the first backward pass
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning"),  # torch.compile
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # the same
]

CUDA = torch.device("cuda")
#: name: what to search, and whether the file holds an offset
SEARCHES = {
    "default": (SearchConfig(), True),
    "no-tau": (SearchConfig(), False),
    "paper": (SearchConfig(refine="none"), True),
    "first": (SearchConfig(tie="first", refine="none"), True),
    "mse": (SearchConfig(objective="mse", tau_steps=20), True),
    "wide": (SearchConfig(tau_range=0.5, tau_steps=7), True),
    "many": (SearchConfig(tau_steps=160), True),
}
SPECS = [
    BlockSpec(codebook, block_size, scale, tau, rounding)
    for codebook in ("nf4", "nf3", "nf2", "int4", "int3", "int2")
    for block_size in (64, 32)
    for scale, tau, rounding in (
        ("dq8", "dq8", "fp16"),
        ("dq8", "dq8", "none"),
        ("dq8", "none", "none"),
        ("f16", "f16", "fp16"),
        ("f32", "f32", "fp16"),
        ("f16", "none", "fp16"),
    )
] + [BlockSpec("int8", 32, "f16", "none")]


def awkward_blocks(block_size: int, count: int = 4000) -> torch.Tensor:
    """Gaussian, heavy-tailed, constant, zero, rounded, huge, denormal and one-sided blocks, f32 (n, B)."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randn(count, block_size, generator=generator) * 0.02
    blocks[:100] /= torch.rand(100, block_size, generator=generator) + 1e-3
    blocks[100:110] = 0
    blocks[110:120] = 0.37
    blocks[120:180] = (blocks[120:180] * 100).round() / 100
    blocks[180:190, 5] = 1e30
    blocks[190:200] *= 1e-37
    blocks[200:220] = -blocks[200:220].abs()
    blocks[220:240] = (blocks[220:240] * 500).round() * 2.0**-149
    blocks[240:260] = blocks[240:260] * 1e-3 + 5
    blocks[260:280, ::2] = -0.0
    blocks[280:300] = blocks[280:300].bfloat16().float()
    return blocks


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().view(torch.uint8).numpy()


@pytest.mark.parametrize(("search", "with_tau"), SEARCHES.values(), ids=list(SEARCHES))
@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("codebook", ["nf4", "nf3", "nf2", "int4", "int3", "int2"])
def test_search_equals_torch(codebook: str, block_size: int, search: SearchConfig, with_tau: bool) -> None:
    from irq_export.kernels.icq import search as on_gpu

    for device in (torch.device("cpu"), CUDA):
        blocks = awkward_blocks(block_size, 1000 if device.type == "cpu" else 4000).to(device)
        book = _book(codebook, block_size, device)
        expected = _search(blocks, search, book, pairs_at_once=1 << 16)
        if search.refine == "ls":
            expected = _refit(blocks, *expected, book, with_tau)
        found = on_gpu(blocks.to(CUDA), codebook, search, with_tau=with_tau)
        for name, a, b in zip(("scale", "tau"), found, expected, strict=True):
            np.testing.assert_array_equal(a.cpu().numpy(), b.cpu().numpy(), err_msg=f"{name} {device}")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17])
def test_any_number_of_blocks(count: int) -> None:
    from irq_export.kernels.icq import search as on_gpu

    blocks = awkward_blocks(64)[:count].to(CUDA)
    scale, tau = on_gpu(blocks, "nf4", SearchConfig(), with_tau=True)
    whole = on_gpu(awkward_blocks(64).to(CUDA), "nf4", SearchConfig(), with_tau=True)
    assert torch.equal(scale, whole[0][:count])
    assert torch.equal(tau, whole[1][:count])


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.to_dict().values())))
def test_decoding_equals_torch_and_the_specification(spec: BlockSpec) -> None:
    tensor = random_block_tensor(spec, (37, 1984))  # a last group of scales and a last program that are short
    rng = np.random.default_rng(0)
    parts = {
        name: rng.integers(0, 256, part.shape, dtype=np.uint8) if part.dtype == np.uint8 else part
        for name, part in tensor.parts.items()
    }
    tensor = BlockTensor(spec, tensor.shape, parts)
    module = IrqLinear(spec, 1984, 37)
    module.load_block(tensor)
    stored = module.parts()
    on_gpu = module.to(CUDA).parts()
    assert kernels.available(CUDA)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        np.testing.assert_array_equal(bits(decode(on_gpu, dtype)), bits(decode(stored, dtype)))
    np.testing.assert_array_equal(decode(on_gpu, torch.float32).cpu().numpy(), tensor.dequantize())
    assert decode(on_gpu, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("spec", [BlockSpec("nf4", 32), BlockSpec("int8", 32, "f16", "none")])
def test_embedding_decodes_its_rows(spec: BlockSpec) -> None:
    module = IrqEmbedding(spec, 50, 64)
    module.load_block(random_block_tensor(spec, (50, 64)))
    ids = torch.tensor([[3, 49], [0, 3]])
    expected = module(ids)
    module.to(CUDA)
    assert torch.equal(module(ids.to(CUDA)).cpu(), expected)
    assert module(ids[:0].to(CUDA)).shape == (0, 2, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_and_its_gradients(dtype: torch.dtype) -> None:
    """Against float64 on the decoded weight; bf16 rounds results and operands at 2^-9."""
    spec = BlockSpec()
    module = IrqLinear(spec, 256, 192)
    module.load_block(random_block_tensor(spec, (192, 256)))
    module.to(CUDA)
    torch.manual_seed(0)
    make = lambda *shape: torch.rand(*shape, device=CUDA).to(dtype).requires_grad_()  # noqa: E731
    inputs = make(3, 5, 256), make(16, 256), make(192, 16), make(1), make(1)
    y = block_iec_linear(inputs[0], module.parts(), None, *inputs[1:], 0.3, dtype)
    target = torch.rand_like(y)  # nothing cancels in the gradient of a beta
    y.backward(target)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    x, a, b, beta1, beta2 = wide
    hidden = x @ elastic_weight(a, beta1).T
    exact = x @ module.dequantize().double().T + hidden @ elastic_weight(b, beta2, scaling=0.3).T
    exact.backward(target.double())
    limit = LINEAR_BFLOAT16 if dtype == torch.bfloat16 else LINEAR_FLOAT32
    for found, want in ((y, exact), *((t.grad, w.grad) for t, w in zip(inputs, wide, strict=True))):
        assert (found.double() - want).norm() <= limit * want.norm()


def test_compiled_layer_decodes_with_the_kernel() -> None:
    spec = BlockSpec()
    module = IrqLinear(spec, 256, 192)
    module.load_block(random_block_tensor(spec, (192, 256)))
    module.to(CUDA)
    x = torch.randn(8, 256, device=CUDA, requires_grad=True)
    module(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.compile(module, fullgraph=True)(x).square().sum().backward()
    assert (x.grad - expected).norm() <= LINEAR_FLOAT32 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 4096), (64, 11008), (11008, 64), (12, 128), (5, 7), (6, 6)])
def test_elastic_weight_equals_torch(shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, device=CUDA).to(stored).requires_grad_()
    beta = torch.tensor([0.37], device=CUDA).to(stored).requires_grad_()
    target = torch.randn(shape, device=CUDA).to(dtype)
    results = []
    for enabled in (True, False):
        with mock.patch.object(kernels, "available", return_value=enabled):
            total = elastic_weight(weight, beta, scaling=0.3, dtype=dtype)
            results.append((total, *torch.autograd.grad(total, (weight, beta), target)))
    (total, grad_weight, grad_beta), expected = results
    assert torch.equal(total, expected[0])
    assert torch.equal(grad_weight, expected[1])
    magnitudes = target.float().abs().sum() * gcd(*shape) / shape[1]
    rounding = SUM_ORDER_FLOAT32 * magnitudes + torch.finfo(stored).eps * expected[2].abs().float()
    assert (grad_beta.float() - expected[2].float()).abs() <= rounding


def test_elastic_weights_share_a_launch() -> None:
    """A and B at once are what each is alone."""
    matrices = [
        Elastic(torch.randn(shape, device=CUDA), torch.tensor([0.7], device=CUDA), scaling)
        for shape, scaling in (((64, 576), 1.0), ((1536, 64), 0.25))
    ]
    alone = [elastic_weights([matrix], torch.bfloat16)[0] for matrix in matrices]
    assert all(map(torch.equal, elastic_weights(matrices, torch.bfloat16), alone))
    scalings = [matrix.scaling for matrix in matrices]
    found = elastic_gradients(alone, scalings, torch.float32)
    for ours, grad, scaling in zip(found, alone, scalings, strict=True):
        (expected,) = elastic_gradients([grad], [scaling], torch.float32)
        assert torch.equal(ours[0], expected[0])
        assert (ours[1] - expected[1]).abs() <= SUM_ORDER_FLOAT32 * grad.float().abs().sum()


@pytest.mark.parametrize("codebook", ["nf4", "nf3", "nf2", "int4", "int3", "int2"])
def test_quantising_on_cuda_equals_the_cpu(codebook: str) -> None:
    weight = awkward_blocks(64, 960).reshape(-1, 128).clamp(-1e3, 1e3)
    spec = BlockSpec(codebook)
    on_gpu = quantize_tensor(weight.to(CUDA), spec)
    with in_torch():
        on_cpu = quantize_tensor(weight, spec)
    for name, part in on_cpu.block.parts.items():
        np.testing.assert_array_equal(on_gpu.block.parts[name], part, err_msg=name)
    assert on_gpu.entropy_after == on_cpu.entropy_after
    assert on_gpu.entropy_before == on_cpu.entropy_before
    assert on_gpu.rel_mse == pytest.approx(on_cpu.rel_mse, rel=SUM_ORDER_FLOAT64)

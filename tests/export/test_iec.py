"""IEC as a torch module: equal to the numpy specification, trainable, attachable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, tiny_tokens
from tolerance import FOLD_FLOAT64, FOLD_PEFT_LOGITS
from torch import nn

from irq_export.iec import IecLinear, add_elastic, attach, detach, elastic_weight, extract, random_adapter
from irq_formats.adapter import Adapter, LoraLayer, branch, delta_weight, elastic, fold, random_layer
from irq_formats.errors import UsageError, WrongBase

SHAPES = [
    (64, 64, 8),
    (192, 128, 12),
    (33, 20, 6),
    (7, 11, 5),
]  # out, in, rank; from the second on r ∤ in


def make(n_out: int, n_in: int, rank: int, **options: float) -> tuple[IecLinear, LoraLayer]:
    """A float64 module with random contents and the stored layer it came from."""
    layer = random_layer((n_out, n_in), 10.0, np.random.default_rng(n_in), rank=rank, beta=0.5)
    module = IecLinear(nn.Linear(n_in, n_out).double(), rank, dtype=torch.float64, **options)
    module.load_layer(layer)
    return module, layer


def wide(layer: LoraLayer) -> LoraLayer:
    return replace(layer, lora_a=layer.lora_a.astype(np.float64), lora_b=layer.lora_b.astype(np.float64))


@pytest.mark.parametrize(("n", "m"), [(12, 4), (4, 12), (12, 8), (5, 7), (6, 6)])
def test_elastic_equals_numpy(n: int, m: int):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    y = torch.randn(2, 3, m, dtype=torch.float64)
    got = add_elastic(y, x, torch.tensor([0.7], dtype=torch.float64))
    np.testing.assert_allclose(got, y.numpy() + 0.7 * elastic(x.numpy(), m), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (64, 8), (12, 128), (6, 20), (5, 7), (6, 6)])
def test_elastic_weight_is_the_elastic_connection(rows: int, columns: int):
    weight = torch.randn(rows, columns, dtype=torch.float64)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    beta = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    got = nn.functional.linear(x, elastic_weight(weight, beta))
    want = add_elastic(nn.functional.linear(x, weight), x, beta)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    transposed = weight.T.contiguous().T  # other strides, same values
    assert torch.equal(elastic_weight(transposed, beta), elastic_weight(weight, beta))
    assert torch.autograd.gradcheck(elastic_weight, (weight.requires_grad_(), beta))


@pytest.mark.parametrize("shape", [(64, 11008), (16, 1536), (14336, 16)])
def test_adapters_in_bf16_are_rounded_once(shape: tuple[int, int]):
    """The elastic connection is added in float32, as the Triton kernels add it; its gradients likewise."""
    torch.manual_seed(0)
    weight = (torch.randn(shape) * 0.01).bfloat16().requires_grad_()
    beta = torch.tensor([0.37]).bfloat16().requires_grad_()
    wide = [t.detach().float().requires_grad_() for t in (weight, beta)]
    found, want = elastic_weight(weight, beta, scaling=0.3), elastic_weight(*wide, scaling=0.3)
    assert torch.equal(found, want.bfloat16())
    target = torch.randn(shape).bfloat16()
    found.backward(target)
    want.backward(target.float())
    for ours, exact in zip((weight, beta), wide, strict=True):
        assert torch.equal(ours.grad, exact.grad.bfloat16())


@pytest.mark.parametrize(("n_out", "n_in", "rank"), SHAPES)
def test_forward_equals_numpy_and_fold(n_out: int, n_in: int, rank: int):
    module, layer = make(n_out, n_in, rank)
    x = torch.randn(2, 5, n_in, dtype=torch.float64)
    with torch.no_grad():
        base = module.base(x).numpy()
        added = module(x).numpy() - base
    scale = np.abs(added).max() + np.abs(base).max()  # the subtraction rounds at the size of the base
    assert np.abs(added - branch(wide(layer), x.numpy())).max() < FOLD_FLOAT64 * scale
    assert np.abs(added - branch(fold(wide(layer)), x.numpy())).max() < FOLD_FLOAT64 * scale
    assert np.abs(added - x.numpy() @ delta_weight(layer).T).max() < FOLD_FLOAT64 * scale
    plain = replace(wide(layer), beta1=0.0, beta2=0.0)
    assert np.abs(added - branch(plain, x.numpy())).max() > 1e-3 * np.abs(added).max()


@pytest.mark.parametrize(("n_out", "n_in", "rank"), SHAPES)
def test_gradients(n_out: int, n_in: int, rank: int):
    module, _ = make(n_out, n_in, rank)
    x = torch.randn(2, n_in, dtype=torch.float64, requires_grad=True)
    names = ["beta1", "beta2", "lora_a", "lora_b"]

    def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [getattr(module, name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(forward, (x, *inputs))


def test_fresh_layer_computes_its_base_and_learns_its_betas():
    torch.manual_seed(0)
    base = nn.Linear(32, 48)
    module = IecLinear(base, 8, scaling=0.25)
    x = torch.randn(4, 32)
    assert torch.equal(module(x), base(x))
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trainable == {"lora_a", "lora_b", "beta1", "beta2"}
    module(x).sum().backward()
    assert base.weight.grad is None
    assert module.beta2.grad is not None
    assert module.beta2.grad.abs() > 0  # B = 0 blocks beta1 and A at first, beta2 learns at once
    with torch.no_grad():
        module.beta2.fill_(0.1)
    module(x).sum().backward()
    assert module.beta1.grad.abs() > 0


def test_dropout_spares_the_elastic_connection():
    module = IecLinear(nn.Linear(16, 16), 4, dropout=1.0)  # everything dropped
    with torch.no_grad():
        module.lora_b.normal_()
        module.beta1.fill_(0.5)
        module.beta2.fill_(-0.25)
    x = torch.randn(3, 16)
    module.train()
    without_a = replace(module.to_layer(), lora_a=np.zeros((4, 16), np.float32))
    want = branch(without_a, x.numpy())
    np.testing.assert_allclose((module(x) - module.base(x)).detach(), want, rtol=1e-5, atol=1e-6)
    module.eval()
    assert not np.allclose((module(x) - module.base(x)).detach(), want, atol=1e-3)


def test_half_precision_base_keeps_a_float32_branch():
    module = IecLinear(nn.Linear(16, 24).bfloat16(), 4)
    assert module.lora_a.dtype == torch.float32
    assert module(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_attach_extract_detach():
    model = tiny_model()
    tokens = tiny_tokens(model)
    want = random_adapter(model, rank=12, seed=3, base_hash="cd" * 32)
    with torch.no_grad():
        plain = model(tokens).logits
        assert attach(model, want) == list(want.layers)
        adapted = model(tokens).logits
        got = extract(model, base_hash="cd" * 32)
        assert len(detach(model)) == len(want.layers) == 14
        assert torch.equal(model(tokens).logits, plain)
    assert (adapted - plain).abs().max() > 0.1
    assert got.base_hash == want.base_hash
    for name, layer in want.layers.items():
        np.testing.assert_array_equal(got.layers[name].lora_a, layer.lora_a)
        np.testing.assert_array_equal(got.layers[name].lora_b, layer.lora_b)
        assert got.layers[name] == replace(
            layer, lora_a=got.layers[name].lora_a, lora_b=got.layers[name].lora_b
        )
    # the same function by adding the merged weight
    with torch.no_grad():
        for name, layer in want.layers.items():
            model.get_submodule(name).weight += torch.from_numpy(delta_weight(layer)).float()
        merged = model(tokens).logits
    assert (merged - adapted).abs().max() / adapted.abs().max() < FOLD_PEFT_LOGITS


def test_random_adapter_is_seeded():
    first, second, other = (random_adapter(tiny_model(), seed=seed) for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj"
    assert "lm_head" not in first.layers
    np.testing.assert_array_equal(first.layers[name].lora_b, second.layers[name].lora_b)
    assert (first.layers[name].lora_b != other.layers[name].lora_b).any()
    weight = tiny_model().get_submodule(name).weight.detach().numpy()
    plain = delta_weight(replace(first.layers[name], beta1=0.0, beta2=0.0))
    assert np.linalg.norm(plain) == pytest.approx(0.03 * np.linalg.norm(weight), rel=1e-5)


def test_foreign_adapters_change_nothing():
    model = tiny_model()
    adapter = random_adapter(model)
    name, layer = next(iter(adapter.layers.items()))
    missing = Adapter({**adapter.layers, "model.layers.7.mlp.up_proj": layer})
    with pytest.raises(WrongBase, match="does not have"):
        attach(model, missing)
    wrong = Adapter({**adapter.layers, "model.layers.1.mlp.down_proj": layer})
    with pytest.raises(WrongBase, match="does not fit"):
        attach(model, wrong)
    with pytest.raises(UsageError, match="linear layer"):
        attach(model, Adapter({"model.norm": layer}))
    with pytest.raises(UsageError, match="no adapter"):
        extract(model)
    attach(model, adapter)
    with pytest.raises(UsageError, match="already"):
        attach(model, Adapter({name: layer}))
    with pytest.raises(UsageError, match="rank"):
        IecLinear(nn.Linear(4, 4), 0)

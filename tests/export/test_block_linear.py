"""The linear product over block-quantised weights: gradients, what it keeps, how it behaves in a trainer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_checkpoints import random_block_tensor
from tolerance import LINEAR_BFLOAT16, LINEAR_FLOAT32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from irq_export.block_iec import block_iec_linear
from irq_export.block_linear import block_linear
from irq_export.block_modules import IrqLinear
from irq_export.elastic import elastic_weight
from irq_export.iec import IecLinear
from irq_formats.blocks import BlockSpec

OUT, IN, RANK = 24, 128, 6


def base(spec: BlockSpec | None = None, *, bias: bool = False) -> IrqLinear:
    spec = spec or BlockSpec()
    module = IrqLinear(spec, IN, OUT, bias=bias)
    module.load_block(random_block_tensor(spec, (OUT, IN)))
    if module.bias is not None:
        nn.init.normal_(module.bias)
    return module


def adapted(**options: object) -> IecLinear:
    torch.manual_seed(0)
    module = IecLinear(base(**options), RANK, scaling=0.5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return module


def plain(module: IecLinear) -> IecLinear:
    """The same layer over an ordinary nn.Linear with the decoded weight."""
    block = module.base
    linear = nn.Linear(IN, OUT, bias=block.bias is not None)
    linear.weight = nn.Parameter(block.dequantize())
    if block.bias is not None:
        linear.bias = nn.Parameter(block.bias.detach().clone())
    twin = IecLinear(linear, RANK)
    twin.load_layer(module.to_layer())
    return twin


def gradients(module: nn.Module, x: Tensor, run=None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = (module if run is None else run)(x)
    (y.float() ** 2).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, IN), (2, 3, IN), (IN,)])
def test_gradcheck(shape: tuple[int, ...], bias: bool) -> None:
    parts = base(bias=bias).parts()
    rows = OUT if bias else 0
    make = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, a, b, c = make(*shape), make(RANK, IN), make(OUT, RANK), make(rows) if bias else None
    assert torch.autograd.gradcheck(lambda x, c: block_linear(x, parts, c), (x, c))
    branch = (a, b, make(1), make(1))
    iec = lambda x, c, *branch: block_iec_linear(x, parts, c, *branch, 0.3, x.dtype)  # noqa: E731
    assert torch.autograd.gradcheck(iec, (x, c, *branch))


@pytest.mark.parametrize("bias", [False, True])
def test_one_operation_equals_base_and_branch(bias: bool) -> None:
    module, x = adapted(bias=bias), torch.randn(2, 7, IN)
    same(gradients(module, x), gradients(plain(module), x), LINEAR_FLOAT32)


def test_autocast_runs_base_and_branch_in_its_dtype() -> None:
    module, x = adapted(bias=True), torch.randn(4, 7, IN)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(module, x), gradients(plain(module), x)
    assert found["y"].dtype == torch.bfloat16
    assert found["lora_a"].dtype == found["beta1"].dtype == torch.float32
    same(found, expected, LINEAR_BFLOAT16)
    exact = gradients(module.double(), x.double())
    same(found, exact, LINEAR_BFLOAT16)


@pytest.mark.parametrize("layer", [base, adapted])
def test_backward_does_not_ask_autocast(layer: Callable[[], nn.Module]) -> None:
    """The forward pass has settled the dtype; a backward pass that runs inside autocast keeps it."""
    module, x = layer(), torch.randn(4, IN)
    expected = gradients(module, x)
    module.zero_grad()
    x.requires_grad_()
    y = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(2 * y)
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    same({"y": y.detach(), "x": x.grad, **found}, expected, 0)


def test_second_derivatives() -> None:
    """Right of the frozen layer, which is linear; refused for the branch, whose A and B are folded first."""
    module, x = base(), torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: block_linear(x, module.parts()) ** 2, (x,))
    branch, x = adapted(), x.detach().float().requires_grad_()
    for y, source in ((branch(x), x), (elastic_weight(branch.lora_b, branch.beta2), branch.lora_b)):
        (grad,) = torch.autograd.grad(y.square().sum(), source, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN), (0, 4, IN)])
def test_a_batch_may_be_empty(shape: tuple[int, ...], dropout: float) -> None:
    iec = IecLinear(base(), RANK, dropout=dropout)
    for module in (iec.base, iec):
        x = torch.zeros(shape, requires_grad=True)
        y = module(x)
        assert y.shape == (*shape[:-1], OUT)
        y.sum().backward()
        assert x.grad.shape == shape
    assert (iec.lora_a.grad == 0).all()


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    module = adapted()
    x = torch.randn(5, IN, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x).sum()
    stored = {buffer.data_ptr() for buffer in module.base.buffers()}
    new = [t for t in kept if t.data_ptr() not in stored and t.data_ptr() != x.data_ptr()]
    assert stored & {t.data_ptr() for t in kept}
    assert sum(t.numel() for t in new) <= 5 * RANK + 2 * RANK * (IN + OUT) + 8
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module.base(x).sum()
    assert {t.data_ptr() for t in kept} <= stored  # a frozen layer without a branch keeps not even its input


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    module, x = adapted(), torch.randn(5, IN)
    expected = gradients(module, x)
    module.zero_grad()
    found = gradients(module, x, lambda x: checkpoint(module, x, use_reentrant=reentrant))
    same(found, expected, 0)


def test_compiled_graph_decodes_twice_and_keeps_no_weight() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition
    )
    module, x = adapted(bias=True), torch.randn(5, IN)
    expected = gradients(module, x)
    module.zero_grad()
    found = gradients(module, x, torch.compile(module, backend=backend, fullgraph=True))
    same(found, expected, LINEAR_FLOAT32)
    calls = [sum("irq.decode" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert calls == [1, 1]
    for output in graphs[0].graph.output_node().args[0]:
        assert tuple(output.meta["val"].shape) != (OUT, IN)


def test_frozen_input_needs_no_decoding_in_backward() -> None:
    module, x = adapted(), torch.randn(5, IN)
    module(x).sum().backward()
    assert module.lora_a.grad is not None
    assert x.grad is None

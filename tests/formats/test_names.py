"""Names of tensors, both ways, against gguf-py's own table and against transformers' state dict."""

from __future__ import annotations

import gguf
import pytest

from irq_formats.errors import UnsupportedModel
from irq_formats.names import gguf_to_hf, hf_to_gguf, linear_names, tensor_shapes
from tests.tiny_files import model_config
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    expected = {name: tuple(array.shape) for name, array in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    shapes = tensor_shapes(model_config(model))
    assert {gguf_to_hf(name): shape for name, shape in shapes.items()} == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_names_are_those_of_gguf_py(family: str) -> None:
    model = tiny_model(family)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), 2)
    for name in model.state_dict():
        assert hf_to_gguf(name) == table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_to_hf(hf_to_gguf(name)) == name


def test_a_module_keeps_having_no_suffix() -> None:
    assert hf_to_gguf("model.layers.10.mlp.up_proj") == "blk.10.ffn_up"
    assert gguf_to_hf("blk.10.ffn_up") == "model.layers.10.mlp.up_proj"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.0",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.scale",
        "transformer.h.0.attn.c_attn.weight",
        "model.layers.0.mlp.up_proj.weight.weight",
    ],
)
def test_strangers_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel):
        hf_to_gguf(name)
    with pytest.raises(UnsupportedModel):
        gguf_to_hf(name)


def test_linear_names_in_order() -> None:
    config = model_config(tiny_model())
    assert linear_names(config)[:7] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(linear_names(config)) == 14

"""Reading and writing PEFT directories: round trip, the released key names, and everything refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from irq_formats.adapter import Adapter, LoraLayer, random_layer
from irq_formats.errors import IrqError, MalformedFile, OutputExists, UnsupportedModel
from irq_formats.peft_adapter import read_peft_adapter, write_peft_adapter

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
PREFIX = "base_model.model."


def two_layers(beta: float = 0.05) -> Adapter:
    rng = np.random.default_rng(0)
    layers = {
        Q: random_layer((32, 64), 3.0, rng, rank=4, beta=beta),
        DOWN: random_layer((64, 192), 3.0, rng, rank=6, alpha=20.0, beta=beta),  # 20/6 is periodic
    }
    return Adapter(layers, "ab" * 32, {"task_type": "CAUSAL_LM", "lora_dropout": 0.1})


def assert_same(got: Adapter, want: Adapter) -> None:
    assert list(got.layers) == sorted(want.layers)
    for name, layer in want.layers.items():
        other = got.layers[name]
        np.testing.assert_array_equal(other.lora_a, layer.lora_a)
        np.testing.assert_array_equal(other.lora_b, layer.lora_b)
        assert (other.beta1, other.beta2) == (layer.beta1, layer.beta2)
        assert other.scaling == layer.scaling


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An adapter directory to damage."""
    write_peft_adapter(tmp_path / "adapter", two_layers())
    return tmp_path / "adapter"


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("value", ["", "hello", "5e" * 31, "5E" * 32, "5e" * 32 + "\n", "5e" * 32 + "-tau"])
@pytest.mark.parametrize("place", ["weights", "configuration"])
def test_a_base_hash_is_a_hash(tmp_path: Path, value: str, place: str):
    """What is no hash can equal no base's: the adapter would be one of another base, or of any."""
    write_peft_adapter(tmp_path, replace(two_layers(0.05), base_hash=None))
    assert read_peft_adapter(tmp_path).base_hash is None
    if place == "weights":
        path = tmp_path / "adapter_model.safetensors"
        save_file(load_file(path), path, metadata={"irq.base_hash": value})
    else:
        edit_config(tmp_path, irq_base_hash=value)
    with pytest.raises(MalformedFile, match="not a hash"):
        read_peft_adapter(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("shape", [(), (1, 1, 1)])
def test_what_other_programs_save_is_read(tmp_path: Path, dtype: type, shape: tuple[int, ...]):
    """Matrices and betas of other float types, betas of one number in any shape."""
    adapter = two_layers()
    exact = {name: replace(layer, beta1=0.25, beta2=-0.5) for name, layer in adapter.layers.items()}
    write_peft_adapter(tmp_path, replace(adapter, layers=exact))
    want = read_peft_adapter(tmp_path)

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, value in tensors.items():
            tensors[name] = (value.reshape(shape) if "beta" in name else value).astype(dtype)

    edit_tensors(tmp_path, change)
    got = read_peft_adapter(tmp_path)
    for module, layer in want.layers.items():
        assert (got.layers[module].beta1, got.layers[module].beta2) == (0.25, -0.5)
        np.testing.assert_allclose(got.layers[module].lora_a, layer.lora_a, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_round_trip(tmp_path: Path, beta: float):
    want = two_layers(beta)
    write_peft_adapter(tmp_path / "a", want, base_model_name="some/model")
    got = read_peft_adapter(tmp_path / "a")
    assert_same(got, want)
    assert got.has_iec == (beta != 0)
    assert got.base_hash == want.base_hash
    assert got.meta == {
        "base_model_name_or_path": "some/model",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.1,
        "beta_keys": "irq" if beta else "none",
    }
    write_peft_adapter(tmp_path / "b", got)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_files_are_what_peft_expects(written: Path):
    config = json.loads((written / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 16
    assert config["rank_pattern"] == {DOWN: 6}
    assert config["alpha_pattern"] == {DOWN: 20}
    assert config["target_modules"] == [Q, DOWN]
    tensors = load_file(written / "adapter_model.safetensors")
    assert {name: tensors[name].shape for name in tensors if Q in name} == {
        f"{PREFIX}{Q}.lora_A.weight": (4, 64),
        f"{PREFIX}{Q}.lora_B.weight": (32, 4),
        f"{PREFIX}{Q}.lora_beta1": (1,),
        f"{PREFIX}{Q}.lora_beta2": (1,),
    }


def test_released_key_names(written: Path):
    """IR-QLoRA's own code saves ``lora_default_A_scale`` (U1) and ``lora_default_B_scale`` (U2)."""

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if "lora_beta" in name]:
            new = name.replace("lora_beta1", "lora_default_A_scale")
            tensors[new.replace("lora_beta2", "lora_default_B_scale")] = tensors.pop(name)

    edit_tensors(written, rename)
    assert f"{PREFIX}{Q}.lora_default_A_scale" in load_file(written / "adapter_model.safetensors")
    got = read_peft_adapter(written)
    assert_same(got, two_layers())
    assert got.meta["beta_keys"] == "released"


@pytest.mark.parametrize(
    ("dtype", "same"), [("float16", np.float16), ("float64", np.float32), ("bfloat16", None)]
)
def test_other_float_types(written: Path, dtype: str, same: type | None):
    import torch  # safetensors.numpy has no bfloat16
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    path = written / "adapter_model.safetensors"
    save_torch({k: v.to(getattr(torch, dtype)) for k, v in load_torch(path).items()}, path)
    got = read_peft_adapter(written).layers[Q].lora_a
    assert got.dtype == np.float32
    want = two_layers().layers[Q].lora_a
    if same is None:
        want = torch.from_numpy(want).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(got, want.astype(same or np.float32))


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"lora_alpha": 8, "alpha_pattern": {}}, 8 / 4),
        ({"lora_alpha": 8, "alpha_pattern": {}, "use_rslora": True}, 8 / sqrt(4)),
        ({"alpha_pattern": {"q_proj": 32}}, 32 / 4),
        ({"alpha_pattern": {"_proj": 32}}, 16 / 4),  # whole name parts only, as in PEFT
        ({"alpha_pattern": {r"layers\.[0-3]\.self_attn.q_proj": 32, "q_proj": 64}}, 32 / 4),
        ({"alpha_pattern": {"k_proj|q_proj": 2.5}}, 2.5 / 4),
        ({"rank_pattern": {"down_proj": 6, "q_proj": 4}, "r": 99}, 16 / 4),
    ],
)
def test_scaling(written: Path, fields: dict[str, object], scaling: float):
    edit_config(written, **fields)
    assert read_peft_adapter(written).layers[Q].scaling == scaling


def test_existing_files_are_kept(written: Path):
    with pytest.raises(OutputExists):
        write_peft_adapter(written, two_layers(0.0))
    assert read_peft_adapter(written).has_iec
    write_peft_adapter(written, two_layers(0.0), overwrite=True)
    assert not read_peft_adapter(written).has_iec


def test_unsound_adapters_are_not_written(tmp_path: Path):
    layer = two_layers().layers[Q]
    for bad in [Adapter({}), Adapter({Q: replace(layer, beta1=float("nan"))})]:
        with pytest.raises(MalformedFile):
            write_peft_adapter(tmp_path / "x", bad)
    assert not (tmp_path / "x").exists()


def put(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.__setitem__(PREFIX + name, value)


def drop(name: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: tensors.pop(PREFIX + name)


def f32(*shape: int, fill: float = 0.0) -> np.ndarray:
    return np.full(shape, fill, np.float32)


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], type[IrqError], str]] = {
    "no layers": (lambda t: t.clear(), MalformedFile, "no layers"),
    "lora_B missing": (drop(f"{Q}.lora_B.weight"), MalformedFile, "half of its pair"),
    "lora_A missing": (drop(f"{Q}.lora_A.weight"), MalformedFile, "half of its pair"),
    "beta2 missing": (drop(f"{Q}.lora_beta2"), MalformedFile, "not one pair"),
    "betas twice": (put(f"{Q}.lora_default_A_scale", f32(1)), MalformedFile, "not one pair"),
    "beta NaN": (put(f"{Q}.lora_beta1", f32(1, fill=np.nan)), MalformedFile, "beta1 is not a finite"),
    "beta infinite": (put(f"{Q}.lora_beta2", f32(1, fill=np.inf)), MalformedFile, "beta2 is not a finite"),
    "beta a vector": (put(f"{Q}.lora_beta2", f32(4)), MalformedFile, "not one number"),
    "beta empty": (put(f"{Q}.lora_beta2", f32(0)), MalformedFile, "not one number"),
    "rank 0": (put(f"{Q}.lora_A.weight", f32(0, 64)), MalformedFile, "rank 0"),
    "shapes disagree": (put(f"{Q}.lora_A.weight", f32(5, 64)), MalformedFile, "do not form a pair"),
    "not a matrix": (put(f"{Q}.lora_A.weight", f32(4, 8, 8)), MalformedFile, "matrices"),
    "A holds NaN": (put(f"{Q}.lora_A.weight", f32(4, 64, fill=np.nan)), MalformedFile, "lora_A holds NaN"),
    "integers": (put(f"{Q}.lora_A.weight", np.zeros((4, 64), np.int32)), UnsupportedModel, "floating"),
    "DoRA vector": (put(f"{Q}.lora_magnitude_vector", f32(32)), UnsupportedModel, "DoRA"),
    "embedding LoRA": (put("model.embed_tokens.lora_embedding_A", f32(4, 9)), UnsupportedModel, "embedding"),
    "embedding": (put("model.embed_tokens.weight", f32(9, 64)), UnsupportedModel, "trained embedding"),
    "head": (put("lm_head.weight", f32(9, 64)), UnsupportedModel, "trained head"),
    "LoRA bias": (put(f"{Q}.lora_B.bias", f32(32)), UnsupportedModel, "bias"),
    "unknown": (put(f"{Q}.something", f32(1)), UnsupportedModel, "unknown tensor"),
    "no module name": (put("lora_A.weight", f32(4, 64)), UnsupportedModel, "unknown tensor"),
    "wrong prefix": (
        lambda t: t.__setitem__("model.q.lora_A.weight", f32(4, 64)),
        UnsupportedModel,
        "unknown tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(written: Path, case: str):
    change, error, message = BAD_TENSORS[case]
    edit_tensors(written, change)
    with pytest.raises(error, match=message) as caught:
        read_peft_adapter(written)
    assert caught.value.where
    assert caught.value.expected


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedModel, "not a LoRA"),
        ({"use_dora": True}, UnsupportedModel, "DoRA"),
        ({"use_qalora": True}, UnsupportedModel, "use_qalora"),
        ({"use_next_years_idea": True}, UnsupportedModel, "use_next_years_idea"),
        ({"bias": "lora_only"}, UnsupportedModel, "biases"),
        ({"lora_bias": True}, UnsupportedModel, "bias inside"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, "fully trained"),
        ({"fan_in_fan_out": True}, UnsupportedModel, "Conv1D"),
        ({"layer_replication": [[0, 1]]}, UnsupportedModel, "replication"),
        ({"trainable_token_indices": [1]}, UnsupportedModel, "token embeddings"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedModel, "changed the base"),
        ({"alpha_pattern": {"(a+)+": 1}}, UnsupportedModel, "regular expression"),
        ({"alpha_pattern": {"[z-a]": 1}}, UnsupportedModel, "regular expression"),
        ({"alpha_pattern": [1]}, MalformedFile, "alpha_pattern is not an object"),
        ({"rank_pattern": {"q_proj": "4"}}, MalformedFile, "not a number"),
        ({"rank_pattern": {}}, MalformedFile, "rank of the configuration"),
        ({"r": 0}, MalformedFile, "not a rank"),
        ({"r": 4.5}, MalformedFile, "not a rank"),
        ({"r": True}, MalformedFile, "r is not a number"),
        ({"r": None}, MalformedFile, "r is not a number"),
        ({"r": 10**400}, MalformedFile, "r is not a number"),
        ({"r": 8}, MalformedFile, "rank of the configuration"),
        ({"lora_alpha": None}, MalformedFile, "lora_alpha is not a number"),
        ({"use_rslora": "yes"}, MalformedFile, "not a boolean"),
    ],
)
def test_bad_configurations_are_refused(
    written: Path, fields: dict[str, object], error: type[IrqError], message: str
):
    edit_config(written, **fields)
    with pytest.raises(error, match=message) as caught:
        read_peft_adapter(written)
    assert caught.value.where
    assert caught.value.expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 10**5, "\xff"])
def test_configurations_that_are_not_json(written: Path, text: str):
    (written / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedFile):
        read_peft_adapter(written)


def test_huge_configuration_is_not_read(written: Path):
    with (written / "adapter_config.json").open("ab") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(MalformedFile, match="too large"):
        read_peft_adapter(written)


def test_missing_files(written: Path):
    weights = written / "adapter_model.safetensors"
    weights.rename(written / "adapter_model.bin")
    with pytest.raises(UnsupportedModel, match="pickle") as caught:
        read_peft_adapter(written)
    assert "weights_only=True" in str(caught.value.hint)
    (written / "adapter_model.bin").unlink()
    with pytest.raises(MalformedFile, match="no weights"):
        read_peft_adapter(written)
    (written / "adapter_config.json").unlink()
    with pytest.raises(MalformedFile, match="configuration is missing"):
        read_peft_adapter(written)


def test_layer_type_is_frozen():
    layer = LoraLayer(f32(1, 2), f32(3, 1))
    with pytest.raises(AttributeError):
        layer.beta1 = 1.0  # type: ignore[misc]

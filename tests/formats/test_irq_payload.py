"""The irq payload: what is read back, and every way it may be broken (facts/peers-style.md D.5)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from irq_formats.adapter import LoraLayer, random_layer
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.errors import MalformedFile, UnsupportedModel, WrongBase
from irq_formats.gguf import F32, F64, STR, U32, GgmlType, GgufValue, TensorSource, open_gguf, write_gguf
from irq_formats.gguf.irq_check import check_irq
from irq_formats.gguf.irq_payload import (
    block_table,
    check_base,
    check_header,
    read_adapter,
    read_base_hash,
    read_blocks,
)
from irq_formats.names import hf_to_gguf
from tests.tiny_files import BASE_HASH, block_tensors, irq_parts
from tests.tiny_models import tiny_model

Q = "blk.0.attn_q"
ADAPTED = "model.layers.0.self_attn.q_proj"


@dataclass
class Parts:
    """An irq file before it is written, open to vandalism."""

    metadata: dict[str, GgufValue]
    tensors: dict[str, TensorSource]

    def edit(self, name: str, change: Callable[[np.ndarray], object]) -> None:
        """Change a copy of a tensor's data in place."""
        array = self.tensors[name].load().copy()
        change(array)
        self.tensors[name] = replace(self.tensors[name], load=lambda: array)

    def put(self, name: str, array: np.ndarray, kind: GgmlType = GgmlType.F32) -> None:
        self.tensors[name] = TensorSource(name, array.shape, kind, lambda: array)

    def table(self, key: str, index: int, value: object) -> None:
        """Change one entry of an array of the metadata."""
        old = self.metadata[key]
        values = list(old.value)  # type: ignore[arg-type]
        values[index] = value
        assert old.element is not None
        self.metadata[key] = old.element.array(values)

    def write(self, path: Path) -> Path:
        write_gguf(path, self.metadata, list(self.tensors.values()), overwrite=True)
        return path


@pytest.fixture(scope="module")
def blocks() -> dict[str, BlockTensor]:
    return block_tensors(tiny_model(), BlockSpec("nf4"))


@pytest.fixture(scope="module")
def layer() -> LoraLayer:
    return random_layer((128, 128), 10.0, np.random.default_rng(0))


@pytest.fixture
def parts(blocks: dict[str, BlockTensor], layer: LoraLayer) -> Parts:
    metadata, sources = irq_parts(tiny_model(), blocks, {ADAPTED: layer})
    return Parts(dict(metadata), {source.name: source for source in sources})


def test_reading_back(parts: Parts, blocks: dict[str, BlockTensor], layer: LoraLayer, tmp_path: Path) -> None:
    gguf = open_gguf(parts.write(tmp_path / "m.gguf"))
    assert check_irq(gguf).hidden_size == 128
    assert read_base_hash(gguf) == BASE_HASH
    loaders = read_blocks(gguf)
    assert list(loaders) == [hf_to_gguf(module) for module in blocks]
    for module, expected in blocks.items():
        got = loaders[hf_to_gguf(module)]()
        assert (got.spec, got.shape) == (expected.spec, expected.shape)
        for name, part in expected.parts.items():
            assert got.parts[name].dtype == part.dtype
            assert np.array_equal(got.parts[name], part)
    got_layer = read_adapter(gguf)[Q]
    assert np.array_equal(got_layer.lora_a, layer.lora_a)
    assert np.array_equal(got_layer.lora_b, layer.lora_b)
    assert (got_layer.beta1, got_layer.beta2, got_layer.scaling) == (
        layer.beta1,
        layer.beta2,
        layer.scaling,
    )


@pytest.mark.parametrize(
    "spec",
    [
        BlockSpec(codebook, block, scale, tau, rounding)
        for codebook, block, scale, tau, rounding in [
            ("nf4", 32, "f16", "f16", "fp16"),
            ("nf3", 64, "f32", "f32", "none"),
            ("nf2", 64, "dq8", "none", "none"),
            ("int3", 32, "dq8", "dq8", "fp16"),
        ]
    ],
    ids=str,
)
def test_other_storages(spec: BlockSpec, tmp_path: Path) -> None:
    model = tiny_model()
    blocks = block_tensors(model, spec)
    write_gguf(tmp_path / "m.gguf", *irq_parts(model, blocks))
    gguf = open_gguf(tmp_path / "m.gguf")
    check_irq(gguf)
    assert read_adapter(gguf) == {}
    for module, load in zip(blocks, read_blocks(gguf).values(), strict=True):
        assert np.array_equal(load().dequantize(), blocks[module].dequantize())


def set_at(value: object) -> Callable[[np.ndarray], object]:
    return lambda array: array.reshape(-1).__setitem__(0, value)


def lose(key: str) -> Callable[[Parts], object]:
    return lambda p: p.metadata.pop(key)


def lose_tensor(name: str) -> Callable[[Parts], object]:
    return lambda p: p.tensors.pop(name)


def set_key(key: str, value: GgufValue) -> Callable[[Parts], object]:
    return lambda p: p.metadata.__setitem__(key, value)


def set_entry(key: str, value: object) -> Callable[[Parts], object]:
    return lambda p: p.table(key, 0, value)


def edit(name: str, value: object) -> Callable[[Parts], object]:
    return lambda p: p.edit(name, set_at(value))


def zero_group(p: Parts) -> None:
    p.edit(f"{Q}.tau_absmax", set_at(0.0))


def twice(p: Parts) -> None:
    p.table("irq.blocks.name", 1, Q)


def shorter(p: Parts) -> None:
    values = list(p.metadata["irq.blocks.codebook"].value)  # type: ignore[arg-type]
    p.metadata["irq.blocks.codebook"] = STR.array(values[:-1])


def plain_too(p: Parts) -> None:
    p.put(f"{Q}.weight", np.zeros((128, 128), np.float32))


def transposed(p: Parts) -> None:
    p.put(f"{Q}.lora_a", np.zeros((128, 8), np.float32))


def half_precision(p: Parts) -> None:
    p.put(f"{Q}.lora_a", np.zeros((8, 128), np.float16), GgmlType.F16)


def other_ranks(p: Parts) -> None:
    p.put(f"{Q}.lora_b", np.zeros((128, 7), np.float32))


def wrong_rows(p: Parts) -> None:
    p.put(f"{Q}.lora_b", np.zeros((64, 8), np.float32))


def embedding_adapter(p: Parts) -> None:
    p.table("irq.adapter.name", 0, "token_embd")
    for part in ("lora_a", "lora_b", "lora_beta"):
        source = p.tensors.pop(f"{Q}.{part}")
        p.tensors[f"token_embd.{part}"] = replace(source, name=f"token_embd.{part}")


def norm_of_integers(p: Parts) -> None:
    p.put("output_norm.weight", np.zeros(128, np.int8), GgmlType.I8)


def too_short_norm(p: Parts) -> None:
    p.put("output_norm.weight", np.zeros(64, np.float32))


def three_betas(p: Parts) -> None:
    p.put(f"{Q}.lora_beta", np.zeros(3, np.float32))


def codes_of_floats(p: Parts) -> None:
    p.put(f"{Q}.codes", np.zeros((128, 64), np.float32))


def codes_too_narrow(p: Parts) -> None:
    p.put(f"{Q}.codes", np.zeros((128, 32), np.int8), GgmlType.I8)


def all_scales_below_zero(p: Parts) -> None:
    p.edit(f"{Q}.scale_offset", set_at(-100.0))


def scales_beyond_fp16(p: Parts) -> None:
    p.edit(f"{Q}.scale_offset", set_at(1e6))


CASES: dict[str, Callable[[Parts], object]] = {
    "architecture llama": set_key("general.architecture", STR("llama")),
    "type missing": lose("general.type"),
    "type adapter": set_key("general.type", STR("adapter")),
    "version missing": lose("irq.version"),
    "version string": set_key("irq.version", STR("1")),
    "base hash missing": lose("irq.base_hash"),
    "base hash short": set_key("irq.base_hash", STR("abc")),
    "base hash number": set_key("irq.base_hash", U32(7)),
    "model key missing": lose("irq.model.hidden_size"),
    "model contradicts tensors": set_key("irq.model.intermediate_size", U32(256)),
    "one layer more": set_key("irq.model.num_hidden_layers", U32(3)),
    "one layer less": set_key("irq.model.num_hidden_layers", U32(1)),
    "table missing": lose("irq.blocks.name"),
    "column missing": lose("irq.blocks.tau"),
    "column of numbers": set_key("irq.blocks.codebook", U32.array([1] * 14)),
    "column of floats": set_key("irq.blocks.out", F32.array([128.0] * 14)),
    "column shorter": shorter,
    "matrix twice": twice,
    "unknown codebook": set_entry("irq.blocks.codebook", "nf5"),
    "codebook of other width": set_entry("irq.blocks.codebook", "nf3"),
    "unknown scale": set_entry("irq.blocks.scale", "f8"),
    "scale of other type": set_entry("irq.blocks.scale", "f32"),
    "unknown tau": set_entry("irq.blocks.tau", "bf16"),
    "unknown rounding": set_entry("irq.blocks.scale_rounding", "up"),
    "block size 0": set_entry("irq.blocks.block_size", 0),
    "block size 48": set_entry("irq.blocks.block_size", 48),
    "block size not dividing": set_entry("irq.blocks.in", 100),
    "rows 0": set_entry("irq.blocks.out", 0),
    "rows 2^32 - 1": set_entry("irq.blocks.out", 2**32 - 1),
    "unknown matrix": set_entry("irq.blocks.name", "blk.0.attn_z"),
    "codes missing": lose_tensor(f"{Q}.codes"),
    "codes of floats": codes_of_floats,
    "codes too narrow": codes_too_narrow,
    "nested offset missing": lose_tensor(f"{Q}.scale_offset"),
    "absmax missing": lose_tensor(f"{Q}.scale_absmax"),
    "tau missing": lose_tensor(f"{Q}.tau"),
    "absmax NaN": edit(f"{Q}.scale_absmax", np.nan),
    "absmax Inf": edit(f"{Q}.scale_absmax", np.inf),
    "absmax negative": edit(f"{Q}.scale_absmax", -1.0),
    "offset NaN": edit(f"{Q}.scale_offset", np.nan),
    "scales negative": all_scales_below_zero,
    "scales beyond fp16": scales_beyond_fp16,
    "tau absmax NaN": edit(f"{Q}.tau_absmax", np.nan),
    "tau absmax Inf": edit(f"{Q}.tau_absmax", np.inf),
    "zero group with codes": zero_group,
    "plain and blocks": plain_too,
    "plain missing": lose_tensor("output_norm.weight"),
    "plain of integers": norm_of_integers,
    "plain too short": too_short_norm,
    "stranger": lambda p: p.put("blk.0.attn_q.magic", np.zeros(4, np.float32)),
    "adapter scaling missing": lose("irq.adapter.scaling"),
    "adapter scaling NaN": set_key("irq.adapter.scaling", F64.array([np.nan])),
    "adapter scaling twice": set_key("irq.adapter.scaling", F64.array([1.0, 1.0])),
    "adapter iec missing": lose("irq.adapter.iec"),
    "adapter iec numbers": set_key("irq.adapter.iec", U32.array([1])),
    "adapter name missing": lose("irq.adapter.name"),
    "adapter of nothing": set_entry("irq.adapter.name", "blk.9.attn_q"),
    "adapter of the embedding": embedding_adapter,
    "adapter half a pair": lose_tensor(f"{Q}.lora_a"),
    "adapter transposed": transposed,
    "adapter of other type": half_precision,
    "adapter ranks differ": other_ranks,
    "adapter rows differ": wrong_rows,
    "adapter NaN": edit(f"{Q}.lora_a", np.nan),
    "beta missing": lose_tensor(f"{Q}.lora_beta"),
    "beta NaN": edit(f"{Q}.lora_beta", np.nan),
    "three betas": three_betas,
}


@pytest.mark.parametrize("vandalism", CASES.values(), ids=CASES.keys())
def test_malformed(vandalism: Callable[[Parts], object], parts: Parts, tmp_path: Path) -> None:
    vandalism(parts)
    path = parts.write(tmp_path / "m.gguf")
    started = time.perf_counter()
    with pytest.raises(MalformedFile):
        check_irq(open_gguf(path))
    assert time.perf_counter() - started < 1  # seconds


def test_whole_file_passes(parts: Parts, tmp_path: Path) -> None:
    check_irq(open_gguf(parts.write(tmp_path / "m.gguf")))  # so that every case above has a cause


def test_a_later_version_is_told_apart(parts: Parts, tmp_path: Path) -> None:
    parts.metadata["irq.version"] = U32(2)
    with pytest.raises(UnsupportedModel, match="Update"):
        check_header(open_gguf(parts.write(tmp_path / "m.gguf")), "model")


def test_another_base(parts: Parts, tmp_path: Path) -> None:
    parts.metadata["irq.adapter.base_hash"] = STR("cd" * 32)
    gguf = open_gguf(parts.write(tmp_path / "m.gguf"))
    with pytest.raises(WrongBase):
        check_irq(gguf)
    del parts.metadata["irq.adapter.base_hash"]
    gguf = open_gguf(parts.write(tmp_path / "m.gguf"))
    check_base(gguf, gguf)


def test_denormal_scales_are_values_like_others(tmp_path: Path) -> None:
    model = tiny_model()
    blocks = block_tensors(model, BlockSpec("nf4", scale="f16", tau="f16"))
    metadata, sources = irq_parts(model, blocks)
    parts = Parts(dict(metadata), {source.name: source for source in sources})
    parts.edit(f"{Q}.scale", set_at(np.float16(6e-8)))
    gguf = open_gguf(parts.write(tmp_path / "m.gguf"))
    check_irq(gguf)
    assert np.isfinite(read_blocks(gguf)[Q]().dequantize()).all()
    assert block_table(gguf)[Q].shape == (128, 128)

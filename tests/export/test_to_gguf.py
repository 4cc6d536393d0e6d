"""to-gguf: what lies in the files is what was trained, as somebody else's code decodes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf_sources import GgufSource
from model_cases import LLAMA3
from tolerance import NF_IN_Q8_0_NMSE, NMSE_FLOAT32, NMSE_FLOAT64

from irq_export.export.gguf import to_gguf
from irq_export.export.gguf.merged import round_once
from irq_formats.adapter import delta_weight
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.errors import (
    UnsupportedModel,
)
from irq_formats.gguf import GgmlType, open_gguf
from irq_formats.names import hf_to_gguf
from irq_runtime.reference import load_model

CODEBOOKS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 259, 16)]


# --- independent decoding: gguf-py's reader and dequantisers, and a few lines for what it lacks ---------


def _theirs(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _unpermuted(rows: np.ndarray, name: str, head_dim: int = 32) -> np.ndarray:
    """Row 2 i + half of a head of a llama file is row half * d/2 + i of Hugging Face's."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return rows
    index = np.arange(len(rows))
    head, within = index // head_dim, index % head_dim
    back = np.empty_like(index)
    back[head * head_dim + within % 2 * (head_dim // 2) + within // 2] = index
    return rows[back]


def _q2_0(path: Path, name: str) -> np.ndarray:
    """gguf-py 0.19 knows no Q2_0: bytes through our reader, decoded here: d * (q - 1)."""
    raw = open_gguf(path).read(name)
    blocks = raw.reshape(-1, 18)
    step = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(-1, 64, 2)
    return (step * (bits[..., 0] + 2.0 * bits[..., 1] - 1).astype(np.float32)).reshape(len(raw), -1)


def _base_weights(path: Path, name: str) -> np.ndarray:
    if open_gguf(path).tensors[name].type is GgmlType.Q2_0:
        return _unpermuted(_q2_0(path, name), name)
    tensor = _theirs(path)[name]
    return _unpermuted(quants.dequantize(tensor.data, tensor.tensor_type), name)


def _nmse(got: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(got.astype(np.float64) - expected.astype(np.float64)).sum()
    return float(error / np.square(expected.astype(np.float64)).sum())


# --- profile irq -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_irq_moves_every_part_bit_for_bit(tmp_path, gguf_source, codebook):
    given = gguf_source(codebook)
    result = to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir)
    theirs = _theirs(tmp_path / "m.gguf")
    for module, tensor in given.tensors.items():
        for part, array in tensor.parts.items():
            assert theirs[f"{hf_to_gguf(module)}.{part}"].data.tobytes() == array.tobytes()
    for name, array in given.plain.items():
        np.testing.assert_array_equal(theirs[hf_to_gguf(name)].data, array)
    for module, layer in given.adapter.layers.items():
        assert theirs[f"{hf_to_gguf(module)}.lora_a"].data.tobytes() == layer.lora_a.tobytes()
        assert theirs[f"{hf_to_gguf(module)}.lora_b"].data.tobytes() == layer.lora_b.tobytes()
    assert result.read_back.rounded == 0
    assert result.read_back.exact >= len(theirs) - len(given.adapter.layers)
    total = sum(tensor.nbytes for tensor in given.tensors.values())
    weights = sum(np.prod(tensor.shape) for tensor in given.tensors.values())
    assert result.bits_per_weight == 8 * total / weights


def test_irq_adapter_forms_compute_the_same(tmp_path, gguf_source):
    given = gguf_source("nf4")
    options = {"adapter_dir": given.adapter_dir}
    to_gguf(given.path, tmp_path / "kept.gguf", **options)
    to_gguf(given.path, tmp_path / "folded.gguf", adapter="fold", **options)
    split = to_gguf(given.path, tmp_path / "split.gguf", separate_adapter=True, **options)
    to_gguf(given.path, tmp_path / "dropped.gguf", adapter="drop", **options)
    assert [file.path.name for file in split.files] == ["split.adapter.gguf", "split.gguf"]
    kept = load_model(tmp_path / "kept.gguf").logits(TOKENS)
    folded = load_model(tmp_path / "folded.gguf").logits(TOKENS)
    separate = load_model(tmp_path / "split.gguf", tmp_path / "split.adapter.gguf").logits(TOKENS)
    bare = load_model(tmp_path / "split.gguf").logits(TOKENS)
    dropped = load_model(tmp_path / "dropped.gguf").logits(TOKENS)
    assert _nmse(folded, kept) < NMSE_FLOAT64
    np.testing.assert_array_equal(separate, kept)
    np.testing.assert_array_equal(dropped, bare)
    assert _nmse(bare, kept) > 1e-3  # the adapter matters


# --- profile stock -----------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_stock_pair_holds_the_weights(tmp_path, gguf_source, codebook):
    """Base plus the tau columns of the adapter, decoded by others, is the trained matrix, bit for bit."""
    given = gguf_source(codebook)
    result = to_gguf(given.path, tmp_path / "pair", profile="stock", adapter_dir=given.adapter_dir)
    lora = _theirs(tmp_path / "pair" / "adapter.gguf")
    for module, tensor in given.tensors.items():
        name = f"{hf_to_gguf(module)}.weight"
        weight = _base_weights(tmp_path / "pair" / "base.gguf", name)
        a, b = lora[f"{name}.lora_a"].data, _unpermuted(lora[f"{name}.lora_b"].data, name)
        layer = given.adapter.layers[module]
        tau = b[:, layer.rank :]
        assert tau.tobytes() == tensor.tau().tobytes()
        np.testing.assert_array_equal(a[layer.rank :], np.repeat(np.eye(tau.shape[1]), 64, axis=1))
        whole = weight + np.repeat(tau, 64, axis=1)
        if codebook.startswith("int"):
            np.testing.assert_array_equal(whole, tensor.dequantize())
        else:
            error = np.square((whole - tensor.dequantize()).astype(np.float64)).sum()
            spread = tensor.dequantize() - np.repeat(tensor.tau(), 64, axis=1)
            assert error / np.square(spread.astype(np.float64)).sum() < 1.2 * NF_IN_Q8_0_NMSE[codebook]
        delta = b[:, : layer.rank].astype(np.float64) @ a[: layer.rank]
        assert _nmse(delta, delta_weight(layer)) < NMSE_FLOAT32
    keys = open_gguf(tmp_path / "pair" / "adapter.gguf").metadata
    assert (keys["adapter.type"], keys["adapter.lora.alpha"]) == ("lora", 0.0)
    assert (result.read_back.rounded == 0) == codebook.startswith("int")


@pytest.mark.parametrize(
    ("codebook", "kind"), [("int4", "Q4_0"), ("int3", "Q4_0"), ("int2", "Q2_0"), ("nf4", "Q8_0")]
)
def test_stock_types(tmp_path, gguf_source, codebook, kind):
    given = gguf_source(codebook)
    to_gguf(given.path, tmp_path / "pair", profile="stock")
    tensors = open_gguf(tmp_path / "pair" / "base.gguf").tensors
    assert {tensors[f"{hf_to_gguf(module)}.weight"].type.name for module in given.tensors} == {kind}
    vectors = [tensor for tensor in tensors.values() if len(tensor.shape) == 1]
    assert vectors
    assert all(tensor.type is GgmlType.F32 for tensor in vectors)


def test_int2_in_q4_0_and_nf4_in_bf16(tmp_path, gguf_source):
    given = gguf_source("int2")
    to_gguf(given.path, tmp_path / "q4", profile="stock", int2_type="q4_0")
    base = tmp_path / "q4" / "base.gguf"
    assert _theirs(base)["blk.0.attn_q.weight"].tensor_type.name == "Q4_0"
    tensor = given.tensors["model.layers.0.self_attn.q_proj"]
    scaled = tensor.spec.codec.decode(tensor.codes(), tensor.scale(), np.zeros_like(tensor.tau()))
    np.testing.assert_array_equal(_base_weights(base, "blk.0.attn_q.weight"), scaled)

    given = gguf_source("nf4")
    to_gguf(given.path, tmp_path / "bf16", profile="stock", nf_type="bf16", adapter_dir=given.adapter_dir)
    for module, tensor in given.tensors.items():
        name = f"{hf_to_gguf(module)}.weight"
        expected = quants.quantize(tensor.dequantize(), gguf.GGMLQuantizationType.BF16)
        stored = _theirs(tmp_path / "bf16" / "base.gguf")[name].data
        assert _unpermuted(stored, name).tobytes() == expected.tobytes()
    ranks = {
        tensor.data.shape[0]
        for name, tensor in _theirs(tmp_path / "bf16" / "adapter.gguf").items()
        if name.endswith("a")
    }
    assert ranks == {8}  # no tau columns: tau is inside the weights
    to_gguf(given.path, tmp_path / "alone", profile="stock", nf_type="bf16")
    assert not (tmp_path / "alone" / "adapter.gguf").exists()
    assert "ADAPTER" not in (tmp_path / "alone" / "Modelfile").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_int8_embeddings(tmp_path, tied):
    given = GgufSource(tmp_path, BlockSpec("int4"), embedding=True, tied=tied)
    for profile, output in (("irq", "m.gguf"), ("stock", "pair")):
        to_gguf(given.path, tmp_path / output, profile=profile, adapter_dir=given.adapter_dir)
    names = open_gguf(tmp_path / "m.gguf").tensors
    assert ("output.codes" in names) == (not tied)
    base = tmp_path / "pair" / "base.gguf"
    assert ("output.weight" in open_gguf(base).tensors) == (not tied)
    for module in ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]:
        weights = _base_weights(base, f"{hf_to_gguf(module)}.weight")
        np.testing.assert_array_equal(weights, given.tensors[module].dequantize())
    pair = load_model(base, tmp_path / "pair" / "adapter.gguf").logits(TOKENS)
    assert _nmse(pair, load_model(tmp_path / "m.gguf").logits(TOKENS)) < NMSE_FLOAT64


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families_compute_the_same_in_both_profiles(tmp_path, family):
    given = GgufSource(tmp_path, BlockSpec("int4"), model_type=family)
    to_gguf(given.path, tmp_path / "m.gguf", adapter_dir=given.adapter_dir)
    to_gguf(given.path, tmp_path / "pair", profile="stock", adapter_dir=given.adapter_dir)
    to_gguf(given.path, tmp_path / "f32.gguf", merge="f32", adapter_dir=given.adapter_dir)
    expected = load_model(tmp_path / "m.gguf").logits(TOKENS)
    pair = load_model(tmp_path / "pair" / "base.gguf", tmp_path / "pair" / "adapter.gguf").logits(TOKENS)
    assert _nmse(pair, expected) < NMSE_FLOAT64
    assert _nmse(load_model(tmp_path / "f32.gguf").logits(TOKENS), expected) < NMSE_FLOAT64


@pytest.mark.parametrize("options", [{"profile": "stock"}, {"merge": "f16"}])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_llama3_rotation_is_refused_where_llama_cpp_has_no_such_tensor(tmp_path, kind, options):
    given = GgufSource(tmp_path, BlockSpec("int4"), model_type=kind, rope_scaling=LLAMA3)
    with pytest.raises(UnsupportedModel, match="in llama models only"):
        to_gguf(given.path, tmp_path / "out", **options)
    to_gguf(given.path, tmp_path / "m.gguf")


def test_llama3_rotation_travels_as_a_tensor(tmp_path):
    given = GgufSource(tmp_path, BlockSpec("int4"), rope_scaling=LLAMA3)
    to_gguf(given.path, tmp_path / "m.gguf")
    to_gguf(given.path, tmp_path / "pair", profile="stock")
    expected = load_model(tmp_path / "m.gguf").logits(TOKENS)
    pair = load_model(tmp_path / "pair" / "base.gguf", tmp_path / "pair" / "adapter.gguf").logits(TOKENS)
    assert _nmse(pair, expected) < NMSE_FLOAT64


def test_scales_beyond_fp16_are_refused(tmp_path):
    given = GgufSource(tmp_path, BlockSpec("int4", scale_rounding="none"))
    with pytest.raises(UnsupportedModel, match="--merge bf16"):
        to_gguf(given.path, tmp_path / "pair", profile="stock")
    assert not (tmp_path / "pair").exists()
    to_gguf(given.path, tmp_path / "m.gguf")


# --- merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_merge_rounds_once(tmp_path, gguf_source, kind):
    given = gguf_source("nf4")
    to_gguf(given.path, tmp_path / "m.gguf", merge=kind, adapter_dir=given.adapter_dir)
    fraction_bits, smallest = {"f32": (23, 2.0**-149), "f16": (10, 2.0**-24), "bf16": (7, 2.0**-133)}[kind]
    for module, tensor in given.tensors.items():
        name = f"{hf_to_gguf(module)}.weight"
        exact = tensor.dequantize().astype(np.float64) + delta_weight(given.adapter.layers[module])
        stored = _base_weights(tmp_path / "m.gguf", name).astype(np.float64)
        ulp = np.maximum(2.0 ** (np.floor(np.log2(np.abs(exact))) - fraction_bits), smallest)
        # float64 sums of another order shift the middle between two neighbours by 1e-16 of the summands
        assert (np.abs(stored - exact) <= 0.5 * ulp + 1e-15).all()


def test_bf16_is_not_rounded_twice():
    """1 + 2^-8 + 2^-30 lies above the middle of two bf16; float32 would hide that and round to even."""
    value = np.array([[1 + 2.0**-8 + 2.0**-30, 1 + 2.0**-8 - 2.0**-30, -(1 + 3 * 2.0**-8 - 2.0**-30)]])
    assert (round_once(value, GgmlType.BF16, "x") == [[0x3F81, 0x3F80, 0xBF81]]).all()
    with pytest.raises(UnsupportedModel, match="exceeds F16"):
        round_once(np.array([[7e4]]), GgmlType.F16, "x")


def test_merge_f32_is_all_f32(tmp_path):
    given = GgufSource(tmp_path, BlockSpec("int4"), embedding=True)
    to_gguf(given.path, tmp_path / "m.gguf", merge="f32", adapter_dir=given.adapter_dir)
    assert {tensor.type for tensor in open_gguf(tmp_path / "m.gguf").tensors.values()} == {GgmlType.F32}
    to_gguf(given.path, tmp_path / "h.gguf", merge="f16")
    assert open_gguf(tmp_path / "h.gguf").tensors["token_embd.weight"].type is GgmlType.Q8_0


def test_block_tensors_of_the_fixture_differ(gguf_source):
    """The tests above would be blind if all blocks were alike."""
    tensor: BlockTensor = gguf_source("nf4").tensors["model.layers.0.self_attn.q_proj"]
    assert len(np.unique(tensor.scale())) > 100
    assert len(np.unique(tensor.tau())) > 100

"""The irq payload, written and read; block tensors in ggml's types, decoded by somebody else's code."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import quants
from tiny_checkpoints import TINY_CONFIG, random_block_tensor
from tolerance import NF_IN_Q8_0_NMSE

from irq_formats.adapter import random_layer
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.codebooks import CODEBOOKS
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.gguf import GgmlType, open_gguf, write_gguf
from irq_formats.gguf.irq_payload import BlockEntry, read_adapter, read_base_hash, read_blocks
from irq_formats.gguf.irq_writer import (
    adapter_header,
    adapter_metadata,
    adapter_sources,
    block_metadata,
    block_sources,
    model_header,
)
from irq_formats.gguf.model_keys import IRQ_PREFIX, read_model
from irq_formats.gguf.repack import (
    NF_TABLES,
    carrier,
    interleave_heads,
    repack,
    uninterleave_heads,
    unpack_codes,
)
from irq_formats.model import ModelConfig

HASH = "0f" * 32
SPECS = [
    *(BlockSpec(name, size) for name in ("nf4", "nf3", "nf2", "int4", "int3", "int2") for size in (64, 32)),
    BlockSpec("nf4", scale="f16", tau="f16"),
    BlockSpec("nf4", scale="f32", tau="f32", scale_rounding="none"),
    BlockSpec("nf4", tau="none", scale_rounding="none"),
    BlockSpec("int8", 32, "f16", "none"),
]
_FP16_SPECS = [spec for spec in SPECS if spec.scale_rounding == "fp16"]


def _id(spec: BlockSpec) -> str:
    return f"{spec.codebook}-{spec.block_size}-{spec.scale}-{spec.tau}"


# --- payload -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=_id)
def test_blocks_come_back_bit_for_bit(tmp_path, spec):
    tensor = random_block_tensor(spec, (24, 192))
    sources = block_sources("blk.0.attn_q", spec, tensor.shape, tensor.parts.__getitem__)
    entries = [BlockEntry("blk.0.attn_q", spec, tensor.shape)]
    header = model_header(ModelConfig.from_hf(TINY_CONFIG), HASH)
    write_gguf(tmp_path / "m.gguf", header | block_metadata(entries), sources)
    found = open_gguf(tmp_path / "m.gguf")
    loaded = read_blocks(found)["blk.0.attn_q"]()
    assert (loaded.spec, loaded.shape) == (spec, tensor.shape)
    assert {name: part.tobytes() for name, part in loaded.parts.items()} == {
        name: part.tobytes() for name, part in tensor.parts.items()
    }
    assert read_model(found.metadata, IRQ_PREFIX) == ModelConfig.from_hf(TINY_CONFIG)
    assert read_base_hash(found) == HASH
    # another reader sees the same names and bytes
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert set(theirs) == {source.name for source in sources}
    assert theirs["blk.0.attn_q.codes"].data.tobytes() == tensor.parts["codes"].tobytes()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_adapters_come_back_bit_for_bit(tmp_path, beta):
    layer = random_layer((48, 64), 4.0, np.random.default_rng(0), rank=4, alpha=6.0, beta=beta)
    header = adapter_header() | adapter_metadata({"blk.0.attn_q": layer}, HASH)
    write_gguf(tmp_path / "a.gguf", header, adapter_sources("blk.0.attn_q", layer))
    found = open_gguf(tmp_path / "a.gguf")
    loaded = read_adapter(found)["blk.0.attn_q"]
    assert loaded.lora_a.tobytes() == layer.lora_a.tobytes()
    assert loaded.lora_b.tobytes() == layer.lora_b.tobytes()
    assert (loaded.beta1, loaded.beta2, loaded.scaling) == (layer.beta1, layer.beta2, 1.5)
    assert ("blk.0.attn_q.lora_beta" in found.tensors) == (beta != 0)
    assert read_base_hash(found, "irq.adapter.base_hash") == HASH


def test_same_input_same_bytes(tmp_path):
    tensor = random_block_tensor(BlockSpec(), (24, 192))
    for name in ("a.gguf", "b.gguf"):
        sources = block_sources("blk.0.attn_q", tensor.spec, tensor.shape, tensor.parts.__getitem__)
        write_gguf(tmp_path / name, model_header(ModelConfig.from_hf(TINY_CONFIG), HASH), sources)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- stock types -------------------------------------------------------------------------------------


def _decode_q2_0(raw: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """ggml's dequantize_row_q2_0, element by element: y = d * (q - 1)."""
    values = np.empty(shape, np.float32)
    for row, data in enumerate(raw):
        for block in range(shape[1] // 64):
            field = data[18 * block : 18 * block + 18].tobytes()
            step = np.frombuffer(field[:2], "<f2")[0].astype(np.float32)
            for j in range(64):
                code = field[2 + j // 4] >> 2 * (j % 4) & 3
                values[row, 64 * block + j] = step * np.float32(code - 1)
    return values


def _decode_stock(raw: np.ndarray, kind: GgmlType, shape: tuple[int, int]) -> np.ndarray:
    if kind is GgmlType.Q2_0:
        return _decode_q2_0(raw, shape)
    return quants.dequantize(raw, gguf.GGMLQuantizationType[kind.name])


def _without_tau(tensor: BlockTensor) -> np.ndarray:
    levels = CODEBOOKS[tensor.spec.codebook].levels if tensor.spec.codebook != "int8" else None
    codes = tensor.codes()
    values = codes.view(np.int8).astype(np.float32) if levels is None else levels[codes]
    return values * np.repeat(tensor.scale(), tensor.spec.block_size, axis=1)


@pytest.mark.parametrize("spec", _FP16_SPECS, ids=_id)
@pytest.mark.parametrize("q2_0", [True, False])
def test_stock_blocks_decode_to_the_weights(spec, q2_0):
    tensor = random_block_tensor(spec, (12, 192))
    kind = carrier(spec.codebook, spec.block_size, q2_0=q2_0)
    raw = repack(tensor, kind)
    decoded, expected = _decode_stock(raw, kind, tensor.shape), _without_tau(tensor)
    np.testing.assert_array_equal(unpack_codes(raw, spec.codebook, kind), tensor.codes())
    if spec.codebook not in NF_TABLES:
        np.testing.assert_array_equal(decoded, expected)
        return
    error = np.square((decoded - expected).astype(np.float64)).sum()
    assert 0 < error / np.square(expected.astype(np.float64)).sum() < 1.2 * NF_IN_Q8_0_NMSE[spec.codebook]


def test_int2_takes_two_bits_where_blocks_are_64():
    assert carrier("int2", 64) is GgmlType.Q2_0
    assert carrier("int2", 32) is carrier("int2", 64, q2_0=False) is GgmlType.Q4_0
    raw = repack(random_block_tensor(BlockSpec("int2"), (4, 128)), GgmlType.Q2_0)
    assert raw.shape == (4, 2 * 18)


@pytest.mark.parametrize("name", NF_TABLES)
def test_nf_in_q8_0_over_normal_weights(name):
    tensor = random_block_tensor(BlockSpec(name), (512, 512), seed=3)
    expected = _without_tau(tensor)
    decoded = quants.dequantize(repack(tensor, GgmlType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    error = np.square((decoded - expected).astype(np.float64)).sum()
    assert error / np.square(expected.astype(np.float64)).sum() < NF_IN_Q8_0_NMSE[name]


@pytest.mark.parametrize("name", NF_TABLES)
def test_no_neighbour_of_an_nf_table_is_better(name):
    """Change any one entry by one, with the best step for it: the error under a normal grows."""
    tensor = random_block_tensor(BlockSpec(name, tau="none"), (512, 1024), seed=5)
    weight = np.bincount(tensor.codes().ravel(), minlength=2**tensor.spec.bits) / tensor.codes().size
    levels = CODEBOOKS[name].levels.astype(np.float64)

    def error(table: np.ndarray) -> float:
        step = (weight * table * levels).sum() / (weight * table * table).sum()
        return float((weight * (step * table - levels) ** 2).sum())

    best = NF_TABLES[name].astype(np.float64)
    assert len(set(best)) == len(best)
    for i in range(len(best)):
        for change in (-1, 1):
            neighbour = best.copy()
            neighbour[i] += change
            assert error(neighbour) > error(best)


def test_constant_and_tiny_blocks_survive():
    tensor = random_block_tensor(BlockSpec("nf4", scale="f16"), (2, 128))
    scale = np.array([[0.0, 6e-8], [1e-3, 2e-7]], np.float16)
    tensor = replace(tensor, parts={**tensor.parts, "scale": scale})
    decoded = quants.dequantize(repack(tensor, GgmlType.Q8_0), gguf.GGMLQuantizationType.Q8_0)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded[0], 0)  # smaller than fp16 over 124 can say


def test_scales_that_are_not_fp16_are_refused():
    tensor = random_block_tensor(BlockSpec("int4", scale_rounding="none"), (4, 128))
    with pytest.raises(UnsupportedModel, match=r"not fp16 numbers.*--profile irq"):
        repack(tensor, GgmlType.Q4_0)


def test_a_type_that_does_not_carry_the_codebook_is_refused():
    with pytest.raises(UnsupportedModel, match="Q2_0 does not carry int4"):
        repack(random_block_tensor(BlockSpec("int4"), (4, 128)), GgmlType.Q2_0)


def test_a_foreign_code_is_found():
    raw = repack(random_block_tensor(BlockSpec("nf4"), (4, 128)), GgmlType.Q8_0)
    raw[0, 2] = 1  # no level of nf4 is 1
    with pytest.raises(MalformedFile, match="a code that nf4 does not have"):
        unpack_codes(raw, "nf4", GgmlType.Q8_0)


def test_heads_are_interleaved_as_llama_cpp_wants():
    rows = np.arange(16)  # two heads of 8
    assert interleave_heads(rows, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    matrix = np.random.default_rng(0).standard_normal((64, 3))
    np.testing.assert_array_equal(uninterleave_heads(interleave_heads(matrix, 16), 16), matrix)

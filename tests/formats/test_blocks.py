"""Blocks: packing, codecs, storage, golden vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_formats.blocks import BlockSpec, BlockTensor, encode, encode_int8, part_layout
from irq_formats.codebooks import CODEBOOKS
from irq_formats.codecs import block_codec
from irq_formats.double_quant import GROUP_SIZE, decode_dq8, dynamic_map, encode_dq8
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.packing import block_bytes, pack, unpack

SMALL = [name for name in CODEBOOKS if name != "int8"]
specs = st.builds(
    BlockSpec,
    codebook=st.sampled_from(SMALL),
    block_size=st.sampled_from([32, 64]),
    scale=st.sampled_from(["dq8", "f16", "f32"]),
    tau=st.sampled_from(["dq8", "f16", "f32", "none"]),
    scale_rounding=st.sampled_from(["fp16", "none"]),
)


def random_pair(
    rng: np.random.Generator, rows: int, spec: BlockSpec
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    weight = rng.standard_normal((rows, 2 * spec.block_size)).astype(np.float32)
    blocks = weight.reshape(rows, 2, spec.block_size)
    tau = blocks.mean(axis=2)
    if spec.tau == "none":
        tau = np.zeros_like(tau)
    scale = np.abs(blocks - tau[..., None]).max(axis=2)
    return weight, scale, tau


@given(
    st.sampled_from([2, 3, 4]),
    st.sampled_from([32, 64]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0),
)
def test_packing_round_trip(bits: int, block_size: int, rows: int, nb: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, nb * block_size), dtype=np.uint8)
    packed = pack(codes, bits, block_size)
    assert packed.shape == (rows, nb * block_bytes(bits, block_size))
    np.testing.assert_array_equal(unpack(packed, bits, block_size), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_byte_string_is_a_block(bits: int) -> None:
    packed = np.random.default_rng(0).integers(0, 256, (7, 3 * block_bytes(bits, 64)), dtype=np.uint8)
    np.testing.assert_array_equal(pack(unpack(packed, bits, 64), bits, 64), packed)


def test_byte_order_is_the_specified_one() -> None:
    e = np.arange(64, dtype=np.uint8)[None]
    four = pack(e % 16, 4, 64)[0]
    assert all(four[j] == (j % 16) | ((j + 32) % 16) << 4 for j in range(32))
    two = pack(e % 4, 2, 64)[0]
    assert all(two[j] == sum(((j + 16 * plane) % 4) << (2 * plane) for plane in range(4)) for j in range(16))
    three = pack((e * 5) % 8, 3, 64)[0]
    high = int.from_bytes(three[16:].tobytes(), "little")
    assert all(high >> i & 1 == (i * 5) % 8 >> 2 for i in range(64))


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.create_dynamic_map().numpy()
    np.testing.assert_array_equal(dynamic_map().view(np.uint32), theirs.view(np.uint32))
    np.testing.assert_array_equal(
        CODEBOOKS["nf4"].levels, functional.get_4bit_type("nf4", device="cpu").numpy()
    )


def test_low_bit_codebooks_follow_their_construction() -> None:
    """IR-QLoRA tables 12 and 13: quantiles of the normal distribution, to the printed digits."""
    from statistics import NormalDist

    quantile, end = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(p) for p in np.linspace(end, 0.5, 5)[:-1]]
    negative = [-quantile(p) for p in np.linspace(end, 0.5, 4)[:-1]]
    nf3 = np.sort(np.array([*negative, 0, *positive]) / positive[0])
    np.testing.assert_allclose(CODEBOOKS["nf3"].levels, nf3, atol=1e-7)
    edges = np.array([quantile(p) for p in np.linspace(1 - end, end, 5)])
    middles = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(CODEBOOKS["nf2"].levels, middles / middles.max(), atol=1e-7)


@given(st.integers(1, 3 * GROUP_SIZE), st.booleans(), st.integers(0), st.sampled_from([1e-8, 1.0, 1e4]))
def test_dq8_chooses_the_nearest_entry(count: int, with_mean: bool, seed: int, size: float) -> None:
    values = (np.random.default_rng(seed).standard_normal(count) * size).astype(np.float32)
    if with_mean:
        values = np.abs(values)
    index, absmax, mean = encode_dq8(values, with_mean=with_mean)
    decoded = decode_dq8(index, absmax, mean)
    assert absmax.shape == (-(-count // GROUP_SIZE),)
    assert not with_mean or (decoded >= 0).all()
    step = np.repeat(absmax, GROUP_SIZE)[:count] * np.float32(0.0072)  # widest half gap of the map, and ends
    assert (np.abs(decoded - values) <= step + np.float32(1e-6) * np.abs(mean) + 2 * step * with_mean).all()


def test_dq8_of_zeros_is_zero() -> None:
    index, absmax, mean = encode_dq8(np.zeros(300, np.float32), with_mean=False)
    assert not decode_dq8(index, absmax, mean).any()


@settings(deadline=None)
@given(specs, st.integers(1, 4), st.integers(0))
def test_encode_stores_what_part_layout_says(spec: BlockSpec, rows: int, seed: int) -> None:
    weight, scale, tau = random_pair(np.random.default_rng(seed), rows, spec)
    tensor = encode(weight, scale, tau, spec)
    tensor.validate()
    assert tensor.spec == spec
    assert {k: (v.dtype, v.shape) for k, v in tensor.parts.items()} == part_layout(spec, weight.shape)
    again = BlockTensor(spec, tensor.shape, dict(tensor.parts))
    np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())


@settings(deadline=None)
@given(specs, st.integers(0))
def test_codes_are_the_nearest_level(spec: BlockSpec, seed: int) -> None:
    weight, scale, tau = random_pair(np.random.default_rng(seed), 2, spec)
    tensor = encode(weight, scale, tau, spec)
    s, t = tensor.scale()[..., None], tensor.tau()[..., None]
    levels = CODEBOOKS[spec.codebook].levels.astype(np.float64)
    blocks = weight.reshape(2, -1, spec.block_size)
    best = np.abs(blocks[..., None] - (s * levels[:, None, None, None] + t).transpose(1, 2, 3, 0)).min(
        axis=-1
    )
    error = np.abs(blocks - tensor.dequantize().reshape(blocks.shape).astype(np.float64))
    assert (error <= best * (1 + 1e-5) + 1e-6).all()  # float32 thresholds: a tie may fall either way


def test_scale_is_rounded_to_fp16_unless_told_otherwise() -> None:
    spec = BlockSpec("int4")
    weight, scale, tau = random_pair(np.random.default_rng(0), 4, spec)
    rounded = encode(weight, scale, tau, spec).scale()
    kept = encode(weight, scale, tau, replace(spec, scale_rounding="none")).scale()
    np.testing.assert_array_equal(rounded, rounded.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(rounded, kept.astype(np.float16).astype(np.float32))
    assert (rounded != kept).any()


@settings(deadline=None)
@given(specs, st.floats(-100, 100, width=32), st.integers(0))
def test_constant_blocks_decode_exactly(spec: BlockSpec, constant: float, seed: int) -> None:
    weight, scale, tau = random_pair(np.random.default_rng(seed), 3, spec)
    value = np.float32(0 if spec.tau == "none" else constant)
    weight[1, : spec.block_size], scale[1, 0], tau[1, 0] = value, 0, value
    weight[2, : spec.block_size], scale[2, 0], tau[2, 0] = 0, 0, 0
    tensor = encode(weight, scale, tau, spec)
    decoded = tensor.dequantize()
    assert np.isfinite(decoded).all()
    assert (decoded[1, : spec.block_size] == value).all()
    assert (decoded[2, : spec.block_size] == 0).all()


def test_bits_per_weight() -> None:
    layout = part_layout(BlockSpec(), (4096, 4096))
    bits = 8 * sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.values()) / 4096**2
    assert bits == pytest.approx(4.253906 + 32 / 4096**2, abs=1e-6)  # facts/ir-qlora.md section 1.3


def test_int8_is_q8_0() -> None:
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    weight = np.random.default_rng(3).standard_normal((9, 96)).astype(np.float32)
    weight[2, :32] = 0
    weight[3, 32:64] *= 1e-3 / 127  # a scale that is subnormal in fp16
    half, below = np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(0))
    weight[4, :6] = [127, half, below, -half, -below, 1.5]  # in units of the scale, 1
    weight[4, 6:32] = 0
    tensor = encode_int8(weight)
    tensor.validate()
    assert tensor.parts["codes"].view(np.int8)[4, :6].tolist() == [127, 1, 0, -1, 0, 2]
    theirs = quants.quantize(weight, GGMLQuantizationType.Q8_0).reshape(9, 3, 34)
    np.testing.assert_array_equal(theirs[..., :2].copy().view(np.float16)[..., 0], tensor.parts["scale"])
    np.testing.assert_array_equal(theirs[..., 2:].reshape(9, 96), tensor.parts["codes"])
    np.testing.assert_array_equal(
        tensor.dequantize(), quants.dequantize(theirs.reshape(9, -1), GGMLQuantizationType.Q8_0)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale_absmax", np.nan), ("scale_absmax", -1), ("scale_offset", np.inf), ("tau_absmax", np.nan)],
)
def test_bad_values_are_refused(name: str, value: float) -> None:
    spec = BlockSpec()
    weight, scale, tau = random_pair(np.random.default_rng(0), 2, spec)
    tensor = encode(weight, scale, tau, spec)
    parts = {key: part.copy() for key, part in tensor.parts.items()}
    parts[name].reshape(-1)[0] = value
    with pytest.raises(MalformedFile, match=name):
        BlockTensor(spec, tensor.shape, parts).validate("w")


def test_bad_parts_are_refused() -> None:
    spec = BlockSpec()
    weight, scale, tau = random_pair(np.random.default_rng(0), 2, spec)
    tensor = encode(weight, scale, tau, spec)
    for parts in (
        {k: v for k, v in tensor.parts.items() if k != "tau"},
        {**tensor.parts, "extra": tensor.parts["tau"]},
        {**tensor.parts, "codes": tensor.parts["codes"][:, :-1]},
        {**tensor.parts, "scale": tensor.parts["scale"].astype(np.float32)},
    ):
        with pytest.raises(MalformedFile):
            BlockTensor(spec, tensor.shape, parts).validate("w")


@pytest.mark.parametrize(
    "values",
    [
        {"codebook": "nf5"},
        {"block_size": 128},
        {"scale": "none"},
        {"codebook": "int8", "block_size": 32},
        {"codebook": "int8", "block_size": 64, "scale": "f16", "tau": "none"},
    ],
)
def test_unknown_specs_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UnsupportedModel):
        BlockSpec.from_dict({**BlockSpec().to_dict(), **values})


@pytest.mark.parametrize("values", [{"codebook": 4}, {"block_size": "64"}, {"block_size": True}, {"more": 1}])
def test_malformed_specs_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(MalformedFile):
        BlockSpec.from_dict({**BlockSpec().to_dict(), **values})


def test_indivisible_shapes_and_bad_numbers_are_refused() -> None:
    spec = BlockSpec()
    weight, scale, tau = random_pair(np.random.default_rng(0), 2, spec)
    with pytest.raises(UnsupportedModel, match="172"):
        part_layout(spec, (64, 172))
    with pytest.raises(UnsupportedModel, match="not finite"):
        encode(np.where(weight > 1, np.float32(np.nan), weight), scale, tau, spec)
    with pytest.raises(UnsupportedModel, match="fp16"):
        encode(weight * 1e6, scale * np.float32(1e6), tau, replace(spec, scale="f16"))


def test_golden_vectors(repo: Path) -> None:
    """The committed vectors decode to the committed weights, and re-encode to the same codes."""
    directory = repo / "formats" / "vectors" / "blocks"
    cases = json.loads((directory / "blocks.json").read_text())
    assert {case["spec"]["codebook"] for case in cases} == set(CODEBOOKS)
    for case in cases:
        data = (directory / f"{case['name']}.bin").read_bytes()
        arrays = {
            key: np.frombuffer(data, a["dtype"], int(np.prod(a["shape"])), a["offset"]).reshape(a["shape"])
            for key, a in case["arrays"].items()
        }
        spec = BlockSpec.from_dict(case["spec"])
        parts = {
            k.removeprefix("part_"): v for k, v in arrays.items() if k.startswith("part_") or k == "codes"
        }
        tensor = BlockTensor(spec, tuple(case["shape"]), parts)
        tensor.validate(case["name"])
        np.testing.assert_array_equal(tensor.scale(), arrays["effective_scale"])
        np.testing.assert_array_equal(tensor.tau(), arrays["effective_tau"])
        np.testing.assert_array_equal(tensor.dequantize(), arrays["decoded"], strict=True)
        if spec.codebook != "int8":
            codes = block_codec(spec.codebook, spec.block_size).encode(
                arrays["weight"], tensor.scale(), tensor.tau()
            )
            np.testing.assert_array_equal(spec.codec.pack(codes), arrays["codes"])

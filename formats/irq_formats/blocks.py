"""Block-quantised tensors (spec/irq-blocks.md): ``w[o, i] = scale[o, b] * levels[code[o, i]] + tau[o, b]``.

A :class:`BlockTensor` is what moves through the toolchain bit for bit: a few named arrays ("parts")
and the :class:`BlockSpec` that says how to read them. Nothing here searches for scales or offsets;
:func:`encode` stores a given pair and chooses the codes last, against what was really stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from irq_formats.codebooks import CODEBOOKS
from irq_formats.codecs import BlockCodec, block_codec
from irq_formats.double_quant import check_zero_groups, decode_dq8, encode_dq8, group_count
from irq_formats.errors import MalformedFile, UnsupportedModel

__all__ = ["BlockSpec", "BlockTensor", "PartLayout", "encode", "encode_int8", "part_layout", "store_scales"]

F32 = NDArray[np.float32]
#: dtype and shape of one stored array.
PartLayout = tuple[np.dtype[np.generic], tuple[int, ...]]

_STORAGE: dict[str, np.dtype[np.generic]] = {
    "dq8": np.dtype(np.uint8),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}
_F32: np.dtype[np.generic] = np.dtype(np.float32)


@dataclass(frozen=True)
class BlockSpec:
    """How a tensor is quantised and stored.

    Attributes:
        codebook: ``nf4 nf3 nf2 int4 int3 int2 int8``.
        block_size: Weights per block, along the input dimension: 64 or 32.
        scale: Storage of the scales: ``dq8``, ``f16`` or ``f32``.
        tau: Storage of the offsets: the same, or ``none``.
        scale_rounding: ``fp16`` rounds the expanded dq8 scale to fp16 (every stock format holds it
            exactly); ``none`` keeps the float32 (states imported from bitsandbytes).
    """

    codebook: str = "nf4"
    block_size: int = 64
    scale: str = "dq8"
    tau: str = "dq8"
    scale_rounding: str = "fp16"

    def __post_init__(self) -> None:
        block_codec(self.codebook, self.block_size)
        for name, allowed in (
            ("scale", tuple(_STORAGE)),
            ("tau", (*_STORAGE, "none")),
            ("scale_rounding", ("fp16", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise UnsupportedModel(
                    f"unknown {name} storage", expected=" | ".join(allowed), got=getattr(self, name)
                )
        if self.codebook == "int8" and (self.scale, self.tau) != ("f16", "none"):
            raise UnsupportedModel(
                "int8 is Q8_0", expected="scale f16, tau none", got=f"{self.scale}, {self.tau}"
            )

    @property
    def codec(self) -> BlockCodec:
        """The codec of the codes."""
        return block_codec(self.codebook, self.block_size)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return CODEBOOKS[self.codebook].bits

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> BlockSpec:
        """Read the fields back.

        Raises:
            MalformedFile: A field is missing, unknown or of the wrong type.
            UnsupportedModel: A field has a value this version does not know.
        """
        types = {"block_size": int}
        names = [field.name for field in fields(cls)]
        if sorted(values) != sorted(names):
            raise MalformedFile("block spec fields", expected=sorted(names), got=sorted(values))
        for name in names:
            kind = types.get(name, str)
            if type(values[name]) is not kind:
                raise MalformedFile(
                    f"block spec field {name}", expected=kind.__name__, got=repr(values[name])
                )
        return cls(**values)  # type: ignore[arg-type]


def _check_shape(spec: BlockSpec, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or min(shape) <= 0 or shape[1] % spec.block_size:
        raise UnsupportedModel(
            "tensor does not divide into blocks",
            expected=f"(out, in) with in a positive multiple of {spec.block_size}",
            got=shape,
            hint="Use --block-size 32 or keep this tensor in floating point",
        )


def part_layout(spec: BlockSpec, shape: tuple[int, int]) -> dict[str, PartLayout]:
    """Return dtype and shape of every stored array of a tensor ``(out, in)``, in storage order.

    Raises:
        UnsupportedModel: The input dimension is not a multiple of the block size.
    """
    _check_shape(spec, shape)
    out, width = shape
    nb = width // spec.block_size
    groups = (group_count(out * nb),)
    layout: dict[str, PartLayout] = {"codes": (np.dtype(np.uint8), (out, width * spec.bits // 8))}
    layout["scale"] = (_STORAGE[spec.scale], (out, nb))
    if spec.scale == "dq8":
        layout["scale_absmax"] = (_F32, groups)
        layout["scale_offset"] = (_F32, (1,))
    if spec.tau != "none":
        layout["tau"] = (_STORAGE[spec.tau], (out, nb))
    if spec.tau == "dq8":
        layout["tau_absmax"] = (_F32, groups)
    return layout


@dataclass(frozen=True)
class BlockTensor:
    """A block-quantised matrix.

    Attributes:
        spec: How to read the parts.
        shape: ``(out, in)`` of the matrix.
        parts: The stored arrays, as :func:`part_layout` describes them.
    """

    spec: BlockSpec
    shape: tuple[int, int]
    parts: Mapping[str, NDArray[np.generic]]

    def codes(self) -> NDArray[np.uint8]:
        """Unpacked codes, uint8 ``(out, in)``."""
        return self.spec.codec.unpack(self.parts["codes"].view(np.uint8))

    def scale(self) -> F32:
        """Effective scales, float32 ``(out, nb)``: exactly what decoding multiplies with."""
        if self.spec.scale != "dq8":
            return self.parts["scale"].astype(np.float32)
        mean = self.parts["scale_offset"][0]
        scale = decode_dq8(self.parts["scale"], self.parts["scale_absmax"], mean)  # type: ignore[arg-type]
        return _fp16(scale) if self.spec.scale_rounding == "fp16" else scale

    def tau(self) -> F32:
        """Effective offsets, float32 ``(out, nb)``; zeros where there are none."""
        if self.spec.tau == "none":
            return np.zeros((self.shape[0], self.shape[1] // self.spec.block_size), np.float32)
        if self.spec.tau != "dq8":
            return self.parts["tau"].astype(np.float32)
        return decode_dq8(self.parts["tau"], self.parts["tau_absmax"])  # type: ignore[arg-type]

    def dequantize(self) -> F32:
        """Decode the matrix, float32 ``(out, in)``."""
        return self.spec.codec.decode(self.codes(), self.scale(), self.tau())

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / prod(self.shape)

    def validate(self, where: str = "block tensor") -> None:
        """Check every part against its layout and every value against the specification.

        Raises:
            MalformedFile: A part is missing, extra, of wrong dtype or shape, or as :meth:`check_scales`.
        """
        layout = part_layout(self.spec, self.shape)
        if set(layout) != set(self.parts):
            raise MalformedFile("parts", where=where, expected=sorted(layout), got=sorted(self.parts))
        for name, (dtype, shape) in layout.items():
            part = self.parts[name]
            if part.dtype != dtype or part.shape != shape:
                raise MalformedFile(
                    f"part {name}",
                    where=where,
                    expected=(dtype.name, shape),
                    got=(part.dtype.name, part.shape),
                )
        self.check_scales(where)

    def check_scales(self, where: str = "block tensor") -> None:
        """Check every value of all parts but the codes, of which any byte is valid (spec sections 5 and 6).

        States of bitsandbytes and of the released code (``scale_rounding: none``) may have negative effective
        scales, and any index in a group whose absmax is 0.

        Raises:
            MalformedFile: A stored or effective value is not finite, a scale or an absmax is negative, or a
                group whose absmax is 0 has another index than that of 0.
        """
        for name, part in self.parts.items():
            if part.dtype.kind != "f":
                continue
            if not np.isfinite(part).all():
                raise MalformedFile(f"part {name} is not finite", where=where)
            if name in ("scale", "scale_absmax", "tau_absmax") and (part < 0).any():  # type: ignore[operator]
                raise MalformedFile(f"part {name} has a negative value", where=where)
        is_ours = self.spec.scale_rounding != "none"
        for name in ("scale", "tau"):
            if is_ours and f"{name}_absmax" in self.parts:
                check_zero_groups(self.parts[name], self.parts[f"{name}_absmax"], f"{where}.{name}")
        with np.errstate(over="ignore"):
            scale, tau = self.scale(), self.tau()
        if not np.isfinite(scale).all() or (is_ours and (scale < 0).any()):
            raise MalformedFile("a block scale is negative or not finite", where=where)
        if not np.isfinite(tau).all():
            raise MalformedFile("a block offset is not finite", where=where)


def _fp16(values: F32) -> F32:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _store(values: F32, storage: str, name: str) -> dict[str, NDArray[np.generic]]:
    """Return the stored parts of scales or offsets."""
    if storage != "dq8":
        with np.errstate(over="ignore"):
            return {name: values.astype(_STORAGE[storage])}
    index, absmax, mean = encode_dq8(values, with_mean=name == "scale")
    parts: dict[str, NDArray[np.generic]] = {name: index, f"{name}_absmax": absmax}
    if name == "scale":
        parts["scale_offset"] = np.array([mean], np.float32)
    return parts


def store_scales(scale: F32, tau: F32, spec: BlockSpec, shape: tuple[int, int]) -> BlockTensor:
    """Store a scale and an offset per block; the codes are still to be chosen (see :func:`encode`).

    A block whose scale is zero is constant (its value is its offset) and must decode exactly: where
    the storage asked for cannot hold such an offset (or, for nf2, a zero scale), it is promoted for
    this tensor, which the returned ``spec`` shows.

    Args:
        scale: float32 ``(out, nb)``, finite, not negative.
        tau: float32 ``(out, nb)``, finite; ignored if ``spec.tau == "none"``.
        spec: Codebook and storage; not int8 (see :func:`encode_int8`).
        shape: ``(out, in)`` of the matrix.

    Returns:
        A tensor that has every part but ``codes``.

    Raises:
        UnsupportedModel: Shapes do not divide into blocks, values are not finite, or a scale exceeds
            fp16 where fp16 is asked for.
    """
    _check_shape(spec, shape)
    blocks = (shape[0], shape[1] // spec.block_size)
    if spec.tau == "none":
        tau = np.zeros(blocks, np.float32)
    _check_values("scale", scale, blocks)
    _check_values("tau", tau, blocks)
    constant = scale == 0
    while True:
        parts = _store(scale, spec.scale, "scale")
        if spec.tau != "none":
            parts |= _store(tau, spec.tau, "tau")
        stored = BlockTensor(spec, shape, parts)
        effective_scale, effective_tau = stored.scale(), stored.tau()
        if not (np.isfinite(effective_scale).all() and np.isfinite(effective_tau).all()):
            raise UnsupportedModel(
                "a block's scale or offset exceeds fp16",
                got=float(max(scale.max(), np.abs(tau).max())),
                hint="Store them in f32 (scale_rounding none)",
            )
        if (effective_tau != tau)[constant].any():
            spec = replace(spec, tau="f32")
        elif (
            CODEBOOKS[spec.codebook].levels[CODEBOOKS[spec.codebook].zero_code]
            and effective_scale[constant].any()
        ):
            spec = replace(spec, scale="f16")
        else:
            return stored


def encode(weight: F32, scale: F32, tau: F32, spec: BlockSpec) -> BlockTensor:
    """Store a scale and an offset per block, then choose the codes against what was stored.

    Args:
        weight: float32 ``(out, in)``, finite.
        scale: As for :func:`store_scales`, which may promote the storage.
        tau: As for :func:`store_scales`.
        spec: Codebook and storage; not int8 (see :func:`encode_int8`).

    Raises:
        UnsupportedModel: Shapes do not divide into blocks, values are not finite, or a scale exceeds
            fp16 where fp16 is asked for.
    """
    _check_shape(spec, weight.shape)
    _check_values("weight", weight, weight.shape)
    stored = store_scales(scale, tau, spec, (weight.shape[0], weight.shape[1]))
    codec = stored.spec.codec
    codes = codec.pack(codec.encode(weight, stored.scale(), stored.tau()))
    return replace(stored, parts={"codes": codes, **stored.parts})


def _check_values(name: str, values: F32, shape: tuple[int, ...]) -> None:
    if values.shape != shape or values.dtype != np.float32 or not np.isfinite(values).all():
        raise UnsupportedModel(
            f"{name} cannot be stored",
            expected=f"finite float32 {shape}",
            got=f"{values.dtype} {values.shape}" + ("" if np.isfinite(values).all() else ", not finite"),
        )


def encode_int8(weight: F32) -> BlockTensor:
    """Quantise to int8, block 32, fp16 scales: exactly ggml's Q8_0 (for embeddings and heads).

    Args:
        weight: float32 ``(out, in)``, finite, ``in % 32 == 0``.

    Raises:
        UnsupportedModel: The shape does not divide into blocks, or values are not finite.
    """
    spec = BlockSpec("int8", 32, scale="f16", tau="none")
    _check_shape(spec, weight.shape)
    if not np.isfinite(weight).all():
        raise UnsupportedModel("weight is not finite")
    out, width = weight.shape
    scale = np.abs(weight).reshape(out, -1, 32).max(axis=2) / np.float32(127)
    codes = spec.codec.encode(weight, scale, np.zeros_like(scale))
    return BlockTensor(spec, (out, width), {"codes": codes, "scale": scale.astype(np.float16)})

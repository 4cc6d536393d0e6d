"""bitsandbytes' serialised NF4 weights as block tensors, bit for bit, with tau = 0.

A weight ``M.weight`` of n elements comes as n / 2 bytes (the even element in the *high* nibble) and a state::

    M.weight.absmax                           U8 indices (double-quantised) or F32, one a block
    M.weight.quant_map                        F32 (16,): the NF4 levels
    M.weight.nested_absmax, .nested_quant_map F32: the second level, if double-quantised
    M.weight.quant_state.bitsandbytes__nf4    U8: JSON with shape, blocksize, dtype, nested_*

Blocks run over the flattened matrix, as ours do inside a row; so codes are only reordered within their
block, indices and absmax move as they are. transformers and unsloth write the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.checkpoint import FLOAT_DTYPES, hf_tensor_shapes
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import GROUP_SIZE, dynamic_map
from irq_formats.errors import MalformedFile, ParityFailed, UnsupportedModel
from irq_formats.fields import Fields
from irq_formats.model import ModelConfig
from irq_formats.names import linear_names
from irq_formats.safetensors_io import SafeTensors, TensorRef
from irq_formats.strict_json import parse_object

if TYPE_CHECKING:
    import torch

__all__ = ["BnbPlan", "bnb_dequantize", "check_bnb_config", "check_decoding", "plan_bnb", "read_bnb_tensor"]

_STATE = "quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16
_BLOCK_SIZES = (64, 32)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class BnbPlan:
    """What becomes of every tensor.

    Attributes:
        modules: Quantised modules with their spec, in the order of the model.
        shapes: ``(out, in)`` of each.
        plain: Tensors kept in their own dtype.
        skipped: Linears that stay in floating point and tensors left out, with the reason.
    """

    modules: Mapping[str, BlockSpec]
    shapes: Mapping[str, tuple[int, int]]
    plain: tuple[TensorRef, ...]
    skipped: dict[str, str]

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        layouts = [part_layout(spec, self.shapes[module]) for module, spec in self.modules.items()]
        blocks = [dtype.itemsize * prod(shape) for layout in layouts for dtype, shape in layout.values()]
        return sum(blocks) + sum(ref.nbytes for ref in self.plain)


def check_bnb_config(config: Mapping[str, object], where: Path) -> None:
    """Refuse what is not NF4 by the name it has in ``quantization_config``.

    Raises:
        UnsupportedModel: LLM.int8 or FP4.
    """
    if config.get("load_in_8bit"):
        raise UnsupportedModel(
            "an LLM.int8 model (load_in_8bit)",
            where=where,
            expected="NF4 (load_in_4bit, bnb_4bit_quant_type nf4)",
            hint="Quantise its floating-point weights: irq-export quantize",
        )
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise _wrong_type(str(kind), where)


def _wrong_type(kind: str, where: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"bitsandbytes {kind.upper()} weights: no codebook here has these levels",
        where=where,
        expected="nf4",
        got=kind,
        hint="Quantise the floating-point weights: irq-export quantize",
    )


def plan_bnb(model: ModelConfig, source: SafeTensors, path: Path) -> BnbPlan:
    """Pair the tensors of a model with those of a bitsandbytes file; nothing is left over.

    Raises:
        UnsupportedModel: FP4, a block size, map or quantised module that a checkpoint cannot hold.
        MalformedFile: Tensors are missing, unknown, or of the wrong shape.
    """
    unused = dict(source.tensors)
    linears = set(linear_names(model))
    modules: dict[str, BlockSpec] = {}
    shapes: dict[str, tuple[int, int]] = {}
    plain: list[TensorRef] = []
    skipped: dict[str, str] = {}
    for name, shape in hf_tensor_shapes(model).items():
        where = f"{path}: {name}"
        ref = unused.pop(name, None)
        if ref is None:
            raise MalformedFile("tensor missing", where=where, expected=shape)
        state_keys = [key for key in unused if key.startswith(f"{name}.")]
        module = name.removesuffix(".weight")
        if state_keys:
            if module not in linears:
                raise UnsupportedModel("quantised, and not a linear layer of the body", where=where)
            matrix = (shape[0], shape[1])
            modules[module], shapes[module] = _spec_of(source, name, state_keys, matrix, where), matrix
            for key in state_keys:
                del unused[key]
            continue
        if ref.shape != shape or ref.dtype not in FLOAT_DTYPES:
            raise MalformedFile(
                "neither a plain tensor nor a bitsandbytes state",
                where=where,
                expected=f"{' | '.join(FLOAT_DTYPES)} {shape}",
                got=f"{ref.dtype} {ref.shape}",
            )
        if module in linears:
            skipped[name] = "kept in floating point by bitsandbytes"
        plain.append(ref)
    for name in unused:
        skipped[name] = _reason_to_drop(name, model, source, path)
    if not modules:
        raise UnsupportedModel("no bitsandbytes weights in it", where=path, expected=f"<name>.{_STATE}nf4")
    return BnbPlan(modules, shapes, tuple(plain), skipped)


def _reason_to_drop(name: str, model: ModelConfig, source: SafeTensors, path: Path) -> str:
    if name.endswith("rotary_emb.inv_freq"):
        return "left out: computed from rope_theta"
    if name == _HEAD and model.tie_word_embeddings:
        if np.array_equal(source.read(name), source.read(_EMBEDDING)):
            return f"left out: tied to {_EMBEDDING}"
        raise UnsupportedModel("differs from the embedding it is tied to", where=f"{path}: {name}")
    raise MalformedFile("a tensor that the model does not have", where=f"{path}: {name}")


def _read_state(source: SafeTensors, key: str, where: str) -> Fields:
    """Parse the JSON that bitsandbytes keeps in a tensor of bytes."""
    ref = source.tensors[key]
    if ref.dtype != "U8" or ref.nbytes > _MAX_STATE_BYTES:
        raise MalformedFile(
            "quantisation state", where=where, expected="U8, small", got=(ref.dtype, ref.nbytes)
        )
    return Fields(parse_object(source.read(key).tobytes(), where=where), where)


def _spec_of(
    source: SafeTensors, name: str, keys: list[str], shape: tuple[int, int], where: str
) -> BlockSpec:
    """Check the state of one weight completely and say how we store it."""
    state_keys = [key for key in keys if key.startswith(f"{name}.{_STATE}")]
    if len(state_keys) != 1:
        raise MalformedFile("quantisation state", where=where, expected=f"one {_STATE}nf4", got=sorted(keys))
    kind = state_keys[0].removeprefix(f"{name}.{_STATE}")
    state = _read_state(source, state_keys[0], where)
    if kind != "nf4" or state.string("quant_type") != "nf4":
        raise _wrong_type(kind if kind != "nf4" else state.string("quant_type"), where)
    block_size = state.integer("blocksize")
    if block_size not in _BLOCK_SIZES or shape[1] % block_size:
        raise UnsupportedModel(
            "blocks that do not fit into rows",
            where=where,
            expected=f"block size 64 or 32 that divides {shape[1]} inputs",
            got=block_size,
            hint="Exclude the layer with llm_int8_skip_modules, or quantise anew: irq-export quantize",
        )
    if list(map(int, _list(state.values.get("shape"), where))) != list(shape):
        raise MalformedFile("shape in the state", where=where, expected=shape, got=state.values["shape"])
    nested = f"{name}.nested_absmax" in keys
    blocks = prod(shape) // block_size
    expected = {"absmax": ("U8" if nested else "F32", blocks), "quant_map": ("F32", 16)}
    if nested:
        expected |= {"nested_absmax": ("F32", -(-blocks // GROUP_SIZE)), "nested_quant_map": ("F32", 256)}
        if state.integer("nested_blocksize") != GROUP_SIZE:
            raise UnsupportedModel(
                "second-level groups", where=where, expected=GROUP_SIZE, got=state.integer("nested_blocksize")
            )
        state.number("nested_offset")
    if set(keys) != {f"{name}.{part}" for part in expected} | set(state_keys):
        raise MalformedFile("tensors of the state", where=where, expected=sorted(expected), got=sorted(keys))
    for part, (dtype, count) in expected.items():
        ref = source.tensors[f"{name}.{part}"]
        if ref.dtype != dtype or prod(ref.shape) != count:
            raise MalformedFile(
                part, where=where, expected=f"{dtype}, {count} values", got=f"{ref.dtype} {ref.shape}"
            )
    if source.tensors[name].nbytes * 2 != prod(shape):
        raise MalformedFile(
            "packed codes", where=where, expected=f"{prod(shape) // 2} bytes", got=source.tensors[name].nbytes
        )
    _check_map(source, f"{name}.quant_map", CODEBOOKS["nf4"].levels, where)
    if nested:
        _check_map(source, f"{name}.nested_quant_map", dynamic_map(), where)
    scale = "dq8" if nested else "f32"
    return BlockSpec("nf4", block_size, scale=scale, tau="none", scale_rounding="none")


def _list(value: object, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise MalformedFile("shape in the state", where=where, expected="a list of integers", got=value)
    return value


def _check_map(source: SafeTensors, key: str, expected: NDArray[np.float32], where: str) -> None:
    if not np.array_equal(source.read(key).reshape(-1), expected):
        raise UnsupportedModel(
            f"{key.rpartition('.')[2]} holds other values than bitsandbytes has today",
            where=where,
            hint="Quantise the floating-point weights anew: irq-export quantize",
        )


def read_bnb_tensor(source: SafeTensors, module: str, spec: BlockSpec, shape: tuple[int, int]) -> BlockTensor:
    """Return one weight; codes reordered within their blocks, everything else as it was.

    Args:
        source: The file.
        module: A key of :attr:`BnbPlan.modules`.
        spec: Its value.
        shape: ``(out, in)``.
    """
    name = f"{module}.weight"
    blocks = (shape[0], shape[1] // spec.block_size)
    packed: U8 = np.ascontiguousarray(source.read(name)).view(np.uint8).reshape(-1)
    codes = np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=1).reshape(shape)
    parts: dict[str, NDArray[np.generic]] = {
        "codes": spec.codec.pack(codes),
        "scale": source.read(f"{name}.absmax").reshape(blocks),
    }
    if spec.scale == "dq8":
        state = _read_state(source, f"{name}.{_STATE}nf4", name)
        parts["scale_absmax"] = source.read(f"{name}.nested_absmax").reshape(-1)
        parts["scale_offset"] = np.array([state.number("nested_offset")], np.float32)
    return BlockTensor(spec, shape, parts)


def bnb_dequantize(source: SafeTensors, module: str) -> torch.Tensor:
    """Decode one weight with bitsandbytes itself, on the CPU, to float32 ``(out, in)``."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    name = f"{module}.weight"
    state = {
        key.removeprefix(f"{name}."): torch.from_numpy(np.ascontiguousarray(source.read(key)))
        for key in source.tensors
        if key.startswith(f"{name}.")
    }
    quant_state = QuantState.from_dict(state, torch.device("cpu"))
    quant_state.dtype = torch.float32
    packed = torch.from_numpy(np.ascontiguousarray(source.read(name)).view(np.uint8).reshape(-1, 1))
    weight: torch.Tensor = dequantize_4bit(packed, quant_state)
    return weight


def check_decoding(source: SafeTensors, module: str, tensor: BlockTensor) -> None:
    """Compare a written tensor, read back, with bitsandbytes' own decoding.

    Raises:
        ParityFailed: One value differs.
    """
    theirs = bnb_dequantize(source, module).numpy()
    ours = tensor.dequantize()
    if not np.array_equal(ours, theirs):
        wrong = int((ours != theirs).sum())
        raise ParityFailed(
            "decodes to other values than bitsandbytes", where=module, expected="0 differences", got=wrong
        )

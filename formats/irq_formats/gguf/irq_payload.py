"""The irq payload of a GGUF file, reading side: blocks and adapters (spec/irq-gguf.md).

Schema, version 1. ``NAME`` is a stock tensor name without its ``.weight``, such as ``blk.0.attn_q``.

Keys of a model (``general.architecture = "irq"``, ``general.type = "model"``)::

    irq.version                u32      1
    irq.base_hash              string   64 lower-case hex digits: hash of the quantised base
    irq.model.*                         irq_formats.model.ModelConfig, one key a field
    irq.blocks.name            string[] NAME of every block-quantised matrix, no duplicates
    irq.blocks.codebook        string[] nf4 | nf3 | nf2 | int4 | int3 | int2 | int8
    irq.blocks.block_size      u32[]    64 | 32
    irq.blocks.out             u32[]    rows of the matrix
    irq.blocks.in              u32[]    columns of the matrix, a multiple of block_size
    irq.blocks.scale           string[] dq8 | f16 | f32
    irq.blocks.tau             string[] dq8 | f16 | f32 | none
    irq.blocks.scale_rounding  string[] fp16 | none

The eight arrays are parallel. Keys of an adapter, embedded in a model or alone
(``general.architecture = "irq"``, ``general.type = "adapter"``, with ``irq.version``)::

    irq.adapter.name           string[] NAME of every adapted matrix, no duplicates
    irq.adapter.scaling        f64[]    multiplier of the branch: alpha / r
    irq.adapter.iec            bool[]   the layer has elastic connections, hence a .lora_beta
    irq.adapter.base_hash      string   optional; irq.base_hash of the base it was trained against

``iec`` is declared, not inferred, so that a file that lost a ``.lora_beta`` cannot pass for beta = 0.

Tensors, numpy order (out, in), rows never permuted. Of a block-quantised matrix, the parts of
:func:`irq_formats.blocks.part_layout`, and no ``NAME.weight``::

    NAME.codes          I8   (out, in * bits / 8)   bytes of packed codes (two's complement for int8)
    NAME.scale          I8 | F16 | F32  (out, nb)   I8: the byte of the dq8 index
    NAME.scale_absmax   F32  (groups,)              dq8 scale only
    NAME.scale_offset   F32  (1,)                   dq8 scale only
    NAME.tau            I8 | F16 | F32  (out, nb)   absent if tau is none
    NAME.tau_absmax     F32  (groups,)              dq8 tau only

Of an adapted matrix (block-quantised or not)::

    NAME.lora_a         F32  (r, in)
    NAME.lora_b         F32  (out, r)
    NAME.lora_beta      F32  (2,)                   beta1, beta2; iec only

Everything else is a stock tensor under its stock name, in F32, F16 or BF16.

Values are those that :meth:`BlockTensor.validate` accepts. Every violation is a :class:`MalformedFile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_formats.adapter import LoraLayer, check_base_hash
from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.fields import Fields
from irq_formats.gguf.reader import GgufFile

__all__ = [
    "ARCHITECTURE",
    "VERSION",
    "BlockEntry",
    "block_table",
    "check_base",
    "check_header",
    "load_block",
    "payload_names",
    "read_adapter",
    "read_base_hash",
    "read_blocks",
]

#: ``general.architecture`` of every irq file.
ARCHITECTURE = "irq"
#: The only ``irq.version`` there is.
VERSION = 1

_STORED_AS = {"uint8": "I8", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class BlockEntry:
    """One row of the ``irq.blocks.*`` table.

    Attributes:
        name: Stock tensor name without ``.weight``.
        spec: How the parts are read.
        shape: ``(out, in)``.
    """

    name: str
    spec: BlockSpec
    shape: tuple[int, int]


def check_header(gguf: GgufFile, kind: str) -> None:
    """Check that a file is of the irq profile, of a version we know, and a model with its hash or an adapter.

    Args:
        gguf: The open file.
        kind: ``model`` or ``adapter``.

    Raises:
        MalformedFile: It is not.
        UnsupportedModel: It was written by a later version.
    """
    fields = Fields(gguf.metadata, str(gguf.path))
    for key, expected in (("general.architecture", ARCHITECTURE), ("general.type", kind)):
        if (got := fields.string(key)) != expected:
            raise MalformedFile(
                f"not an irq {kind} file", where=f"{gguf.path}: {key}", expected=expected, got=got
            )
    if (version := fields.integer("irq.version")) != VERSION:
        raise UnsupportedModel(
            "this irq version is not known here",
            where=gguf.path,
            expected=VERSION,
            got=version,
            hint="Update irq-export",
        )
    if kind == "model" and read_base_hash(gguf) is None:  # else any adapter would do
        raise MalformedFile("required key missing", where=f"{gguf.path}: irq.base_hash")


def read_base_hash(gguf: GgufFile, key: str = "irq.base_hash") -> str | None:
    """Return a base hash (64 hex digits), or None where the key is absent.

    Raises:
        MalformedFile: The key holds anything else.
    """
    if key not in gguf.metadata:
        return None
    return Fields(gguf.metadata, str(gguf.path)).digest(key)


def check_base(model: GgufFile, adapter: GgufFile) -> None:
    """Check that an adapter was trained against this base (where it says so).

    Raises:
        WrongBase: It names another one.
    """
    got = read_base_hash(adapter, "irq.adapter.base_hash")
    check_base_hash(got, read_base_hash(model), adapter.path)


def _same_length(where: str, arrays: Mapping[str, object], expected: int) -> None:
    for key, values in arrays.items():
        if len(values) != expected:  # type: ignore[arg-type]
            raise MalformedFile(
                "parallel arrays differ in length",
                where=f"{where}: {key}",
                expected=expected,
                got=len(values),  # type: ignore[arg-type]
            )


def _no_duplicates(where: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise MalformedFile("listed twice", where=where, got=name)
        seen.add(name)


def block_table(gguf: GgufFile) -> dict[str, BlockEntry]:
    """Read the ``irq.blocks.*`` table and check every declared part (dtype and shape, not values).

    Raises:
        MalformedFile: The arrays contradict each other, a value is unknown, or a part is missing, of
            another type or of another shape.
    """
    where = str(gguf.path)
    fields = Fields(gguf.metadata, where)
    names = fields.strings("irq.blocks.name")
    strings = {
        key: fields.strings(f"irq.blocks.{key}") for key in ("codebook", "scale", "tau", "scale_rounding")
    }
    numbers = {key: fields.array(f"irq.blocks.{key}", "u") for key in ("block_size", "out", "in")}
    _same_length(f"{where}: irq.blocks", {**strings, **numbers}, len(names))
    _no_duplicates(f"{where}: irq.blocks.name", names)
    table = {}
    for i, name in enumerate(names):
        shape = (int(numbers["out"][i]), int(numbers["in"][i]))
        try:
            spec = BlockSpec(
                codebook=strings["codebook"][i],
                block_size=int(numbers["block_size"][i]),
                scale=strings["scale"][i],
                tau=strings["tau"][i],
                scale_rounding=strings["scale_rounding"][i],
            )
            layout = part_layout(spec, shape)
        except UnsupportedModel as error:
            raise MalformedFile(
                error.message,
                where=f"{where}: irq.blocks[{i}] {name}",
                expected=error.expected,
                got=error.got,
            ) from error
        for part, (dtype, part_shape) in layout.items():
            _check_tensor(gguf, f"{name}.{part}", _STORED_AS[dtype.name], part_shape)
        table[name] = BlockEntry(name, spec, shape)
    return table


def _check_tensor(gguf: GgufFile, name: str, kind: str, shape: tuple[int, ...]) -> None:
    if name not in gguf.tensors:
        raise MalformedFile("tensor missing", where=f"{gguf.path}: {name}")
    tensor = gguf.tensors[name]
    if tensor.type.name != kind or tensor.shape != shape:
        raise MalformedFile(
            "tensor is not as declared",
            where=f"{gguf.path}: {name}",
            expected=f"{kind} {shape}",
            got=f"{tensor.type.name} {tensor.shape}",
        )


def load_block(gguf: GgufFile, entry: BlockEntry) -> BlockTensor:
    """Read the parts of one matrix and check every value.

    Raises:
        MalformedFile: See the module's docstring.
    """
    parts: dict[str, NDArray[np.generic]] = {}
    for part, (dtype, _) in part_layout(entry.spec, entry.shape).items():
        stored = gguf.read(f"{entry.name}.{part}")
        parts[part] = stored.view(np.uint8) if dtype == np.uint8 else stored
    tensor = BlockTensor(entry.spec, entry.shape, parts)
    tensor.validate(f"{gguf.path}: {entry.name}")
    return tensor


def read_blocks(gguf: GgufFile) -> dict[str, Callable[[], BlockTensor]]:
    """Check the table of blocks and return a loader for each matrix, by name without ``.weight``.

    Raises:
        MalformedFile: See :func:`block_table`; the loaders raise as :func:`load_block`.
    """

    def loader(entry: BlockEntry) -> Callable[[], BlockTensor]:
        return lambda: load_block(gguf, entry)

    return {name: loader(entry) for name, entry in block_table(gguf).items()}


def read_adapter(gguf: GgufFile) -> dict[str, LoraLayer]:
    """Read the adapter of a model or adapter file, by name without ``.weight``; none: ``{}``.

    Raises:
        MalformedFile: The arrays contradict each other, a tensor is missing, of another type or
            shape, or a value is NaN or infinite.
    """
    if "irq.adapter.name" not in gguf.metadata:
        return {}
    where = str(gguf.path)
    fields = Fields(gguf.metadata, where)
    names = fields.strings("irq.adapter.name")
    scaling = fields.array("irq.adapter.scaling", "f")
    iec = fields.array("irq.adapter.iec", "b")
    _same_length(f"{where}: irq.adapter", {"scaling": scaling, "iec": iec}, len(names))
    _no_duplicates(f"{where}: irq.adapter.name", names)
    layers = {}
    for i, name in enumerate(names):
        a = _read_matrix(gguf, f"{name}.lora_a")
        b = _read_matrix(gguf, f"{name}.lora_b")
        beta = np.zeros(2, np.float32)
        if iec[i]:
            _check_tensor(gguf, f"{name}.lora_beta", "F32", (2,))
            beta = gguf.read(f"{name}.lora_beta").astype(np.float32)
        layer = LoraLayer(a, b, float(beta[0]), float(beta[1]), float(scaling[i]))
        layer.validate(f"{where}: {name}")
        layers[name] = layer
    return layers


def _read_matrix(gguf: GgufFile, name: str) -> NDArray[np.float32]:
    if name not in gguf.tensors:
        raise MalformedFile("tensor missing", where=f"{gguf.path}: {name}")
    shape = gguf.tensors[name].shape
    if len(shape) != 2:
        raise MalformedFile("not a matrix", where=f"{gguf.path}: {name}", got=shape)
    _check_tensor(gguf, name, "F32", shape)
    return gguf.read(name).astype(np.float32, copy=False)


def payload_names(gguf: GgufFile) -> set[str]:
    """Return the names of all tensors that the irq tables claim, so that the rest can be accounted for.

    Raises:
        MalformedFile: See :func:`block_table` and :func:`read_adapter`.
    """
    names: set[str] = set()
    if "irq.blocks.name" in gguf.metadata:
        for entry in block_table(gguf).values():
            names |= {f"{entry.name}.{part}" for part in part_layout(entry.spec, entry.shape)}
    if "irq.adapter.name" in gguf.metadata:
        fields = Fields(gguf.metadata, str(gguf.path))
        iec = fields.array("irq.adapter.iec", "b")
        for name, has_beta in zip(fields.strings("irq.adapter.name"), iec, strict=False):
            parts = ("lora_a", "lora_b", "lora_beta") if has_beta else ("lora_a", "lora_b")
            names |= {f"{name}.{part}" for part in parts}
    return names

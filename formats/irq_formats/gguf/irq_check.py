"""Whether an irq file holds a whole model and nothing else (spec/irq-gguf.md).

Every tensor the model description asks for is there exactly once, as blocks or plain, in its shape;
every tensor in the file is asked for; the adapter fits the matrices it adapts.
"""

from __future__ import annotations

from collections.abc import Mapping

from irq_formats.adapter import LoraLayer
from irq_formats.errors import MalformedFile
from irq_formats.gguf.irq_payload import (
    block_table,
    check_base,
    check_header,
    payload_names,
    read_adapter,
    read_blocks,
)
from irq_formats.gguf.model_keys import IRQ_PREFIX, read_model
from irq_formats.gguf.reader import GgufFile
from irq_formats.model import ModelConfig
from irq_formats.names import hf_to_gguf, linear_names, tensor_shapes

__all__ = ["check_adapter_fits", "check_irq", "check_no_strangers", "check_plain", "plain_tensors"]

#: Types a tensor outside the tables may have.
PLAIN_TYPES = ("F32", "F16", "BF16")


def plain_tensors(gguf: GgufFile, config: ModelConfig) -> list[str]:
    """Check that the file holds exactly the model's tensors; return those that are not blocks.

    Raises:
        MalformedFile: A tensor is missing, there twice (as blocks and plain), of another shape or
            type, or belongs to nothing.
    """
    shapes = tensor_shapes(config)
    blocks = {f"{name}.weight": entry for name, entry in block_table(gguf).items()}
    for name, entry in blocks.items():
        if shapes.get(name) != entry.shape:
            raise MalformedFile(
                "this matrix is not the model's",
                where=f"{gguf.path}: {name}",
                expected=shapes.get(name, "no such tensor"),
                got=entry.shape,
            )
    plain = [name for name in shapes if name not in blocks]
    check_plain(gguf, {name: shapes[name] for name in plain})
    check_no_strangers(gguf, payload_names(gguf) | set(plain))
    return plain


def check_plain(gguf: GgufFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that floating-point tensors are there in the given shapes.

    Raises:
        MalformedFile: One is not.
    """
    for name, shape in shapes.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise MalformedFile("tensor missing", where=f"{gguf.path}: {name}", expected=shape)
        if tensor.shape != shape or tensor.type.name not in PLAIN_TYPES:
            raise MalformedFile(
                "tensor is not as the model asks",
                where=f"{gguf.path}: {name}",
                expected=f"{' | '.join(PLAIN_TYPES)} {shape}",
                got=f"{tensor.type.name} {tensor.shape}",
            )


def check_no_strangers(gguf: GgufFile, known: set[str]) -> None:
    """Check that every tensor of the file is among ``known``.

    Raises:
        MalformedFile: One is not.
    """
    strangers = sorted(set(gguf.tensors) - known)
    if strangers:
        raise MalformedFile("tensors that belong to nothing", where=gguf.path, got=", ".join(strangers[:8]))


def check_adapter_fits(layers: Mapping[str, LoraLayer], config: ModelConfig, where: object) -> None:
    """Check that every adapted matrix is a linear layer of a block and has the adapter's shape.

    Args:
        layers: By stock name without ``.weight``.
        config: The base.
        where: File to name in the error.

    Raises:
        MalformedFile: One does not.
    """
    shapes = tensor_shapes(config)
    linears = {hf_to_gguf(module) for module in linear_names(config)}
    for name, layer in layers.items():
        if name not in linears:
            raise MalformedFile(
                "the adapter does not fit the model: only linear layers of blocks can be adapted",
                where=where,
                expected="q, k, v, o, gate, up or down of a block of the model",
                got=name,
            )
        if shapes[f"{name}.weight"] != layer.shape:
            raise MalformedFile(
                "the adapter does not fit the model",
                where=f"{where}: {name}",
                expected=shapes[f"{name}.weight"],
                got=layer.shape,
            )


def check_irq(gguf: GgufFile) -> ModelConfig:
    """Check a whole irq model file: keys, tables, every value of every block, adapter, completeness.

    Raises:
        MalformedFile: Anything breaks the specification.
        WrongBase: The embedded adapter was trained against another base.
    """
    check_header(gguf, "model")
    check_base(gguf, gguf)
    config = read_model(gguf.metadata, IRQ_PREFIX)
    plain_tensors(gguf, config)
    check_adapter_fits(read_adapter(gguf), config, gguf.path)
    for load in read_blocks(gguf).values():
        load()
    return config

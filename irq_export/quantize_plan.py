"""What ``quantize`` will do with every tensor of a Hugging Face model, decided before a byte is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import numpy as np

from irq_formats.blocks import BlockSpec, part_layout
from irq_formats.checkpoint import FLOAT_DTYPES, hf_tensor_shapes, read_config
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.model import ModelConfig
from irq_formats.names import linear_names
from irq_formats.safetensors_io import SafeTensors, TensorRef, open_sharded

__all__ = ["EMBEDDING", "HEAD", "INT8", "QuantizePlan", "TensorPlan", "choose_linears", "plan_quantization"]

#: Storage of quantised embeddings and heads: Q8_0.
INT8 = BlockSpec("int8", 32, scale="f16", tau="none")

#: Hugging Face names of the embedding and of the output head.
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor of the source.

    Attributes:
        ref: Where it lies.
        spec: How it is quantised, or None: it keeps its own dtype, bit for bit.
    """

    ref: TensorRef
    spec: BlockSpec | None = None

    @property
    def module(self) -> str:
        """Hugging Face module name."""
        return self.ref.name.removesuffix(".weight")

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        if self.spec is None:
            return self.ref.nbytes
        layout = part_layout(self.spec, (self.ref.shape[0], self.ref.shape[1]))
        return sum(dtype.itemsize * prod(shape) for dtype, shape in layout.values())


@dataclass(frozen=True)
class QuantizePlan:
    """The plan of a whole model.

    Attributes:
        path: The source directory.
        config: Its ``config.json``.
        source: Its weights.
        spec: What the linear layers get.
        tensors: Every tensor that is written, in the order of the model.
        skipped: Tensors that stay in floating point though one might expect otherwise, or that are left
            out, with the reason.
    """

    path: Path
    config: dict[str, object]
    source: SafeTensors
    spec: BlockSpec
    tensors: tuple[TensorPlan, ...]
    skipped: dict[str, str]

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_dict(self) -> dict[str, object]:
        """Return the plan for ``--dry-run --json``."""
        return {
            "source": str(self.path),
            "output_bytes": self.output_bytes,
            "tensors": [
                {
                    "name": tensor.ref.name,
                    "shape": list(tensor.ref.shape),
                    "dtype": tensor.ref.dtype,
                    "spec": None if tensor.spec is None else tensor.spec.to_dict(),
                    "bytes": tensor.nbytes,
                }
                for tensor in self.tensors
            ],
            "skipped": self.skipped,
        }


def plan_quantization(
    model_dir: str | Path,
    spec: BlockSpec,
    *,
    embedding: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> QuantizePlan:
    """Read the headers of a model directory and decide about every tensor.

    Args:
        model_dir: A Hugging Face directory with safetensors weights.
        spec: How linear layers are quantised.
        embedding: ``int8`` quantises the embedding, and a head of its own, to Q8_0.
        include: Shell patterns of module names; where given, only linears that match one are quantised.
        exclude: Shell patterns of linears that are not quantised.

    Raises:
        UsageError: There is no model, or a pattern matches no linear layer.
        UnsupportedModel: A family, dtype or tensor this version does not handle, or a model that is
            quantised already.
        MalformedFile: The directory contradicts itself.
    """
    if embedding not in (None, "int8"):
        raise UsageError("unknown storage for embeddings", expected="int8", got=embedding)
    path = Path(model_dir)
    config = read_config(path)
    if "quantization_config" in config:
        raise UnsupportedModel(
            "the model is quantised already", where=path, hint="Start from its floating-point weights"
        )
    model = ModelConfig.from_hf(config)
    source = open_sharded(path)
    refs, skipped = _match(model, source, path)
    chosen = choose_linears(linear_names(model), include, exclude, skipped)
    specs = dict.fromkeys(chosen, spec)
    if embedding == "int8":
        specs |= {EMBEDDING: INT8, HEAD: INT8}
    tensors = []
    for ref in refs:
        wanted = specs.get(ref.name.removesuffix(".weight")) if ref.name.endswith(".weight") else None
        if wanted is not None and ref.shape[1] % wanted.block_size:
            skipped[ref.name] = (
                f"{ref.shape[1]} inputs are not a multiple of the block size {wanted.block_size}"
            )
            wanted = None
        tensors.append(TensorPlan(ref, wanted))
    return QuantizePlan(path, config, source, spec, tuple(tensors), skipped)


def _match(model: ModelConfig, source: SafeTensors, path: Path) -> tuple[list[TensorRef], dict[str, str]]:
    """Pair the tensors of the model with those of the file; return them and what is left out."""
    unused = dict(source.tensors)
    refs = []
    for name, shape in hf_tensor_shapes(model).items():
        ref = unused.pop(name, None)
        if ref is None:
            raise MalformedFile("tensor missing", where=f"{path}: {name}", expected=shape)
        if ref.shape != shape:
            raise MalformedFile("shape", where=f"{path}: {name}", expected=shape, got=ref.shape)
        if ref.dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                "dtype", where=f"{path}: {name}", expected=" | ".join(FLOAT_DTYPES), got=ref.dtype
            )
        refs.append(ref)
    return refs, {name: _reason_to_drop(name, model, source, path) for name in unused}


def _reason_to_drop(name: str, model: ModelConfig, source: SafeTensors, path: Path) -> str:
    """Why a tensor that the model does not need may be left out; an error where it may not."""
    if name.endswith("rotary_emb.inv_freq"):
        return "left out: computed from rope_theta"
    if name == f"{HEAD}.weight" and model.tie_word_embeddings:
        if np.array_equal(source.read(name), source.read(f"{EMBEDDING}.weight")):
            return f"left out: tied to {EMBEDDING}.weight"
        raise UnsupportedModel(
            "differs from the embedding it is tied to",
            where=f"{path}: {name}",
            hint='Set "tie_word_embeddings": false in config.json if the head is its own matrix',
        )
    raise UnsupportedModel("a tensor that the model does not have", where=f"{path}: {name}")


def choose_linears(
    names: Iterable[str], include: Sequence[str], exclude: Sequence[str], skipped: dict[str, str]
) -> list[str]:
    """Return the linears to quantise; the others go to ``skipped`` with the reason.

    Args:
        names: Module names of all linear layers.
        include: Shell patterns; where given, only names that match one are chosen.
        exclude: Shell patterns of names that are not chosen.
        skipped: Receives tensor name and reason.

    Raises:
        UsageError: A pattern matches no name.
    """
    names = list(names)
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                "pattern matches no linear layer", got=pattern, hint=f"Names look like {names[0]}"
            )
    chosen = []
    for name in names:
        if include and not any(fnmatchcase(name, pattern) for pattern in include):
            skipped[f"{name}.weight"] = "not included"
        elif unwanted := [pattern for pattern in exclude if fnmatchcase(name, pattern)]:
            skipped[f"{name}.weight"] = f"excluded by {unwanted[0]}"
        else:
            chosen.append(name)
    return chosen

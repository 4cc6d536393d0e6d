"""Files of the shape of larger models, filled with random bytes, to measure speed where no model is at hand.

    scripts/make_synthetic.py ../speed --tokenizer ../speed/nf4.gguf --shape 7b --kinds nf4 int4 Q4_0

A file `7b-nf4.gguf` is an irq GGUF, `7b-Q4_0.gguf` a stock one; both hold the same matrices, embedding and
head in 8 bits (int8 is exactly Q8_0). Every layer repeats the bytes of the first: speed does not depend on
the values as long as they stay finite, and scales are small enough for that. The vocabulary is that of the
file named by --tokenizer, so `7b` is a little larger than Llama-2-7B. The text of such a model is noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.blocks import BlockSpec, part_layout
from irq_formats.gguf import open_gguf
from irq_formats.gguf.irq_payload import BlockEntry
from irq_formats.gguf.irq_writer import block_metadata, block_sources, model_header
from irq_formats.gguf.model_keys import model_metadata
from irq_formats.gguf.types import BOOL, F32, I32, STR, U32, GgmlType, GgufValue
from irq_formats.gguf.writer import TensorSource, write_gguf
from irq_formats.model import ModelConfig
from irq_formats.names import tensor_shapes

Shape = tuple[int, ...]

_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
SHAPES = {
    "1.1b": dict(zip(_FIELDS, (2048, 22, 32, 4, 64), strict=True)) | {"intermediate_size": 5632},  # TinyLlama
    "7b": dict(zip(_FIELDS, (4096, 32, 32, 32, 128), strict=True)) | {"intermediate_size": 11008},  # Llama 2
}

#: float16 fields of a stock block, as offsets in bytes; the rest may hold anything.
SCALE_FIELDS = {"Q4_0": (0,), "Q4_1": (0, 2), "IQ4_NL": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}


def model(shape: str, vocabulary: int) -> ModelConfig:
    """The model description of a shape."""
    return ModelConfig(
        family="llama",
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_style="half",
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        **SHAPES[shape],
    )


def tokenizer_metadata(metadata: Mapping[str, object]) -> dict[str, GgufValue]:
    """The tokenizer keys of an opened file, typed again."""
    kinds = {bool: BOOL, int: U32, str: STR}
    arrays = {"float32": F32, "int32": I32, "uint32": U32}
    typed = {}
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            if isinstance(value, bool | int | str):
                typed[key] = kinds[type(value)](value)
            else:
                typed[key] = (STR if isinstance(value, list) else arrays[value.dtype.name]).array(value)
    return typed


def parts(
    spec: BlockSpec, shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, NDArray[np.generic]]:
    """Random parts of a block matrix: scales around 0.02, offsets within 0.001."""
    magnitude = {"scale_absmax": 0.005, "scale_offset": 0.02, "tau_absmax": 0.001, "scale": 0.0002}
    return {
        part: rng.integers(0, 256, size, dtype=np.uint8).view(dtype)
        if dtype.itemsize == 1
        else np.full(size, magnitude[part], dtype)
        for part, (dtype, size) in part_layout(spec, shape).items()
    }


def stock_rows(kind: str, shape: Shape, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random raw rows of a stock block type, with small float16 scales."""
    rows, row_bytes = GgmlType[kind].raw_shape(shape)
    raw = rng.integers(0, 256, (rows, row_bytes), dtype=np.uint8)
    blocks = raw.reshape(-1, GgmlType[kind].block_bytes)
    for offset in SCALE_FIELDS[kind]:
        blocks[:, offset : offset + 2] = np.full(1, 0.0005, "<f2").view(np.uint8)
    return raw


def write_irq(
    path: Path, config: ModelConfig, spec: BlockSpec, tokenizer: dict[str, GgufValue], *, overwrite: bool
) -> None:
    """An irq GGUF with every matrix in `spec`, embedding and head in int8."""
    entries, tensors, filled = [], [], {}
    rng = np.random.default_rng(0)
    int8 = BlockSpec("int8", 32, scale="f16", tau="none")
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            tensors.append(_ones(name, shape))
            continue
        module, matrix = name.removesuffix(".weight"), (shape[0], shape[1])
        used = spec if module.startswith("blk.") else int8
        if (used, matrix) not in filled:
            filled[used, matrix] = parts(used, matrix, rng)
        entries.append(BlockEntry(module, used, matrix))
        tensors += block_sources(module, used, matrix, filled[used, matrix].__getitem__)
    header = model_header(config, "0" * 64) | block_metadata(entries) | tokenizer
    write_gguf(path, header, tensors, overwrite=overwrite)


def write_stock(
    path: Path, config: ModelConfig, kind: str, tokenizer: dict[str, GgufValue], *, overwrite: bool
) -> None:
    """A stock llama GGUF with every matrix in `kind`, embedding and head in Q8_0."""
    tensors, filled = [], {}
    rng = np.random.default_rng(0)
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            tensors.append(_ones(name, shape))
            continue
        used = kind if name.startswith("blk.") else "Q8_0"
        if (used, shape) not in filled:
            filled[used, shape] = stock_rows(used, shape, rng)
        tensors.append(TensorSource(name, shape, GgmlType[used], _constant(filled[used, shape])))
    header = {"general.architecture": STR("llama"), **model_metadata(config, "llama"), **tokenizer}
    write_gguf(path, header, tensors, overwrite=overwrite)


def _constant(array: NDArray[np.generic]) -> Callable[[], NDArray[np.generic]]:
    return lambda: array


def _ones(name: str, shape: Shape) -> TensorSource:
    return TensorSource(name, shape, GgmlType.F32, _constant(np.ones(shape, np.float32)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write speed-only models of the shape of larger ones.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="GGUF whose tokenizer is copied")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--kinds", nargs="+", required=True, help="nf4 ... (irq), Q4_0 ... (stock)")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    args = parser.parse_args(arguments)

    metadata = open_gguf(args.tokenizer).metadata
    tokenizer = tokenizer_metadata(metadata)
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    config = model(args.shape, metadata.get("irq.model.vocab_size", len(tokens)))
    for kind in args.kinds:
        path = args.folder / f"{args.shape}-{kind}.gguf"
        if kind in SCALE_FIELDS:
            plain = {key: value for key, value in tokenizer.items() if key != "tokenizer.huggingface.json"}
            write_stock(path, config, kind, plain, overwrite=args.force)
        else:
            write_irq(path, config, BlockSpec(kind), tokenizer, overwrite=args.force)
        print(f"{path}: {path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

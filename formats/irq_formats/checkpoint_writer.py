"""Writing a checkpoint (spec/irq-checkpoint.md), tensor by tensor, in bounded memory.

Quantised parts wait in memory until a shard is full; floating-point tensors are loaded only while their
shard is written. So the memory needed is one shard of parts or the largest tensor, whichever is larger.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.atomic import atomic_dir
from irq_formats.blocks import BlockSpec, BlockTensor
from irq_formats.checkpoint import CHECKPOINT_KIND, FLOAT_DTYPES, base_hash, hash_line, safetensors_dtype
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.manifest import write_manifest
from irq_formats.quantization import Quantization
from irq_formats.safetensors_io import INDEX_NAME, SINGLE_NAME, SafeTensorsWriter, TensorSpec

__all__ = ["SHARD_BYTES", "CheckpointWriter", "checkpoint_writer"]

#: Default size of a shard; a larger tensor gets one of its own.
SHARD_BYTES = 256 << 20

#: Loads a tensor when its shard is written.
Load = Callable[[], NDArray[np.generic]]


class CheckpointWriter:
    """Fills a directory with a checkpoint. Use :func:`checkpoint_writer`.

    Args:
        directory: An empty directory.
        shard_bytes: Bytes of tensors per safetensors file.
    """

    def __init__(self, directory: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._pending: dict[TensorSpec, Load] = {}  # tensors of the next shard
        self._shards: list[list[TensorSpec]] = []  # tensors of every shard written
        self._modules: dict[str, BlockSpec] = {}
        self._hash_lines: list[str] = []

    def add_block(self, module: str, tensor: BlockTensor) -> None:
        """Add a block-quantised matrix under its Hugging Face module name.

        Raises:
            MalformedFile: The tensor breaks its own layout.
        """
        tensor.validate(where=module)
        self._modules[module] = tensor.spec
        for name, part in tensor.parts.items():
            declared = TensorSpec(f"{module}.{name}", safetensors_dtype(part), part.shape)
            self._add(declared, partial(_same, part))

    def add_plain(self, tensor: TensorSpec, load: Load) -> None:
        """Add a tensor in its own dtype, bit for bit.

        Args:
            tensor: Its Hugging Face name, dtype (F32, F16 or BF16) and shape.
            load: Returns the array when its shard is written (BF16 as its uint16 bits).

        Raises:
            UnsupportedModel: Another dtype.
        """
        if tensor.dtype not in FLOAT_DTYPES:
            raise UnsupportedModel(
                "tensor dtype", where=tensor.name, expected=" | ".join(FLOAT_DTYPES), got=tensor.dtype
            )
        self._add(TensorSpec(tensor.name, tensor.dtype, tensor.shape), load)

    def copy_file(self, directory: Path, file: Path) -> None:
        """Copy a file of a directory (tokenizer, generation settings) to the same place, byte for byte."""
        target = self._directory / file.relative_to(directory)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)

    def finish(
        self,
        config: Mapping[str, object],
        *,
        spec: BlockSpec,
        skipped: Mapping[str, str],
        search: Mapping[str, str | int | float | bool],
    ) -> Quantization:
        """Write what is left, the index, ``config.json`` and, last, the manifest.

        Args:
            config: ``config.json`` of the source; ``quantization_config`` is added.
            spec: What was asked for.
            skipped: Tensors kept in floating point or left out, with the reason.
            search: Settings of the search, for the record.

        Returns:
            What was written as ``quantization_config``.
        """
        self._flush()
        digest = base_hash(self._hash_lines, self._modules)
        quantization = Quantization(spec, self._modules, skipped, search, digest)
        self._name_shards()
        self._write_json("config.json", {**config, "quantization_config": quantization.to_dict()})
        write_manifest(self._directory, {"kind": CHECKPOINT_KIND, "base_hash": digest})
        return quantization

    def _add(self, tensor: TensorSpec, load: Load) -> None:
        waiting_bytes = sum(other.nbytes for other in self._pending)
        if self._pending and waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._pending[tensor] = load

    def _flush(self) -> None:
        """Write the waiting tensors as one file."""
        if not self._pending:
            return
        tensors = list(self._pending)
        with (
            self._shard_path(len(self._shards)).open("xb") as file,
            SafeTensorsWriter(file, tensors, {"format": "pt"}) as writer,
        ):
            for tensor, load in self._pending.items():
                data = load()
                self._hash_lines.append(hash_line(tensor.name, tensor.dtype, tensor.shape, data))
                writer.write(tensor.name, data)
        self._shards.append(tensors)
        self._pending.clear()

    def _shard_path(self, index: int) -> Path:
        """Name of a shard while their number is not known."""
        return self._directory / f"shard-{index}"

    def _name_shards(self) -> None:
        """Give the shards their final names and write the index."""
        count = len(self._shards)
        if count == 1:
            self._shard_path(0).rename(self._directory / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for index, tensors in enumerate(self._shards):
            file_name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(index).rename(self._directory / file_name)
            weight_map |= {tensor.name: file_name for tensor in tensors}
        total_bytes = sum(tensor.nbytes for tensors in self._shards for tensor in tensors)
        self._write_json(INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})

    def _write_json(self, name: str, document: Mapping[str, object]) -> None:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        (self._directory / name).write_text(text + "\n", encoding="utf-8")


def _same(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array


@contextmanager
def checkpoint_writer(
    path: str | Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> Iterator[CheckpointWriter]:
    """Write a checkpoint that appears at ``path`` only when complete.

    Args:
        path: The final directory.
        overwrite: Replace an existing checkpoint.
        shard_bytes: Bytes of tensors per safetensors file.

    Yields:
        The writer; the block must end with :meth:`CheckpointWriter.finish`.

    Raises:
        OutputExists: ``path`` exists and ``overwrite`` is false.
        UsageError: The block ended without ``finish``.
    """
    with atomic_dir(path, overwrite=overwrite) as directory:
        writer = CheckpointWriter(directory, shard_bytes=shard_bytes)
        yield writer
        if not (directory / "manifest.json").is_file():
            raise UsageError("the checkpoint was not finished", where=path)

"""The quantised checkpoint (spec/irq-checkpoint.md): what training writes and every exporter reads.

A Hugging Face directory whose linear weights are the parts of block tensors and whose ``config.json``
says how to read them. Opening it checks everything that can be known without decoding: the manifest, the
configuration, that every tensor is there, known, and of the dtype and shape it must have, the hash that
adapters refer to, and that every scale and offset is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.companions import companion_files
from irq_formats.errors import MalformedFile, UsageError
from irq_formats.files import open_fixed
from irq_formats.manifest import MANIFEST_NAME, check_manifest, unlisted_files
from irq_formats.model import ModelConfig
from irq_formats.names import gguf_to_hf, tensor_shapes
from irq_formats.quantization import Quantization
from irq_formats.safetensors_io import INDEX_NAME, SINGLE_NAME, SafeTensors, TensorRef, open_sharded
from irq_formats.strict_json import parse_object

__all__ = [
    "CHECKPOINT_KIND",
    "FLOAT_DTYPES",
    "Checkpoint",
    "QuantizedModule",
    "base_hash",
    "hash_line",
    "hf_tensor_shapes",
    "open_checkpoint",
    "read_config",
    "safetensors_dtype",
]

#: What the manifest of a checkpoint says that it is of.
CHECKPOINT_KIND = "irq-checkpoint"
#: Dtypes, by their safetensors names, that a tensor which is not quantised may have.
FLOAT_DTYPES = ("F32", "F16", "BF16")

_SAFETENSORS_DTYPES = {"uint8": "U8", "float16": "F16", "float32": "F32"}
_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class QuantizedModule:
    """A block-quantised matrix, as the checkpoint announces it.

    Attributes:
        spec: How to read its parts.
        shape: ``(out, in)``.
    """

    spec: BlockSpec
    shape: tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """An opened and checked checkpoint. Tensors are read when asked for.

    Attributes:
        path: The directory.
        config: ``config.json`` as it stands.
        model: The model it describes.
        quantization: Its ``quantization_config``.
        blocks: Block-quantised matrices by Hugging Face module name, in the order of the model.
        plain: All other tensors by name, in the order of the model.
        tensors: The safetensors files.
    """

    path: Path
    config: Mapping[str, object]
    model: ModelConfig
    quantization: Quantization
    blocks: Mapping[str, QuantizedModule]
    plain: Mapping[str, TensorRef]
    tensors: SafeTensors

    @property
    def base_hash(self) -> str:
        """What an adapter trained on this base records, 64 hexadecimal digits."""
        return self.quantization.base_hash

    @property
    def adapter_dir(self) -> Path | None:
        """The PEFT directory of the adapter trained on this base, if there is one."""
        path = self.path / "adapter"
        return path if path.is_dir() else None

    @property
    def unlisted_files(self) -> list[str]:
        """Tokenizer, templates and settings that the manifest does not list: added later, by whomever."""
        unlisted = set(unlisted_files(self.path))
        names = [file.relative_to(self.path).as_posix() for file in companion_files(self.path)]
        return [name for name in names if name in unlisted]

    def block_tensor(self, module: str) -> BlockTensor:
        """Read a block-quantised matrix.

        Raises:
            MalformedFile: A value breaks the specification (not finite, negative scale), or the file
                changed since it was opened.
        """
        entry = self.blocks[module]
        layout = part_layout(entry.spec, entry.shape)
        parts = {name: self.tensors.read(f"{module}.{name}") for name in layout}
        tensor = BlockTensor(entry.spec, entry.shape, parts)
        tensor.validate(where=f"{self.path}: {module}")
        return tensor

    def check_scales(self, module: str) -> None:
        """Check the scales and offsets of a block-quantised matrix; its codes stay unread: any is valid.

        Raises:
            MalformedFile: A value breaks the specification.
        """
        entry = self.blocks[module]
        names = [name for name in part_layout(entry.spec, entry.shape) if name != "codes"]
        parts = {name: self.tensors.read(f"{module}.{name}") for name in names}
        BlockTensor(entry.spec, entry.shape, parts).check_scales(f"{self.path}: {module}")

    def plain_raw(self, name: str) -> NDArray[np.generic]:
        """Read a tensor in its own dtype (BF16 as its uint16 bits)."""
        return self.tensors.read(name)

    def plain_f32(self, name: str) -> NDArray[np.float32]:
        """Read a tensor as float32, exactly."""
        return self.tensors.read_f32(name)


def open_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Open a checkpoint and check it.

    Args:
        path: The directory.
        verify: Also read every byte: compare the files with the manifest and the tensors with the base
            hash, and check every scale and offset. Without it only headers and JSON are read.

    Raises:
        MalformedFile: Anything in the directory breaks spec/irq-checkpoint.md.
        UnsupportedModel: A model, version or quantisation this version does not know.
        UsageError: There is no such directory.
    """
    path = Path(path)
    config = read_config(path)
    quantization = Quantization.from_dict(config.get("quantization_config"), where=path / "config.json")
    manifest = check_manifest(path) if verify else None
    model = ModelConfig.from_hf(config)
    tensors = open_sharded(path)
    if manifest is not None:
        _check_bound(manifest, quantization, tensors, path)
    blocks, plain = _match(model, quantization, tensors, path)
    checkpoint = Checkpoint(path, config, model, quantization, blocks, plain, tensors)
    if verify:
        refs = tensors.tensors.values()
        lines = (hash_line(ref.name, ref.dtype, ref.shape, tensors.read(ref.name)) for ref in refs)
        found = base_hash(lines, quantization.modules)
        if found != quantization.base_hash:
            raise MalformedFile("base hash", where=path, expected=quantization.base_hash, got=found)
        for module in blocks:
            checkpoint.check_scales(module)
    return checkpoint


def _check_bound(
    manifest: Mapping[str, object], quantization: Quantization, tensors: SafeTensors, path: Path
) -> None:
    """Check that a manifest is that of this checkpoint, and lists all that its meaning depends on."""
    where = path / MANIFEST_NAME
    extra, listed = manifest["extra"], manifest["files"]
    expected = {"kind": CHECKPOINT_KIND, "base_hash": quantization.base_hash}
    if not isinstance(extra, Mapping) or any(extra.get(key) != value for key, value in expected.items()):
        raise MalformedFile(
            "the manifest is not of this checkpoint", where=where, expected=expected, got=extra
        )
    names = [file.path.name for file in tensors.files]
    names += ["config.json"] + [INDEX_NAME] * (names != [SINGLE_NAME])
    if not isinstance(listed, Mapping) or not listed.keys() >= set(names):
        raise MalformedFile("the manifest does not list all files", where=where, expected=_some(names))


def read_config(path: Path) -> dict[str, object]:
    """Read ``config.json`` of a model directory.

    Raises:
        UsageError: There is no such directory, or no such file in it.
        MalformedFile: It is not a JSON object, or absurdly large.
    """
    if not path.is_dir():
        raise UsageError(
            "is not a directory" if path.exists() else "no such directory",
            where=path,
            expected="a model directory on this disk",
        )
    file = open_fixed(path / "config.json")
    if file.size > _MAX_CONFIG_BYTES:
        raise MalformedFile(
            "too large", where=file.path, expected=f"<= {_MAX_CONFIG_BYTES} bytes", got=file.size
        )
    return parse_object(file.read_bytes(0, file.size), where=file.path)


def hf_tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the unquantised model by Hugging Face name, in order, with its shape."""
    return {gguf_to_hf(name): shape for name, shape in tensor_shapes(model).items()}


def safetensors_dtype(array: NDArray[np.generic]) -> str:
    """Return the safetensors name of the dtype of a part."""
    return _SAFETENSORS_DTYPES[array.dtype.name]


def hash_line(name: str, dtype: str, shape: Iterable[int], data: NDArray[np.generic]) -> str:
    """Return a tensor's line of the base hash: ``name dtype shape sha256``, shape as ``576,1536``."""
    digest = hashlib.sha256(np.ascontiguousarray(data).view(np.uint8).reshape(-1).data).hexdigest()
    return f"{name} {dtype} {','.join(map(str, shape))} {digest}\n"


def base_hash(tensor_lines: Iterable[str], modules: Mapping[str, BlockSpec]) -> str:
    """Hash all tensors of a base and how to read them (spec section 5).

    Args:
        tensor_lines: The :func:`hash_line` of every tensor, in any order.
        modules: The block specs by module name.

    Returns:
        64 hexadecimal digits.
    """
    lines = list(tensor_lines)
    for name, spec in modules.items():
        lines.append(f"{name} {' '.join(str(value) for value in spec.to_dict().values())}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _match(
    model: ModelConfig, quantization: Quantization, tensors: SafeTensors, path: Path
) -> tuple[dict[str, QuantizedModule], dict[str, TensorRef]]:
    """Pair every tensor of the model with those of the files; each must be used exactly once."""
    blocks: dict[str, QuantizedModule] = {}
    plain: dict[str, TensorRef] = {}
    unused = dict(tensors.tensors)
    for name, shape in hf_tensor_shapes(model).items():
        module = name.removesuffix(".weight")
        spec = quantization.modules.get(module) if name.endswith(".weight") else None
        if spec is None:
            plain[name] = _take(unused, name, FLOAT_DTYPES, shape, path)
            continue
        if len(shape) != 2:
            raise MalformedFile(
                "is not a matrix, so cannot be quantised", where=f"{path}: {module}", got=shape
            )
        blocks[module] = QuantizedModule(spec, (shape[0], shape[1]))
        for part, (dtype, part_shape) in part_layout(spec, blocks[module].shape).items():
            _take(unused, f"{module}.{part}", (_SAFETENSORS_DTYPES[dtype.name],), part_shape, path)
    if unused:
        raise MalformedFile("tensors that the model does not have", where=path, got=_some(unused))
    if strangers := quantization.modules.keys() - blocks.keys():
        raise MalformedFile(
            "quantised modules that the model does not have", where=path, got=_some(strangers)
        )
    return blocks, plain


def _take(
    unused: dict[str, TensorRef], name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], path: Path
) -> TensorRef:
    """Remove a tensor from ``unused`` and check it against what the model needs."""
    ref = unused.pop(name, None)
    if ref is None:
        raise MalformedFile("tensor missing", where=f"{path}: {name}", expected=(" | ".join(dtypes), shape))
    if ref.dtype not in dtypes or tuple(ref.shape) != shape:
        raise MalformedFile(
            "tensor",
            where=f"{path}: {name}",
            expected=(" | ".join(dtypes), shape),
            got=(ref.dtype, tuple(ref.shape)),
        )
    return ref


def _some(names: Iterable[str]) -> str:
    """Name at most five."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")

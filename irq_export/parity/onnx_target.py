"""What of an ONNX folder is being verified: its model, its adapters, and what each must be equal to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

from irq_export.export.gguf.adapters import export_adapter
from irq_export.export.onnx.adapters import ADAPTER_SUFFIX, NamedAdapter, open_adapters
from irq_export.export.onnx.genai import GENAI_CONFIG, genai_config
from irq_export.export.onnx.linears import choose_operators
from irq_export.export.onnx.options import ATTENTIONS, DTYPES, PROFILES, OnnxOptions
from irq_export.export.onnx.readback import read_back
from irq_export.parity.report import Check
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import MalformedFile, ParityFailed, UsageError
from irq_formats.files import open_fixed, read_small
from irq_formats.manifest import MANIFEST_NAME, check_manifest, unlisted_files
from irq_formats.onnx.model_file import OnnxModel, open_model
from irq_formats.strict_json import parse_object
from irq_runtime.onnx import library_path

__all__ = ["Case", "OnnxTarget", "open_onnx_target"]

_MAX_CONFIG_BYTES = 1 << 20  # ours have two thousand
#: What people and hubs add to a folder and no runtime reads.
_BYSTANDERS = ("README.md", "LICENSE*", ".gitattributes", ".gitignore", ".git/*", ".cache/*")


@dataclass(frozen=True)
class Case:
    """A model to compare: the base, or the base with one adapter.

    Attributes:
        name: Of the adapter; empty for the base.
        file: What the runtime loads; None for the base, and for an adapter inside the model.
        adapter: What torch loads.
    """

    name: str
    file: Path | None
    adapter: Adapter | None


@dataclass(frozen=True)
class OnnxTarget:
    """An export that opens.

    Attributes:
        model: The model.
        checkpoint: What it was made from.
        options: What it was made with, as far as it shows.
        sources: PEFT directories by the names of the adapters.
        baked: Name of the adapter inside the model, if there is one.
    """

    model: OnnxModel
    checkpoint: Checkpoint
    options: OnnxOptions
    sources: dict[str, Path]
    baked: str | None

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.model.path.parent

    @property
    def dtype(self) -> str:
        """Of activations: numpy name."""
        return DTYPES[self.options.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the model: graph and data."""
        data = 0 if self.model.data is None else self.model.data.size
        return self.model.path.stat().st_size + data

    @property
    def cases(self) -> list[Case]:
        """The base and every adapter; or the one model with its adapter in it."""
        trained = {name: export_adapter(self.checkpoint, path, "keep") for name, path in self.sources.items()}
        if self.baked is not None:
            return [Case(self.baked, None, trained[self.baked])]
        swapped = [Case(name, self.folder / f"{name}{ADAPTER_SUFFIX}", trained[name]) for name in trained]
        return [Case("", None, None), *swapped]

    def container_level(self) -> Iterator[Check]:
        """Yield whether the folder is whole, and every other file in it what an export puts there."""
        check_manifest(self.folder)
        detail = f"{len(self.model.tensors)} tensors, well formed; every file as its manifest says"
        yield Check("container", self.model.path.name, True, detail)
        if unlisted := [name for name in unlisted_files(self.folder) if not _is_bystander(name)]:
            detail = f"files that the manifest does not list: {', '.join(unlisted[:5])}"
            yield Check("container", MANIFEST_NAME, False, detail, {"unlisted": unlisted})
        yield self._same_config()
        for file in sorted(self.folder.glob("*.so*")):
            is_ours = file.name == library_path().name and _same_bytes(file, library_path())
            detail = "the library of this installation" if is_ours else "not the library of this installation"
            yield Check("container", file.name, is_ours, detail, gate="byte-equal")

    def tensor_level(self) -> Check:
        """Compare every tensor with the checkpoint, and every adapter with its source."""
        name = "files against checkpoint"
        if self.model.metadata.get("irq.base_hash") != self.checkpoint.base_hash:
            return Check("tensors", name, False, "made from another checkpoint", gate="bit-equal")
        chosen = choose_operators(
            self.checkpoint,
            dtype=self.dtype,
            carry=self.options.int_bits == "4",
            as_functions=self.options.profile == "irq",
        )
        operators = {module: operator.codebook for module, operator in chosen.items()}
        adapters = self._named()
        baked = next((one for one in adapters if one.name == self.baked), None)
        beside = [one for one in adapters if one is not baked]
        try:
            found = read_back(self.folder, self.checkpoint, operators, beside, baked)
        except ParityFailed as error:
            return Check("tensors", name, False, str(error), gate="bit-equal")
        detail = f"{found.exact} arrays bit-equal"
        if found.rounded:
            detail += f"; {found.rounded} rounded once to float16"
        return Check("tensors", name, True, detail, {"exact": not found.rounded}, "bit-equal")

    def _named(self) -> list[NamedAdapter]:
        if not self.sources:
            return []
        return open_adapters(self.checkpoint, OnnxOptions(adapters=tuple(self.sources.values())))

    def _same_config(self) -> Check:
        """Compare genai_config.json with what we write; only the settings of its search are free."""
        path = self.folder / GENAI_CONFIG
        try:
            got = parse_object(read_small(path, limit=_MAX_CONFIG_BYTES), where=path)
        except (UsageError, MalformedFile) as error:
            return Check("container", path.name, False, str(error), gate="as to-onnx writes it")
        expected = json.loads(json.dumps(genai_config(self.checkpoint, self.options)))
        is_same = got.keys() == {"model", "search"} and got["model"] == expected["model"]
        detail = "names this model and no other code" if is_same else "says something else about the model"
        return Check("container", path.name, is_same, detail, gate="as to-onnx writes it")


def _is_bystander(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _BYSTANDERS)


def open_onnx_target(path: Path, checkpoint: Checkpoint, adapters: Sequence[Path]) -> OnnxTarget:
    """Open an export.

    Args:
        path: The folder, or its model.
        checkpoint: What it was made from.
        adapters: PEFT directories of the adapters it must have.

    Raises:
        UsageError: The adapters of the export and those given are not the same.
        MalformedFile: Something breaks spec/irq-onnx.md.
        WrongBase: An adapter was trained against another base.
    """
    model = open_model(path)
    folder = model.path.parent
    beside = {file.name.removesuffix(ADAPTER_SUFFIX) for file in folder.glob(f"*{ADAPTER_SUFFIX}")}
    inputs = {value.name for value in model.proto.graph.input}
    has_baked = any(name.endswith(".lora_A") and name not in inputs for name in model.tensors)
    sources = {OnnxOptions.adapter_name(directory): directory for directory in adapters}
    fits = len(sources) == len(adapters) == 1 if has_baked else sources.keys() == beside
    if not fits:
        raise UsageError(
            "the adapters given are not those of the export",
            where=folder,
            expected="one directory" if has_baked else ", ".join(sorted(beside)) or "none",
            got=", ".join(str(directory) for directory in adapters) or "none",
            hint="Give the PEFT directory of each with --adapter-dir, or --no-adapter if it has none",
        )
    return OnnxTarget(
        model, checkpoint, _options(model, checkpoint), sources, next(iter(sources)) if has_baked else None
    )


def _same_bytes(path: Path, other: Path) -> bool:
    """Compare a file with one of ours; only one of its size is read."""
    ours = other.read_bytes()
    try:
        file = open_fixed(path)
        return file.size == len(ours) and file.read_bytes(0, file.size) == ours
    except (UsageError, MalformedFile):
        return False


def _options(model: OnnxModel, checkpoint: Checkpoint) -> OnnxOptions:
    """Return the options of an export, as they show in its files."""
    dtype = "f16" if model.tensor("rope.cos").dtype == "float16" else "f32"
    rows = model.tensor("rope.cos").shape[0]
    carried = all(
        prod(model.tensor(f"{module}.codes").shape[1:]) * 2 == block.shape[1]
        for module, block in checkpoint.blocks.items()
        if block.spec.codebook in ("int3", "int2")
    )
    profile, attention = (model.metadata.get(f"irq.{key}", "") for key in ("profile", "attention"))
    if profile not in PROFILES or attention not in ATTENTIONS:
        raise MalformedFile("unknown profile or attention", where=model.path, got=f"{profile}, {attention}")
    return OnnxOptions(
        profile=profile,
        attention=attention,
        dtype=dtype,
        int_bits="4" if carried else "own",
        context=None if rows == checkpoint.model.max_position_embeddings else rows,
        library=profile == "irq" and (model.path.parent / library_path().name).is_file(),
    )

"""What of an ONNX folder is being verified: its model, its adapters, and what each must be equal to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from irq_export.export.gguf.adapters import export_adapter
from irq_export.export.onnx.adapters import ADAPTER_SUFFIX, NamedAdapter, open_adapters
from irq_export.export.onnx.companions import copied_files
from irq_export.export.onnx.convert import manifest_extra
from irq_export.export.onnx.genai import GENAI_CONFIG, genai_config
from irq_export.export.onnx.network import Network, build_network
from irq_export.export.onnx.options import OnnxOptions
from irq_export.export.onnx.readback import compare_graph, read_back
from irq_export.parity.report import Check
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import MalformedFile, ParityFailed, UnsupportedModel, UsageError
from irq_formats.files import open_fixed, read_small
from irq_formats.manifest import MANIFEST_NAME, check_manifest, unlisted_files
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME, OnnxModel, open_model
from irq_formats.strict_json import parse_object
from irq_runtime.onnx import library_path

__all__ = ["Case", "OnnxTarget", "open_onnx_target"]

_GATE = "as to-onnx writes it"
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
    def context(self) -> int:
        """Positions it was exported for."""
        longest = self.checkpoint.model.max_position_embeddings
        return min(self.options.context or longest, longest)

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
        manifest = check_manifest(self.folder, editable=[GENAI_CONFIG])
        detail = f"{len(self.model.tensors)} tensors, well formed; every file as its manifest says"
        yield Check("container", self.model.path.name, True, detail)
        yield self._same_manifest(manifest)
        yield self._same_config()
        if self.options.library:
            library = self.folder / library_path().name
            is_ours = _same_bytes(library, library_path())
            detail = "the library of this installation" if is_ours else "not the library of this installation"
            yield Check("container", library.name, is_ours, detail, gate="byte-equal")
        yield self._same_graph()

    def tensor_level(self) -> Check:
        """Compare every array with the checkpoint, and every adapter with its source."""
        name = "files against checkpoint"
        baked, beside = (self._named[0], []) if self.baked is not None else (None, self._named)
        try:
            found = read_back(self.model, self.checkpoint, self._network, beside, baked)
        except ParityFailed as error:
            return Check("tensors", name, False, str(error), gate="bit-equal")
        detail = f"{found.exact} arrays bit-equal"
        if found.rounded:
            detail += f"; {found.rounded} rounded once to float16"
        return Check("tensors", name, True, detail, {"exact": not found.rounded}, "bit-equal")

    @cached_property
    def _network(self) -> Network:
        """What to-onnx builds from the checkpoint with these options."""
        baked = self._named[0].pairs if self.baked is not None else {}
        return build_network(self.checkpoint, self.options, baked=baked)

    @cached_property
    def _named(self) -> list[NamedAdapter]:
        return open_adapters(self.checkpoint, self.options) if self.sources else []

    def _same_manifest(self, manifest: Mapping[str, Any]) -> Check:
        """Look for files that no export has or that are not listed, and compare what the manifest says."""
        source, ours = self.checkpoint.path, {MODEL_NAME, DATA_NAME, GENAI_CONFIG}
        ours |= {file.relative_to(source).as_posix() for file in copied_files(source)}
        ours |= {one.file_name for one in self._named if self.baked is None}
        ours |= {library_path().name} if self.options.library else set()
        unlisted = {*unlisted_files(self.folder)}
        added = {name for name in unlisted.union(manifest["files"]) if not _is_bystander(name)} - ours
        wrong = sorted(added | unlisted & ours)
        detail = f"files that are not listed, or that no export has: {', '.join(wrong[:5])}"
        if not wrong:
            wrong = self._different_provenance(manifest["extra"])
            detail = f"says something else: {', '.join(wrong)}" if wrong else f"{len(ours)} files, no other"
        return Check("container", MANIFEST_NAME, not wrong, detail, {"wrong": wrong}, _GATE)

    def _different_provenance(self, found: Any) -> list[str]:
        """Return what the manifest says of the model and to-onnx does not."""
        if not isinstance(found, dict):
            return ["extra"]
        expected, adapters = manifest_extra(self.checkpoint, self.options, self._named), found.get("adapters")
        if self.baked is not None and isinstance(adapters, dict):
            name = next(iter(adapters), self.baked)  # its directory may have another by now
            expected["adapters"] = {name: {"base_hash": self._named[0].base_hash}}
        return sorted(key for key in found.keys() | expected if found.get(key) != expected.get(key))

    def _same_graph(self) -> Check:
        """Compare the graph with the one that is built today; one that is another is not run."""
        try:
            if self.model.metadata["irq.base_hash"] != self.checkpoint.base_hash:
                raise ParityFailed("made from another checkpoint")
            compare_graph(self.model, self._network)
        except (ParityFailed, UnsupportedModel, UsageError) as error:
            return Check("container", "graph", False, str(error), gate=_GATE)
        detail = f"{len(self._network.nodes)} nodes, all names, shapes and constants equal"
        return Check("container", "graph", True, detail, gate=_GATE)

    def _same_config(self) -> Check:
        """Compare genai_config.json with what we write; only the settings of its search are free."""
        path = self.folder / GENAI_CONFIG
        try:
            got = parse_object(read_small(path, limit=_MAX_CONFIG_BYTES), where=path)
        except (UsageError, MalformedFile) as error:
            return Check("container", path.name, False, str(error), gate=_GATE)
        expected = json.loads(json.dumps(genai_config(self.checkpoint, self.options)))
        is_same = got.keys() == {"model", "search"} and got["model"] == expected["model"]
        is_same = is_same and _fits_model(got["search"], expected["search"])
        detail = "names this model and no other code" if is_same else "says something else about the model"
        return Check("container", path.name, is_same, detail, gate=_GATE)


def _fits_model(search: Any, ours: Mapping[str, Any]) -> bool:
    """Whether a search keeps to the positions and the cache that the graph has; the rest is taste."""
    if not isinstance(search, dict):
        return False
    length, shares = search.get("max_length"), search.get("past_present_share_buffer")
    return (
        type(length) is int
        and 0 < length <= ours["max_length"]
        and shares is ours["past_present_share_buffer"]
    )


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
    options = replace(
        _options(model, checkpoint),
        adapters=tuple(sources.values()),
        bake_adapter=has_baked,
        adapter_slots=any(name.endswith(".lora_A") for name in inputs),
    )
    return OnnxTarget(model, checkpoint, options, sources, next(iter(sources)) if has_baked else None)


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
    table = model.tensor("rope.cos")
    if not prod(table.shape):
        raise MalformedFile("no positions", where=f"{model.path}: rope.cos", got=table.shape)
    rows = table.shape[0] if table.shape else 1
    carried = all(
        prod(model.tensor(f"{module}.codes").shape[1:]) * 2 == block.shape[1]
        for module, block in checkpoint.blocks.items()
        if block.spec.codebook in ("int3", "int2")
    )
    profile = model.metadata["irq.profile"]
    return OnnxOptions(
        profile=profile,
        attention=model.metadata["irq.attention"],
        dtype="f16" if table.dtype == "float16" else "f32",
        int_bits="4" if carried else "own",
        context=None if rows == checkpoint.model.max_position_embeddings else rows,
        library=profile == "irq" and (model.path.parent / library_path().name).is_file(),
    )

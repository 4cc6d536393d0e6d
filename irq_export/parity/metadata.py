"""What a GGUF file says beside the arrays of the checkpoint: every key that a runtime may act on.

The arrays may be right and the model wrong: another context or frequency base, an end token that never comes.
So the files are planned once more, as ``to-gguf`` writes them today, and their keys and the names of their
tensors compared. Keys ``general.*`` that it does not write (a name, a licence) are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from irq_export.export.gguf.irq_profile import irq_files
from irq_export.export.gguf.merged import merged_tensors
from irq_export.export.gguf.modelfile import MODELFILE_NAME, modelfile
from irq_export.export.gguf.plan import PlannedFile
from irq_export.export.gguf.stock_profile import rope_tensors, stock_files, stock_header
from irq_export.export.gguf.tokenizer import read_tokenizer
from irq_export.parity.report import Check
from irq_export.parity.target import Target
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import IrqError, MalformedFile, UnsupportedModel
from irq_formats.files import read_small
from irq_formats.gguf import GgmlType, GgufFile, GgufValue, open_gguf
from irq_formats.manifest import MANIFEST_NAME, check_manifest
from irq_formats.names import hf_to_gguf

__all__ = ["folder_checks", "metadata_check", "tokenizer_keys_check"]

_GATE = "as to-gguf writes it"
_TOKENIZER = "tokenizer."
_PRE_TOKENIZER = "tokenizer.ggml.pre"
_MOST_MODELFILE_BYTES = 1 << 20  # ours have hundreds
#: Instructions that say what runs; a line may begin with blanks and a tab may follow.
_NAMING = {"FROM", "ADAPTER", "TEMPLATE", "RENDERER", "PARSER"}
_FREE = ("general.", "split.")  # names and licences; shards of one file


def metadata_check(target: Target, checkpoint: Checkpoint, adapter: Adapter) -> Check:
    """Compare all keys but the tokenizer's, the names of all tensors, and tensors that no checkpoint has.

    Args:
        target: The export.
        checkpoint: What it was made from.
        adapter: The adapter as the file holds it (folded if it was folded); no layers for none.
    """
    files = [target.gguf] if target.adapter is None else [target.gguf, open_gguf(target.adapter)]
    try:
        planned = _planned(target, checkpoint, adapter)
    except IrqError as error:
        return Check("container", "metadata", False, f"to-gguf writes no such file: {error}", gate=_GATE)
    wrong = [] if len(files) == len(planned) else [f"{len(files)} files instead of {len(planned)}"]
    for gguf, plan in zip(files, planned, strict=False):
        wrong += _different_keys(_without_tokenizer(gguf.values), plan.metadata)
        wrong += _different_tensors(gguf, plan)
    keys = sum(len(plan.metadata) for plan in planned)
    detail = _some(wrong) if wrong else f"{keys} keys equal, no tensor missing or too many"
    return Check("container", "metadata", not wrong, detail, {"different": wrong}, _GATE)


def tokenizer_keys_check(target: Target, checkpoint: Checkpoint) -> Check:
    """Compare the ``tokenizer.*`` keys: vocabulary, special tokens, chat templates, ``tokenizer.json``.

    Args:
        target: The export.
        checkpoint: What it was made from.
    """
    found = {key: value for key, value in target.gguf.values.items() if key.startswith(_TOKENIZER)}
    try:
        expected = _tokenizer_values(target, checkpoint)
    except IrqError as error:
        return Check("tokenizer", "keys", False, f"to-gguf writes no such file: {error}", gate=_GATE)
    wrong = _different_keys(found, expected)
    detail = _some(wrong) if wrong else f"{len(expected)} keys equal"
    return Check("tokenizer", "keys", not wrong, detail, {"different": wrong}, _GATE)


def folder_checks(folder: Path, target: Target) -> Iterator[Check]:
    """Yield what is to say of a manifest and a Modelfile beside a pair, which may be there."""
    try:
        if (folder / MANIFEST_NAME).is_file():
            check_manifest(folder, editable=[MODELFILE_NAME])
            yield Check("container", MANIFEST_NAME, True, "every file as it says")
    except MalformedFile as error:
        yield Check("container", MANIFEST_NAME, False, str(error))
    if (folder / MODELFILE_NAME).is_file():
        yield _modelfile_check(target)
    else:
        yield Check("container", MODELFILE_NAME, None, "there is none: Ollama has to be told of the adapter")


def _modelfile_check(target: Target) -> Check:
    """Compare the Modelfile beside a pair with what to-gguf writes; settings may follow, but no other model.

    Without its ADAPTER Ollama would run the base, which is another model.
    """
    path = target.model.with_name(MODELFILE_NAME)
    gguf, adapter = target.gguf, target.adapter
    tokens, bos = (gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "bos_token_id"))
    is_listed = isinstance(tokens, list) and isinstance(bos, int) and bos < len(tokens)
    template = gguf.metadata.get("tokenizer.chat_template")
    expected = modelfile(
        target.model.name,
        None if adapter is None else adapter.name,
        template if isinstance(template, str) else None,
        tokens[bos] if is_listed else "",  # type: ignore[index]
    )
    found = read_small(path, limit=_MOST_MODELFILE_BYTES).decode(errors="replace")
    added = found.removeprefix(expected).splitlines()
    named = {word.upper() for line in added for word in line.split(maxsplit=1)[:1]}
    is_same = found.startswith(expected) and not named & _NAMING
    detail = f"{len(added)} lines added" if is_same else "names another model, adapter or template"
    return Check("container", MODELFILE_NAME, is_same, detail, gate="begins as to-gguf writes it")


def _planned(target: Target, checkpoint: Checkpoint, adapter: Adapter) -> list[PlannedFile]:
    """Return the files of an export without their tokenizer, the model first."""
    if target.kind == "merged":
        tensors = rope_tensors(checkpoint.model) + merged_tensors(checkpoint, adapter, GgmlType.F16)
        return [PlannedFile(target.model.name, stock_header(checkpoint.model), tuple(tensors))]
    if target.kind == "pair":
        decoded = any(
            block.spec.codebook.startswith("nf")
            and target.gguf.tensors[f"{hf_to_gguf(module)}.weight"].type is GgmlType.BF16
            for module, block in checkpoint.blocks.items()
        )
        nf_type = "bf16" if decoded else "q8_0"
        return [*stock_files(checkpoint, adapter, {}, int2_type="auto", nf_type=nf_type)]
    separate = target.adapter is not None and bool(adapter.layers)
    return [*irq_files(checkpoint, adapter, {}, target.model, separate_adapter=separate)][::-1]


def _tokenizer_values(target: Target, checkpoint: Checkpoint) -> Mapping[str, GgufValue]:
    """Return what to-gguf writes; where it recognises no pre-tokenizer, the file's was given by the user."""
    given = target.gguf.metadata.get(_PRE_TOKENIZER)
    if target.gguf.metadata.get("tokenizer.ggml.model") != "gpt2" or not isinstance(given, str):
        given = None
    try:
        values = _read_tokenizer(target, checkpoint, None)
    except UnsupportedModel:
        if given is None:
            raise
        return _read_tokenizer(target, checkpoint, given)
    if given is not None and values["tokenizer.ggml.model"].value == "none":  # profile irq: only a note
        return _read_tokenizer(target, checkpoint, given)
    return values


def _read_tokenizer(target: Target, checkpoint: Checkpoint, name: str | None) -> Mapping[str, GgufValue]:
    size, stock = checkpoint.model.vocab_size, target.runs_on_stock
    return read_tokenizer(checkpoint.path, size, stock=stock, pre_tokenizer=name).values


def _without_tokenizer(values: Mapping[str, GgufValue]) -> dict[str, GgufValue]:
    return {key: value for key, value in values.items() if not key.startswith(_TOKENIZER)}


def _different_keys(found: Mapping[str, GgufValue], expected: Mapping[str, GgufValue]) -> list[str]:
    """Return the keys that are missing, of another value or type, or too many."""
    strangers = [key for key in found if key not in expected and not key.startswith(_FREE)]
    return [key for key in expected if not _is_same(found.get(key), expected[key])] + strangers


def _is_same(found: GgufValue | None, expected: GgufValue) -> bool:
    if found is None or (found.type, found.element) != (expected.type, expected.element):
        return False
    return np.array_equal(np.asarray(found.value), np.asarray(expected.value))


def _different_tensors(gguf: GgufFile, plan: PlannedFile) -> list[str]:
    """Return names that are missing or too many, and tensors without origin that have another value."""
    planned = {tensor.source.name: tensor for tensor in plan.tensors}
    made = [name for name, tensor in planned.items() if not tensor.origins and name in gguf.tensors]
    changed = [name for name in made if not np.array_equal(gguf.read(name), planned[name].source.load())]
    return [*sorted(planned.keys() ^ gguf.tensors.keys()), *changed]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} differ: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")

"""manifest.json: the commit record of an output directory.

It is written last and holds the size and SHA-256 of every other file, so a directory without a valid
manifest is not an output. Schema: ``formats/schema/manifest.schema.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from irq_formats.errors import MalformedFile, UsageError
from irq_formats.files import FixedFile, open_fixed
from irq_formats.strict_json import parse_object

__all__ = [
    "MANIFEST_FORMAT",
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "check_manifest",
    "unlisted_files",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = "irq-manifest"
MANIFEST_VERSION = 1

_MAX_MANIFEST_BYTES = 16 << 20
_CHUNK_BYTES = 4 << 20


def write_manifest(directory: str | Path, extra: Mapping[str, object] | None = None) -> Path:
    """Write ``manifest.json`` over every file below ``directory``. Same files, same bytes.

    Args:
        directory: A complete output directory (normally the one of ``atomic_dir``).
        extra: JSON values kept under the key ``extra`` (provenance, base hash, …).

    Returns:
        The path of the manifest.

    Raises:
        UsageError: The directory holds a link or special file, or ``extra`` is not JSON.
    """
    directory = Path(directory)
    files = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageError("an output may hold only files and directories", where=path)
        if path.is_file() and name != MANIFEST_NAME:
            files[name] = {"size_bytes": path.stat().st_size, "sha256": _sha256(open_fixed(path))}
    document = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "files": files,
        "extra": dict(extra or {}),
    }
    target = directory / MANIFEST_NAME
    try:
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError("extra is not JSON", where=target, got=error) from error
    with target.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return target


def check_manifest(directory: str | Path, *, editable: Collection[str] = ()) -> dict[str, object]:
    """Compare every listed file with the manifest. Files that are not listed are not looked at.

    Args:
        directory: The output directory.
        editable: Names of files that people may have changed since: these are not compared.

    Returns:
        The parsed manifest.

    Raises:
        MalformedFile: No manifest or a malformed one; a path that leaves the directory; a file
            missing, of another size or with another hash.
    """
    directory = Path(directory)
    manifest, files = _read(directory)
    for name, entry in files.items():
        if name in editable:
            continue
        _check_entry(directory, name, entry, where=directory / MANIFEST_NAME)
    return manifest


def unlisted_files(directory: str | Path) -> list[str]:
    """Return the names of the files below ``directory`` that its manifest does not list, sorted.

    Raises:
        MalformedFile: No manifest or a malformed one.
    """
    directory = Path(directory)
    listed = _read(directory)[1]
    paths = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name not in listed and name != MANIFEST_NAME)


def _read(directory: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Return the manifest and its entries by file name."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise MalformedFile(
            f"no {MANIFEST_NAME}", where=directory, hint="The directory is not a finished output"
        )
    manifest_file = open_fixed(path)
    if manifest_file.size > _MAX_MANIFEST_BYTES:
        raise MalformedFile(
            "too large", where=path, expected=f"≤ {_MAX_MANIFEST_BYTES} bytes", got=manifest_file.size
        )
    manifest = parse_object(manifest_file.read_bytes(0, manifest_file.size), where=path)
    identity = (manifest.get("format"), manifest.get("version"))
    if identity != (MANIFEST_FORMAT, MANIFEST_VERSION):
        raise MalformedFile(
            "not a manifest this version reads",
            where=path,
            expected=f"{MANIFEST_FORMAT} version {MANIFEST_VERSION}",
            got=identity,
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or set(manifest) != {"format", "version", "files", "extra"}:
        raise MalformedFile(
            "wrong keys", where=path, expected="format, version, files, extra", got=sorted(manifest)
        )
    return manifest, files


def _check_entry(directory: Path, name: str, entry: object, *, where: Path) -> None:
    if not _is_plain_relative(name):
        raise MalformedFile(
            "path leaves the directory", where=where, expected="a plain relative path", got=repr(name)
        )
    if not isinstance(entry, dict) or set(entry) != {"size_bytes", "sha256"}:
        raise MalformedFile(
            f"wrong entry for {name}", where=where, expected="size_bytes and sha256", got=entry
        )
    path = directory / name
    if not path.is_file():
        raise MalformedFile("file of the manifest is missing", where=path)
    file = open_fixed(path)
    if file.size != entry["size_bytes"]:
        raise MalformedFile(
            "size differs from the manifest", where=path, expected=entry["size_bytes"], got=file.size
        )
    digest = _sha256(file)
    if digest != entry["sha256"]:
        raise MalformedFile(
            "SHA-256 differs from the manifest", where=path, expected=entry["sha256"], got=digest
        )


def _is_plain_relative(name: str) -> bool:
    parts = name.split("/")
    return (
        "\\" not in name
        and "\0" not in name
        and not PurePosixPath(name).is_absolute()
        and all(part not in {"", ".", ".."} for part in parts)
        and name != MANIFEST_NAME
    )


def _sha256(file: FixedFile) -> str:
    digest = hashlib.sha256()
    for offset in range(0, file.size, _CHUNK_BYTES):
        nbytes = min(_CHUNK_BYTES, file.size - offset)
        digest.update(file.read_bytes(offset, nbytes))
    return digest.hexdigest()

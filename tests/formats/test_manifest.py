"""manifest.json: same files, same bytes; every kind of damage is found; no path leaves the directory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from irq_formats.errors import MalformedFile, UsageError
from irq_formats.manifest import MANIFEST_NAME, check_manifest, write_manifest

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def fill(directory: Path) -> Path:
    (directory / "sub").mkdir(parents=True)
    (directory / "b.bin").write_bytes(bytes(range(256)) * 20_000)  # more than one chunk
    (directory / "a.txt").write_text("hello")
    (directory / "sub" / "empty").touch()
    write_manifest(directory, {"base_hash": "ab", "n": 1})
    return directory


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return fill(tmp_path / "output")


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_good_directory(output: Path, repo: Path) -> None:
    manifest = check_manifest(output)
    files = manifest["files"]
    assert isinstance(files, dict)
    assert list(files) == ["a.txt", "b.bin", "sub/empty"]
    assert files["sub/empty"] == {"size_bytes": 0, "sha256": EMPTY_SHA256}
    assert manifest["extra"] == {"base_hash": "ab", "n": 1}
    schema = json.loads((repo / "formats" / "schema" / "manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)


def test_same_files_same_bytes(output: Path, tmp_path: Path) -> None:
    other = fill(tmp_path / "other")
    assert (other / MANIFEST_NAME).read_bytes() == (output / MANIFEST_NAME).read_bytes()
    write_manifest(other, {"n": 1, "base_hash": "ab"})  # again, over the old one
    assert (other / MANIFEST_NAME).read_bytes() == (output / MANIFEST_NAME).read_bytes()


def test_unlisted_files_are_let_be(output: Path) -> None:
    (output / "README.md").write_text("added for the hub")
    check_manifest(output)


def test_links_into_a_cache_are_followed(output: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (output / "b.bin").rename(blob)
    (output / "b.bin").symlink_to(blob)
    check_manifest(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "a.txt").write_text("hellO"), "SHA-256 differs"),
        (lambda d: (d / "a.txt").write_text("hell"), "size differs"),
        (lambda d: (d / "a.txt").unlink(), "missing"),
        (lambda d: (d / MANIFEST_NAME).unlink(), "no manifest.json"),
        (lambda d: (d / MANIFEST_NAME).write_text("{"), "not valid JSON"),
        (lambda d: (d / MANIFEST_NAME).write_text("[]"), "wrong JSON document"),
        (lambda d: (d / MANIFEST_NAME).write_text('{"files":{},"files":{}}'), "duplicate JSON key"),
        (lambda d: (d / MANIFEST_NAME).write_bytes(b'{"\xff": 1}'), "not valid JSON"),
    ],
)
def test_damage_is_found(output: Path, change: Callable[[Path], object], message: str) -> None:
    change(output)
    with pytest.raises(MalformedFile, match=message):
        check_manifest(output)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(output: Path) -> None:
    (output / "a.txt").unlink()
    os.mkfifo(output / "a.txt")
    with pytest.raises(MalformedFile):
        check_manifest(output)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "sub/../../x", "..", ".", "", "a//b", "./a.txt", "a\\b", "a\0b", "manifest.json"],
)
def test_path_traversal_is_refused(output: Path, name: str, repo: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"size_bytes": 0, "sha256": EMPTY_SHA256}

    edit(output, change)
    with pytest.raises(MalformedFile, match="leaves the directory"):
        check_manifest(output)
    schema = json.loads((repo / "formats" / "schema" / "manifest.schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads((output / MANIFEST_NAME).read_text()), schema)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(format="other"),
        lambda m: m.update(files=[]),
        lambda m: m.update(more=1),
        lambda m: m.pop("extra"),
        lambda m: m["files"].update({"a.txt": 5}),
        lambda m: m["files"]["a.txt"].pop("sha256"),
        lambda m: m["files"]["a.txt"].update(size_bytes="5"),
        lambda m: m["files"]["a.txt"].update(sha256=None),
    ],
)
def test_wrong_contents_are_refused(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(output, change)
    with pytest.raises(MalformedFile):
        check_manifest(output)


def test_a_file_that_people_may_edit_is_not_compared(output: Path) -> None:
    (output / "a.txt").write_text("edited")
    check_manifest(output, editable=["a.txt"])
    with pytest.raises(MalformedFile, match=r"a\.txt"):
        check_manifest(output, editable=["b.txt"])


def test_links_are_not_written(output: Path) -> None:
    (output / "link").symlink_to("a.txt")
    with pytest.raises(UsageError, match="only files and directories"):
        write_manifest(output)


def test_extra_must_be_json(output: Path) -> None:
    for extra in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(UsageError, match="not JSON"):
            write_manifest(output, extra)

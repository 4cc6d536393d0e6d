"""``scripts/make_vectors.py`` writes what is committed, and nothing before all of it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import make_vectors


def _contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of the vectors."""
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "old").write_bytes(b"old")
    monkeypatch.setattr(make_vectors, "VECTORS", tmp_path / "vectors")
    return tmp_path


def test_committed_vectors_are_what_it_writes(repo: Path, vectors: Path) -> None:
    make_vectors.main([])
    assert _contents(vectors / "vectors") == _contents(repo / "formats" / "vectors")
    assert [path.name for path in vectors.iterdir()] == ["vectors"]


def test_asking_for_help_writes_nothing(vectors: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        make_vectors.main(["--help"])
    assert ended.value.code == 0
    assert _contents(vectors) == {"vectors/old": b"old"}


def test_old_vectors_outlive_a_failure(monkeypatch: pytest.MonkeyPatch, vectors: Path) -> None:
    def fail(directory: Path) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(make_vectors.FAMILIES, "models", fail)
    with pytest.raises(KeyboardInterrupt):
        make_vectors.main([])
    assert _contents(vectors) == {"vectors/old": b"old"}

"""The malformed corpus: what a case is, and how the corpus is written.

Each family is a module with ``cases() -> list[Case]``; ``make_vectors.py`` lists the families.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One file, or a few that belong together, that must be refused.

    Attributes:
        name: Unique in its family.
        rule: The rule it breaks.
        message: Part of the error message it must end in.
        files: Bytes by file name; the first is the one to open.
        level: container, model or payload: which check must refuse it.
    """

    name: str
    rule: str
    message: str
    files: dict[str, bytes]
    level: str = "container"


def write_family(kind: str, cases: Iterable[Case], directory: Path) -> list[dict[str, str]]:
    """Write the files of a family to ``directory / kind``; return its entries of cases.json."""
    entries = []
    for case in cases:
        folder = directory / kind / case.name if len(case.files) > 1 else directory / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in case.files.items():
            (folder / name).write_bytes(data)
        entries.append(
            {
                "name": case.name,
                "kind": kind,
                "level": case.level,
                "file": (folder / next(iter(case.files))).relative_to(directory).as_posix(),
                "rule": case.rule,
                "message": case.message,
            }
        )
    return entries


def write_index(entries: list[dict[str, str]], directory: Path) -> None:
    """Write cases.json."""
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    (directory / "cases.json").write_text(text + "\n", encoding="utf-8")

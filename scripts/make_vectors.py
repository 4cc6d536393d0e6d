"""Write every golden vector again: ``python -m scripts.make_vectors`` in the repository root.

One function per family. The same sources give the same bytes; tests/scripts checks that what is
committed is what this script writes. The old vectors stay until all new ones are there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts import malformed_gguf, malformed_model, malformed_onnx, malformed_safetensors
from scripts.block_vectors import write_blocks
from scripts.malformed import Case, write_family, write_index
from scripts.model_vectors import write_models
from scripts.onnx_vectors import write_onnx

VECTORS = Path(__file__).resolve().parent.parent / "formats" / "vectors"

#: Kind of file (a folder of the corpus): what yields its cases. Further families are added here.
MALFORMED: dict[str, list[Callable[[], list[Case]]]] = {
    "gguf": [malformed_gguf.cases, malformed_model.cases],
    "safetensors": [malformed_safetensors.cases],
    "onnx": [malformed_onnx.cases],
}


def write_malformed(directory: Path) -> int:
    """Write the malformed corpus; return how many cases it has."""
    directory.mkdir(parents=True)
    entries = []
    for kind, families in MALFORMED.items():
        entries += write_family(kind, [case for family in families for case in family()], directory)
    write_index(entries, directory)
    return len(entries)


#: Folder of the vectors: what writes it and returns how many there are.
FAMILIES: dict[str, Callable[[Path], int]] = {
    "blocks": write_blocks,
    "models": write_models,
    "onnx": write_onnx,
    "malformed": write_malformed,
}


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(description="Write every golden vector again.").parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=VECTORS.parent, prefix=".vectors-") as folder:
        new, old = Path(folder) / "new", Path(folder) / "old"
        for name, write in FAMILIES.items():
            print(f"{name}: {write(new / name)}")
        VECTORS.rename(old)
        new.rename(VECTORS)


if __name__ == "__main__":
    main()

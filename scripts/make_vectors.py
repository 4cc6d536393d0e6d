"""Write every golden vector: ``python -m scripts.make_vectors`` in the repository root.

One function per family. The same sources give the same bytes; tests/formats checks that what is
committed is what this script writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from scripts import malformed_gguf, malformed_model, malformed_onnx, malformed_safetensors
from scripts.block_vectors import write_blocks
from scripts.malformed import Case, write_family, write_index
from scripts.model_vectors import write_models

VECTORS = Path(__file__).resolve().parent.parent / "formats" / "vectors"

#: Kind of file (a folder of the corpus): what yields its cases. Further families are added here.
MALFORMED: dict[str, list[Callable[[], list[Case]]]] = {
    "gguf": [malformed_gguf.cases, malformed_model.cases],
    "safetensors": [malformed_safetensors.cases],
    "onnx": [malformed_onnx.cases],
}


def write_malformed(directory: Path) -> int:
    """Write the malformed corpus afresh; return how many cases it has."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    entries = []
    for kind, families in MALFORMED.items():
        entries += write_family(kind, [case for family in families for case in family()], directory)
    write_index(entries, directory)
    return len(entries)


def main() -> None:
    print(f"blocks: {write_blocks(VECTORS / 'blocks')}")
    print(f"models: {write_models(VECTORS / 'models')}")
    print(f"malformed: {write_malformed(VECTORS / 'malformed')}")


if __name__ == "__main__":
    main()

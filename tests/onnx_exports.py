"""Exports of tiny models, run on whatever onnxruntime is installed, against torch.

    python tests/onnx_exports.py FOLDER      one line an export: how far its logits are from torch's

:func:`write_exports` fills the folder. Running it needs numpy, onnxruntime and our library alone, so any
release of onnxruntime can be put before the installed one on the path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from tiny_onnx import OnnxRunner, nmse

__all__ = ["BOOKS", "FORMS", "worst_nmse", "write_exports"]

#: Embedding and head are int8, so that every operator is among them.
BOOKS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
FORMS = {"gqa": {}, "standard": {"attention": "standard"}, "stock": {"profile": "stock"}}
IDS = np.random.default_rng(0).integers(0, 259, (2, 24))


def write_exports(folder: Path) -> None:
    """Write every codebook, dtype and form with an adapter, and what torch computes with it and without.

    Folders are ``FOLDER/CODEBOOK/DTYPE-FORM``.
    """
    from tiny_checkpoints import write_tiny_checkpoint

    from irq_export.export.onnx import to_onnx
    from irq_export.iec import attach, random_adapter
    from irq_export.quantizer import load_model
    from irq_formats.blocks import BlockSpec
    from irq_formats.checkpoint import open_checkpoint
    from irq_formats.peft_adapter import write_peft_adapter

    for book in BOOKS:
        checkpoint, tuned = folder / book / "checkpoint", folder / book / "tuned"
        write_tiny_checkpoint(checkpoint, BlockSpec(book), embedding=True)
        model = load_model(checkpoint)
        np.save(folder / book / "base.npy", _logits(model))
        adapter = random_adapter(model, rank=8, seed=1, base_hash=open_checkpoint(checkpoint).base_hash)
        write_peft_adapter(tuned, adapter, base_model_name="base")
        attach(model, adapter)
        np.save(folder / book / "tuned.npy", _logits(model))
        for dtype in ("f32", "f16"):
            for form, options in FORMS.items():
                output = folder / book / f"{dtype}-{form}"
                to_onnx(checkpoint, output, adapters=[tuned], dtype=dtype, int_bits="own", **options)


def worst_nmse(export: Path) -> float:
    """Return the largest NMSE of an export's logits to torch.

    Of the base, the adapter swapped in, and the base again; through the function bodies, and with our
    library where the model has nodes for it.
    """
    expected = {name: np.load(export.parent / f"{name}.npy") for name in ("base", "tuned")}
    found = []
    for library in (False,) if export.name.endswith("stock") else (False, True):
        runner = OnnxRunner(export, library=library)
        for name in ("base", "tuned", "base"):
            runner.use(None if name == "base" else export / "tuned.onnx_adapter")
            found.append(nmse(runner.logits(IDS), expected[name]))
    return max(found)


def run_all(folder: Path) -> Iterator[str]:
    """Yield ``CODEBOOK DTYPE-FORM NMSE`` of every export."""
    for model in sorted(folder.glob("*/*/model.onnx")):
        export = model.parent
        yield f"{export.parent.name} {export.name} {worst_nmse(export):.1e}"


def _logits(model: object) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


if __name__ == "__main__":
    sys.stdout.write(f"onnxruntime {onnxruntime.__version__}\n")
    for line in run_all(Path(sys.argv[1])):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()  # what comes next may crash

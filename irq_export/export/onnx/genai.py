"""What onnxruntime-genai needs beside the model: ``genai_config.json``, and our library if asked for.

genai finds tokenizer and chat template by itself, in the Hugging Face files that are copied anyway. The
graph's inputs and outputs have the names that it expects; ``onnxruntime_genai.Adapters`` loads adapter files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irq_export.export.onnx.options import OnnxOptions
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import MalformedFile
from irq_formats.files import read_small
from irq_formats.hf_tokenizer import special_ids
from irq_formats.onnx.model_file import MODEL_NAME
from irq_formats.strict_json import parse_object
from irq_runtime.onnx import library_path

__all__ = ["GENAI_CONFIG", "genai_config", "write_genai_config", "write_library"]

GENAI_CONFIG = "genai_config.json"
_MOST_BYTES = 256 << 20  # more than any tokenizer.json has

#: Fields of generation_config.json that genai's search knows under the same names.
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "length_penalty")
_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def genai_config(checkpoint: Checkpoint, options: OnnxOptions) -> dict[str, Any]:
    """Return the contents of ``genai_config.json``.

    Args:
        checkpoint: The model, with its ``config.json`` and ``generation_config.json``.
        options: Of the export.

    Raises:
        MalformedFile: A token id is no number, or a text would end at one that the model does not have. One
            that pads or begins a text and is outside the vocabulary counts for none.
    """
    config, generation = checkpoint.model, _generation(checkpoint.path)
    known = {**checkpoint.config, **{k: v for k, v in generation.items() if v is not None}}
    ends = _ids(checkpoint, known, "eos_token_id")
    for token in ends:
        if token >= config.vocab_size:
            raise MalformedFile(
                "a token id outside the vocabulary",
                where=f"{checkpoint.path}: eos_token_id",
                expected=f"0 to {config.vocab_size - 1}",
                got=token,
            )
    stops = [*dict.fromkeys([*ends, *_tokenizer_end(checkpoint)])]
    pads, starts = (
        [token for token in _ids(checkpoint, known, key) if token < config.vocab_size]
        for key in ("pad_token_id", "bos_token_id")
    )
    context = options.context or config.max_position_embeddings
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_NAME,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    if options.library:
        decoder["session_options"]["custom_ops_library"] = library_path().name
    model: dict[str, Any] = {
        "type": config.family,
        "vocab_size": config.vocab_size,
        "context_length": context,
        "eos_token_id": stops,
        "pad_token_id": (pads or stops or [0])[0],
        "decoder": decoder,
    }
    if starts:
        model["bos_token_id"] = starts[0]
    chosen = {key: generation[key] for key in _SEARCH if generation.get(key) is not None}
    # Only onnxruntime's operator writes into a cache that has room for positions to come.
    shared = {"max_length": context, "past_present_share_buffer": options.attention == "gqa"}
    return {"model": model, "search": {**_DEFAULTS, **chosen, **shared}}


def write_genai_config(directory: Path, checkpoint: Checkpoint, options: OnnxOptions) -> None:
    """Write ``genai_config.json``."""
    text = json.dumps(genai_config(checkpoint, options), indent=2, allow_nan=False)
    (directory / GENAI_CONFIG).write_text(text + "\n", encoding="utf-8")


def write_library(directory: Path, checkpoint: Checkpoint, options: OnnxOptions) -> None:
    """Copy our library of this machine beside the model, if asked for: genai loads it from there."""
    if options.library:
        shutil.copyfile(library_path(), directory / library_path().name)


def _generation(directory: Path) -> Mapping[str, Any]:
    path = directory / "generation_config.json"
    return parse_object(read_small(path, limit=_MOST_BYTES), where=path) if path.is_file() else {}


def _tokenizer_end(checkpoint: Checkpoint) -> list[int]:
    """Return the tokenizer's own end of sequence, with which training ends a reply."""
    path = checkpoint.path / "tokenizer.json"
    if not path.is_file():
        return []
    document = parse_object(read_small(path, limit=_MOST_BYTES), where=path)
    end = special_ids(checkpoint.path, document).get("eos_token_id")
    return [] if end is None or end >= checkpoint.model.vocab_size else [end]


def _ids(checkpoint: Checkpoint, known: Mapping[str, Any], key: str) -> list[int]:
    """Return the token ids of a field that may hold none, one or several; -1 is none, as it once was."""
    value = known.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise MalformedFile("not a token id", where=f"{checkpoint.path}: {key}", got=token)
    return [token for token in ids if token >= 0]

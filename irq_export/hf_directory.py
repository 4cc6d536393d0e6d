"""Hugging Face directories that others wrote: their tokenizer and their model, whole or not at all.

transformers makes random weights for what a directory lacks and goes on; here that is an error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["check_tokens", "load_causal_lm", "read_tokenizer", "torch_device"]


def torch_device(name: str) -> torch.device:
    """Return a device of torch that is there.

    Raises:
        UsageError: It is not.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError("no such device", got=name, hint="Compute on the CPU with --device cpu") from error
    return device


def read_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """Read ``tokenizer.json``; texts are neither cut nor padded, whatever it says.

    Raises:
        UsageError: There is none.
        MalformedFile: It is no tokenizer.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UsageError("no such file", where=file)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise MalformedFile("not a tokenizer", where=file, got=error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_tokens(highest: int, model: nn.Module) -> None:
    """Refuse tokens for which a model of transformers has no embedding.

    Raises:
        MalformedFile: ``highest``, the highest of them, is beyond its vocabulary.
    """
    config: Any = model.config
    if highest >= config.vocab_size:
        raise MalformedFile(
            "the tokenizer has tokens that the model does not have",
            expected=f"at most {config.vocab_size - 1}",
            got=highest,
            hint="Take the model's own tokenizer.json, or resize the model's embedding to it",
        )


def load_causal_lm(directory: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Open a causal language model, in evaluation mode.

    Raises:
        UnsupportedModel: transformers cannot open it, or finds no safetensors weights.
        MalformedFile: A weight is missing or of another shape than the model's.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported as the missing ones are
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModel("transformers cannot open the model", where=directory, got=error) from error
    info: dict[str, Any] = loaded[1]
    for what, key in (("missing", "missing_keys"), ("of another shape than the model's", "mismatched_keys")):
        if names := sorted(map(str, info[key])):
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise MalformedFile(f"{len(names)} weights are {what}", where=directory, got=shown)
    model: PreTrainedModel = loaded[0].to(device).eval()
    return model

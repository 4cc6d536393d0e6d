"""The tokenizer of a Hugging Face directory, cutting text as its ``tokenizer.json`` says.

That file travels with every export, so its tokens are those of the deployed model. transformers does not
always follow it: for LlamaTokenizer it rebuilds normaliser and splitter, after which the word behind a
special token is another token, and ``tokenizer_config.json`` may give added tokens other flags. What is
trained on has to be what is deployed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from irq_formats.errors import MalformedFile

__all__ = ["load_tokenizer"]


def load_tokenizer(directory: str | Path) -> Any:
    """Return the tokenizer of transformers for a directory.

    Names of special tokens and the chat template are as transformers reads them. Without a
    ``tokenizer.json`` all of it is.

    Raises:
        MalformedFile: transformers cannot read it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rules = Path(directory) / "tokenizer.json"
    reader: Any = PreTrainedTokenizerFast if rules.is_file() else AutoTokenizer
    try:
        tokenizer = reader.from_pretrained(str(directory), local_files_only=True)
        if rules.is_file():
            tokenizer._tokenizer = Tokenizer.from_file(str(rules))
            tokenizer._tokenizer.no_truncation()
            tokenizer._tokenizer.no_padding()
            tokenizer.split_special_tokens = False
        return tokenizer
    except ImportError:  # an extra that is not installed
        raise
    except Exception as error:  # whatever comes up
        got = f"{type(error).__name__}: {error}"
        raise MalformedFile("transformers cannot read the tokenizer", where=directory, got=got) from error

"""The tokenizer of a Hugging Face directory, cutting text as its ``tokenizer.json`` says.

That file travels with every export, so its tokens are those of the deployed model. ``AutoTokenizer`` of
transformers 5 does not always follow it: for LlamaTokenizer it rebuilds normaliser and splitter, after which
the word behind a special token is another token. What is trained on has to be what is deployed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irq_formats.errors import MalformedFile

__all__ = ["load_tokenizer"]


def load_tokenizer(directory: str | Path) -> Any:
    """Return the tokenizer of transformers for a directory.

    Without a ``tokenizer.json`` it is the one that AutoTokenizer builds.

    Raises:
        MalformedFile: transformers cannot read it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_rules = (Path(directory) / "tokenizer.json").is_file()
    reader: Any = PreTrainedTokenizerFast if has_rules else AutoTokenizer
    try:
        return reader.from_pretrained(str(directory), local_files_only=True)
    except ImportError:  # an extra that is not installed
        raise
    except Exception as error:  # whatever comes up
        got = f"{type(error).__name__}: {error}"
        raise MalformedFile("transformers cannot read the tokenizer", where=directory, got=got) from error

"""What stock llama.cpp makes of a text with the tokenizer of a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import TEXT

from irq_export.export.gguf import to_gguf
from irq_export.parity.llamacpp import LlamaCpp
from irq_formats.blocks import BlockSpec
from irq_formats.gguf import open_gguf

__all__ = ["CHATML", "LINES", "edit_tokenizer", "stock_tokens"]

#: Texts on which tokenizers are compared.
LINES = [
    *TEXT[:3],
    "the quick 1234567 brown's",
    "  the  quickest\n\n x  ",
    "naïve 東京!!! 2024-01-01",
    "WE'LL see what I'd do\r\n\r\n\tthen…",
    "🙂 emoji, e\u0301 combining, ​zero width",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a",
    " ",
    "<|im_start|>the quick<|im_end|> the quick <|im_end|>\n",
    "the   ",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def stock_tokens(tmp_path: Path, tokenizer_dir: Path, vocab_size: int, lines: list[str]) -> list[list[int]]:
    """Export a tiny model with the tokenizer of a directory; return what llama.cpp makes of the lines."""
    checkpoint = tmp_path / "checkpoint"
    write_tiny_checkpoint(
        checkpoint, BlockSpec("int4"), embedding=True, tied=True, vocab_size=vocab_size, num_hidden_layers=1
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_dir / name, checkpoint / name)
    to_gguf(checkpoint, tmp_path / "pair", profile="stock")
    base, adapter = (tmp_path / "pair" / name for name in ("base.gguf", "adapter.gguf"))
    verbatim = open_gguf(base).metadata["tokenizer.huggingface.json"]
    assert verbatim == (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    with LlamaCpp(base, adapter, threads=1, ctx=64) as model:
        return [list(model.tokenize(line)) for line in lines]


def edit_tokenizer(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the ``tokenizer.json`` of a directory."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))

"""``scripts/make_synthetic.py`` takes tokenizers of every kind, of our files and of stock ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import write_tiny_checkpoint
from tiny_tokenizers import save_tiny_tokenizer

import irq_export
from irq_formats.errors import OutputExists
from irq_formats.gguf import open_gguf
from irq_runtime.engine import Engine


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt-2"])
def test_tokenizers_are_copied(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import make_synthetic

    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 2)
    tiny = sizes | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64}
    monkeypatch.setitem(make_synthetic.SHAPES, "tiny", tiny)
    tokenizer = save_tiny_tokenizer(tmp_path, kind)
    vocabulary = tokenizer.get_vocab_size()
    write_tiny_checkpoint(tmp_path / "checkpoint", vocab_size=vocabulary)
    for file in tmp_path.glob("tokenizer*"):
        file.replace(tmp_path / "checkpoint" / file.name)
    irq_export.to_gguf(tmp_path / "checkpoint", tmp_path / "source.gguf")

    def make(tokenizer: Path, *more: str) -> None:
        make_synthetic.main(
            [str(tmp_path), "--tokenizer", str(tokenizer), "--shape", "tiny", "--kinds", *more]
        )

    make(tmp_path / "source.gguf", "nf4", "Q4_0")
    ours, stock = (open_gguf(tmp_path / f"tiny-{kind}.gguf") for kind in ("nf4", "Q4_0"))
    assert len(Engine(tmp_path / "tiny-nf4.gguf", mode="exact").logits([1, 2])[0]) == vocabulary
    source = open_gguf(tmp_path / "source.gguf").metadata
    for key, value in source.items():
        if key.startswith("tokenizer."):
            assert (
                list(ours.metadata[key]) == list(value)
                if hasattr(value, "__len__")
                else ours.metadata[key] == value
            )

    with pytest.raises(OutputExists):
        make(tmp_path / "source.gguf", "nf4")
    make(tmp_path / "tiny-Q4_0.gguf", "nf4", "--force")  # a stock file's
    assert open_gguf(tmp_path / "tiny-nf4.gguf").metadata["irq.model.vocab_size"] == vocabulary
    assert stock.metadata["llama.vocab_size"] == vocabulary

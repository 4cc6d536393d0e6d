"""Tiny tokenizers of every kind that stock files can carry, trained on a few lines."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["PRE_TOKENIZERS", "VOCAB_SIZE", "save_tiny_tokenizer"]

VOCAB_SIZE = 384  # more than any of them has: the rest becomes [PADn]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXT = [
    "The quick brown fox jumps over the lazy dog; it's 12345 times quicker than the 678 dogs, isn't it?",
    "I'VE SEEN 3.14159 THINGS YOU WOULDN'T BELIEVE!\n\nAttack ships on fire:   off the shoulder\r\n of it.",
    "Größe, café, naïve, 東京, дом; x += y[i] * (z - 1);\t# a comment   \n",
] * 4
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_HEAD + numbers + _TAIL), "isolated")
    return pre_tokenizers.Sequence([split, _BYTES])


#: llama.cpp's name -> (pre-tokenizer, ignore_merges).
PRE_TOKENIZERS = {
    "gpt-2": (_GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), True),
    "dbrx": (_split(r"\p{N}{1,3}"), False),
    "qwen2": (_split(r"\p{N}"), False),
}


def _byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, ignore_merges: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """BPE with byte fallback, with every split of every piece as a merge, as converted from SentencePiece."""
    pieces = ["▁t", "he", "▁the", "in", "er", "▁a", "▁o", "on", "qu", "▁qu", "ic", "ick", "▁quick", "the"]
    letters = sorted(
        {letter for line in TEXT for letter in line.replace(" ", "▁") if letter.isascii()} | {"▁"}
    )
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def save_tiny_tokenizer(
    directory: Path, kind: str = "gpt-2", *, bos: bool = True, chat_template: str | None = None
) -> Tokenizer:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` and return the tokenizer.

    Args:
        directory: An existing directory.
        kind: A key of :data:`PRE_TOKENIZERS`, or ``sentencepiece``.
        bos: Whether ``<s>`` is put before every text.
        chat_template: jinja2 source.
    """
    tokenizer = _sentencepiece() if kind == "sentencepiece" else _byte_level(*PRE_TOKENIZERS[kind])
    if bos:
        bos_id = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos_id)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer

r"""Which of llama.cpp's pre-tokenizers does what a ``tokenizer.json`` says?

llama.cpp knows pre-tokenizers by name only; each name stands for regular expressions in its source
(``llama-vocab.cpp``). Upstream's converter finds the name through a hash of the token ids of one fixed
string. Here the description itself is compared: a name is chosen only where the splitting rules are the
same ones, so a tokenizer that merely agrees on one string is not mistaken for another.
"""

from __future__ import annotations

from collections.abc import Mapping

from irq_formats.errors import MalformedFile, UnsupportedModel

__all__ = ["LLAMACPP_NAMES", "PRE_TOKENIZERS", "recognise_pre_tokenizer"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL

#: One step of a pre-tokenizer, reduced to what changes the splitting.
_Step = tuple[str, str | bool]
_BYTES_GPT2: _Step = ("ByteLevel", True)  # splits with GPT-2's expression, then maps bytes
_BYTES_ONLY: _Step = ("ByteLevel", False)  # maps bytes only

#: (steps, ignore_merges) -> llama.cpp's name. ignore_merges: a whole word in the vocabulary is one token.
PRE_TOKENIZERS: dict[tuple[tuple[_Step, ...], bool], str] = {
    ((_BYTES_GPT2,), False): "gpt-2",
    ((("Digits", True), _BYTES_GPT2), False): "smollm",
    ((("Split", _LLAMA3), _BYTES_ONLY), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES_ONLY), False): "dbrx",
    ((("Split", _QWEN2), _BYTES_ONLY), False): "qwen2",
}


#: All names that llama.cpp of October 2026 loads (``llama-vocab.cpp``; each tried): what a user may give.
_NAMES = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe command-r dbrx
    deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone exaone-moe exaone4 f2llmv2
    falcon falcon-h1 falcon3 gemma4 gigachat glm4 gpt-2 gpt-4o gpt3-finnish granite-docling
    granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan hunyuan-dense jais jais-2 jina-de
    jina-es jina-v1-en jina-v2-code jina-v2-de jina-v2-es jina-v5-nano joyai-llm k2-horizon kanana2
    kimi-k2 kormo laguna lfm2 llada-moe llama-bpe llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0
    minerva-7b minicpm5 minimax-m2 modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact
    roberta-bpe sarvam-moe seed-coder smaug-bpe smollm solar-open stablelm2 starcoder superbpe talkie
    tekken tiny_aya trillion viking whitespace youtu
"""
LLAMACPP_NAMES = frozenset(_NAMES.split())


def recognise_pre_tokenizer(tokenizer: Mapping[str, object], where: object) -> str:
    """Return llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        tokenizer: The parsed ``tokenizer.json``.
        where: Its path, for messages.

    Raises:
        UnsupportedModel: No name stands for these rules, or a normaliser changes the text first.
        MalformedFile: The file has no such structure.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"), where)
    model = tokenizer.get("model")
    ignore_merges = isinstance(model, Mapping) and model.get("ignore_merges") is True
    name = PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is None:
        raise UnsupportedModel(
            "llama.cpp has no pre-tokenizer that is known to split like this one",
            where=f"{where}: pre_tokenizer",
            expected=" | ".join(sorted(set(PRE_TOKENIZERS.values()))),
            got=f"{list(steps)}, ignore_merges {ignore_merges}",
            hint="If you know its name in llama.cpp, give it with --pre-tokenizer NAME and check the tokens",
        )
    return name


def _steps(node: object, where: object) -> tuple[_Step, ...]:
    """Flatten a pre-tokenizer into its steps; what is not understood stays as a step that matches nothing."""
    if node is None:
        return ()
    if not isinstance(node, Mapping):
        raise MalformedFile("wrong type of value", where=f"{where}: pre_tokenizer", expected="an object")
    kind = str(node.get("type"))
    if kind == "Sequence":
        parts = node.get("pretokenizers")
        if not isinstance(parts, list):
            raise MalformedFile("a sequence without steps", where=f"{where}: pre_tokenizer")
        return tuple(step for part in parts for step in _steps(part, where))
    if kind == "ByteLevel" and not node.get("add_prefix_space", True):
        return (("ByteLevel", bool(node.get("use_regex", True))),)
    if kind == "Digits":
        return (("Digits", bool(node.get("individual_digits", False))),)
    pattern = node.get("pattern")
    if kind == "Split" and isinstance(pattern, Mapping):
        plain = node.get("behavior") == "Isolated" and not node.get("invert", False)
        return (("Split" if plain else "Split, other behaviour", str(pattern.get("Regex"))),)
    return ((kind, str(sorted(node.items(), key=str))),)

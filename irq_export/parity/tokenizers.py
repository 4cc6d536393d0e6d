"""The tokenizer as trained, and the texts on which every other one must agree with it.

Texts are a fixed corpus, what splitters treat differently, every added token of the model between letters,
spaces and line ends (its flags decide what it takes with it), and conversations in its chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from irq_export.parity.report import Check
from irq_export.trained_tokenizer import load_tokenizer

__all__ = ["CHATS", "Sample", "TrainedTokenizer", "corpus", "tokens_check"]

#: Conversations; a template may refuse a system message.
CHATS: tuple[list[dict[str, str]], ...] = (
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Is 2 + 2 = 4?"},
    ],
    [
        {"role": "user", "content": "Is 2 + 2 = 4?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": " And 2 + 3?\n"},
    ],
    [{"role": "user", "content": "Is 2 + 2 = 4?"}],
)
#: Where the splitters of llama.cpp differ: line ends, spaces, contractions, brackets, numerals.
_HARD = (
    "I'VE SEEN IT, we'LL GO, They'Re here: isn'T it? 'Tis ''s 'sample' 'd",
    "one\n\ntwo\n\n\nthree\r\n\r\nfour \n five\n  six\n\tseven  \n\n  ",
    'End.\nNext!\n\n(word) [word] {word} "word" _word_ #word $word ...word\n};\n\n\t}\n',
    "a1b22c333d4444e55555 1234567 007 3.14159,2 v1.2.3-rc4 0b1010 1e-05",
    "x\u00a0y \u00a0 z\u3000w \u2028v 東京1丁目２３ ٣٤٥٦ Ⅳ²½x дом's",
)
_TOKENS_A_LINE = 8


def corpus() -> list[str]:
    """Return the lines that are the same for every model."""
    text = (Path(__file__).parent / "corpus.txt").read_text(encoding="utf-8")
    return text.splitlines()


@dataclass(frozen=True)
class Sample:
    """A text to encode.

    Attributes:
        text: It.
        add_special: Whether the tokenizer puts BOS and the like around it; a chat template does so itself.
        tokens: What training saw.
    """

    text: str
    add_special: bool
    tokens: tuple[int, ...]


class TrainedTokenizer:
    """The tokenizer of a checkpoint, as training reads it.

    Args:
        directory: The checkpoint.

    Raises:
        MalformedFile: transformers cannot read it.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_tokenizer(directory)

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template."""
        return bool(self._tokenizer.chat_template)

    @property
    def size(self) -> int:
        """Tokens, those added included."""
        return len(self._tokenizer)

    @property
    def end(self) -> int | None:
        """Its end-of-sequence token."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def render(self, chat: list[dict[str, str]]) -> str:
        """Return the text of a conversation; raises what the template raises."""
        text: str = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text

    def samples(self) -> list[Sample]:
        """Return all texts with their tokens."""
        plain = [*corpus(), "\n".join(corpus()[:3]), *_HARD, *self._lines_of_added_tokens()]
        texts = [(text, True) for text in plain] + [(chat, False) for chat in self._rendered()]
        return [
            Sample(text, add_special, tuple(self.encode(text, add_special=add_special)))
            for text, add_special in texts
        ]

    def _lines_of_added_tokens(self) -> Iterator[str]:
        """Yield every added token at the beginning of a line, of a word, in a word and between spaces."""
        added = [str(token) for _, token in sorted(self._tokenizer.added_tokens_decoder.items())]
        for start in range(0, len(added), _TOKENS_A_LINE):
            some = added[start : start + _TOKENS_A_LINE]
            yield "".join(f"{token}x {token} y{token}z {token}\n{token}\n" for token in some)

    def _rendered(self) -> Iterator[str]:
        for chat in CHATS if self.has_template else ():
            with suppress(Exception):  # a template may refuse a conversation: another check
                yield self.render(chat)


def tokens_check(name: str, samples: Sequence[Sample], encode: Callable[[str, bool], Sequence[int]]) -> Check:
    """Compare another tokenizer with the one as trained.

    Args:
        name: Whose tokenizer it is.
        samples: Texts and the tokens that training saw.
        encode: Takes a text, and whether to add special tokens.
    """
    wrong = [i for i, one in enumerate(samples) if tuple(encode(one.text, one.add_special)) != one.tokens]
    detail = f"{len(samples) - len(wrong)} of {len(samples)} lines equal"
    if wrong:
        detail += f"; first difference in line {wrong[0] + 1}: {samples[wrong[0]].text!r:.60}"
    return Check("tokenizer", f"{name} against checkpoint", not wrong, detail, {"different_lines": wrong})

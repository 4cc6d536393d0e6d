"""The text that the demo model reads: prose of public-domain books, and small made-up stories.

A corpus is books parted by a line ``<|endoftext|>``; an index beside it has a ``title<TAB>bytes``
line for each.  Books are reduced to running ASCII prose: one chapter a document, one paragraph a
line.  The made-up stories are a handful of plots with changing people and things, simple enough
for a model of this size to tell without losing the thread.
"""

from __future__ import annotations

import hashlib
import lzma
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["AUTHORS", "Corpus", "chapters", "read_corpus", "tell_story"]

SEPARATOR = "<|endoftext|>\n"  # between the books of a corpus

# Plain narrative prose: authors as the corpus' index files them, less what they wrote otherwise.
AUTHORS = (
    "Alcott", "Alger", "Andersen", "Barrie", "Baum", "Burnett", "Burroughs", "Carroll", "Christie",
    "Collins", "Dickens", "Doré", "Doyle", "Emshwiller", "Goldfrap", "Grimm", "Hawthorne", "Henty",
    "Hoskins", "Kipling", "Lang", "London", "Montgomery", "Nesbit", "Orban", "Stevenson", "Stoker",
    "Townsend", "Twain", "Verne", "Weir", "Wells", "Wilde", "Wodehouse", "Wrenn",
)  # fmt: skip
NOT_STORIES = re.compile(
    r"Admirable Crichton|What Every Woman|Fruitlands|Ballads|My Miscellanies|Rambles Beyond|Bardell"
    r"|Letters|Poems|Verse|Rhymes|Raven|Atala|Gargantua|Three Fronts|Songs|German War|Magic Door"
    r"|Biographical|Notebooks|Those Other|Abaft|Sea Warfare|Pilgrimage|Essays|Bookmen|Cock Lane|Custom"
    r"|Parnassus|Homer|How to|Sublime|Social|Sylvie|Clyde|Death-Wake|Library|Religion|Puzzle|Swanston"
    r"|Geierstein|Acorn|Empire|Rainbow|Men and Books|A Day with|Life of|Pocket|Secrets of the Sword"
    r"|Celebrated|Anecdotes|Utopia|Boon|Certain Personal|Little Wars|Mankind|New Worlds|War and the"
    r"|Autobiography|Prison|Burmese|Aphorisms|Main Street|Old News",
    re.IGNORECASE,
)
ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...",
                       "æ": "ae", "œ": "oe", "Æ": "Ae", "_": "", "\xa0": " "})  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Cleaned text: ``documents`` are chapters, ``raw_sha256`` identifies the books they came from."""

    titles: tuple[str, ...]
    documents: tuple[str, ...]
    raw_sha256: str

    @property
    def characters(self) -> int:
        """Characters of the text, one line feed a document counted in."""
        return sum(len(document) + 1 for document in self.documents)


def read_corpus(path: Path, index: Path | None, authors: Sequence[str] = AUTHORS) -> Corpus:
    """Read the books of a corpus, keep the stories, and clean them.

    Args:
        path: Text file, plain or ``.xz``; books parted by a line ``<|endoftext|>``.
        index: Titles in the order of the corpus; without it every book is kept.
        authors: Family names of the authors to keep.

    Raises:
        ValueError: The index does not fit the corpus, or no book is left.
    """
    text = (lzma.open if path.suffix == ".xz" else open)(path, "rb").read().decode("utf-8")
    books = [book for book in text.split(SEPARATOR) if book.strip()]
    titles = [f"book {number}" for number in range(1, len(books) + 1)]
    if index is not None:
        records = re.findall(r"(.+?)\.txt\t\d+\n", index.read_text("utf-8"), re.DOTALL)
        titles = [" ".join(title.split()) for title in records]
        if len(titles) != len(books):
            raise ValueError(f"{index}: {len(titles)} titles for {len(books)} books of {path}")
    kept = [pair for pair in zip(titles, books, strict=True) if index is None or is_story(pair[0], authors)]
    if not kept:
        raise ValueError(f"{path}: no story by {', '.join(authors)}; leave the index out to keep all books")
    return Corpus(
        titles=tuple(title for title, _ in kept),
        documents=tuple(document for _, book in kept for document in chapters(book)),
        raw_sha256=hashlib.sha256(SEPARATOR.join(book for _, book in kept).encode()).hexdigest(),
    )


def chapters(book: str, shortest: int = 800) -> Iterator[str]:
    """Yield a book's chapters as ASCII prose, one paragraph a line; front matter and verse go.

    A heading (one short line without a lower-case word, or a line "Chapter ...") starts a chapter;
    chapters shorter than ``shortest`` characters are tables, dedications and advertisements.
    """
    paragraphs: list[str] = []
    for block in [*re.split(r"\n[ \t]*\n", book), "CHAPTER"]:
        line = unicodedata.normalize("NFKD", " ".join(block.translate(ASCII).split()))
        line = re.sub("[\u0300-\u036f]", "", line)  # accents
        if is_heading(line):
            if sum(map(len, paragraphs)) >= shortest:
                yield "\n".join(paragraphs)
            paragraphs = []
        elif is_prose(block, line):
            paragraphs.append(line)


def is_story(title: str, authors: Sequence[str]) -> bool:
    """Whether a title of the index, "Author, Name/Title", is plain narrative prose."""
    author, _, name = title.partition("/")
    return author.split(",")[0] in authors and NOT_STORIES.search(name) is None


def is_heading(line: str) -> bool:
    """Whether a paragraph is a chapter heading."""
    short = len(line) < 70 and any(char.isalpha() for char in line)
    return short and (line == line.upper() or re.match(r"(?i)(chapter|story)\b", line) is not None) \
        and not line.endswith(('"', "!", "?"))  # fmt: skip


def is_prose(block: str, line: str) -> bool:
    """Whether a paragraph is running text: not indented, no notes, a full stop at its end."""
    return (
        len(line) >= 8
        and line.isascii()
        and any(char.isalpha() for char in line)
        and not block.strip("\n").startswith(("  ", "\t"))
        and not re.search(r"[\[\]{}|*=<>\\#@~^]|\d{4}|\.\.\.\.|Illustration|Transcriber|Gutenberg", line)
        and re.search(r"[.!?:;,-]['\")]*$", line) is not None
    )


# People: who, name, subject, object, possessive.
PEOPLE = [
    *((f"{age} girl", name, "she", "her", "her") for age in ("little", "young", "merry", "poor")
      for name in ("Nell", "Rose", "Anna", "Lily", "Mary", "Kate", "Ellen", "Dora")),
    *((f"{age} boy", name, "he", "him", "his") for age in ("little", "young", "brave", "poor")
      for name in ("Tom", "Jack", "Ben", "Will", "Peter", "Hans", "Robin", "Ned")),
]  # fmt: skip
HOMES = ("in a small house by the sea", "in a cottage near the forest", "on a farm below the hills",
         "in an old mill by the river", "in a little town at the foot of a mountain")  # fmt: skip
PARENTS = ("mother", "father", "grandmother", "grandfather", "old aunt")
ANIMALS = ("a white rabbit", "a brown dog", "a gray cat", "a little bird", "a red fox", "a black hen",
           "a small mouse", "an old owl", "a golden fish", "a green frog")  # fmt: skip
THINGS = ("a silver key", "a gold ring", "a red apple", "a blue stone", "a small box", "a warm coat",
          "a wooden flute", "a bright lamp", "a paper boat", "a little bell")  # fmt: skip
PLACES = ("the forest", "the garden", "the old castle", "the river", "the top of the hill",
          "the market", "the shore", "the great oak tree")  # fmt: skip
MOODS = ("happy", "glad", "proud", "thankful")
OPENINGS = ("Once upon a time there was a {who} named {name}, who lived {home} with {his} {parent}.",
            "Once upon a time a {who} named {name} lived {home} with {his} {parent}.",
            "There was once a {who} whose name was {name}. {He} lived {home} with {his} {parent}.",
            "Long ago a {who} called {name} lived {home} with {his} {parent}.")  # fmt: skip
# One plot a block, with {slots}; see `tell_story`.
PLOTS = Path(__file__).with_name("demo_plots.txt").read_text("utf-8").strip().split("\n\n")


def tell_story(rng: random.Random) -> str:
    """One made-up story, a paragraph a line."""
    who, name, he, him, his = rng.choice(PEOPLE)
    animal, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    place, place2 = rng.sample(PLACES, 2)
    words = {
        "who": who, "name": name, "he": he, "He": he.capitalize(), "him": him, "his": his,
        "home": rng.choice(HOMES), "parent": rng.choice(PARENTS), "mood": rng.choice(MOODS),
        "animal": animal, "beast": animal.split()[-1], "thing": thing, "item": thing.split()[-1],
        "place": place, "place2": place2,
    }  # fmt: skip
    return f"{rng.choice(OPENINGS)}\n{rng.choice(PLOTS)}".format(**words)

"""Training sets in memory: loading, cutting, packing, batching, order.

The order of an epoch is a function of the seed and its number alone, so that an interrupted run continues
with the batches it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from irq_export.train.config import TrainConfig
from irq_export.train.data_formats import load_conversations
from irq_export.train.prompts import IGNORED, Example, choose_prompt, encode
from irq_formats.errors import MalformedFile

__all__ = ["Collator", "EpochOrder", "Row", "Rows", "load_data", "load_rows", "pack"]

#: Batches whose examples are sorted together: long enough to pair like lengths, short enough to stay random.
_BATCHES_SORTED = 50
_PAD_MULTIPLE = 8
#: Tokens on which importance is measured: 128 windows of 512.
_SAMPLED = 1 << 16

#: One row of a batch: one example, or several packed ones.
Row = tuple[Example, ...]

#: A row with nothing to learn: it fills up the last round of several devices, and changes no gradient.
_FILLER: Row = (Example(np.zeros(1, np.int32), np.full(1, IGNORED, np.int32)),)


@dataclass(frozen=True)
class Rows(Dataset[Row]):
    """A training set.

    Attributes:
        rows: Its rows.
        notes: What was read, and how, for people.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [sum(len(example.ids) for example in row) for row in self.rows]

    def filled(self) -> Rows:
        """Return the set with a row behind its end that has nothing to learn, for :class:`EpochOrder`."""
        return Rows((*self.rows, _FILLER), self.notes)

    def share(self, size: int, place: int, places: int) -> Iterator[Sequence[Row]]:
        """Give one of several devices its batches, long rows first: every device as many, of ``size`` rows.

        Args:
            size: Rows of a batch.
            place: Number of the device.
            places: Number of devices.
        """
        order = np.argsort([-length for length in self.lengths], kind="stable").tolist()
        rows = [self.rows[i] for i in order] + [_FILLER] * (-len(self) % (size * places))
        for start in range(place * size, len(rows), places * size):
            yield rows[start : start + size]

    def sample(self, count: int = _SAMPLED) -> tuple[list[int], str]:
        """Return about ``count`` tokens of rows spread over the set, in order, and :meth:`digest`."""
        wanted = max(1, min(len(self), round(count * len(self) / max(1, sum(self.lengths)))))
        chosen = [self.rows[i * len(self) // wanted] for i in range(wanted)]
        return [int(token) for row in chosen for example in row for token in example.ids], self.digest()

    def digest(self) -> str:
        """SHA-256 of all ids and labels, in order."""
        digest = hashlib.sha256()
        for row in self.rows:
            for example in row:
                digest.update(np.int64(len(example.ids)).tobytes())
                digest.update(example.ids.tobytes() + example.labels.tobytes())
        return digest.hexdigest()


def load_data(config: TrainConfig, tokenizer: Any, vocab_size: int) -> tuple[Rows, Rows | None]:
    """Read the training data of a run and its held-out data, as :func:`load_rows` does."""
    rows = load_rows(config.data, tokenizer, config, vocab_size=vocab_size)
    if not config.eval_data:
        return rows, None
    whole = replace(config, max_examples=None)
    return rows, load_rows(config.eval_data, tokenizer, whole, vocab_size=vocab_size)


def load_rows(
    sources: Sequence[str], tokenizer: Any, config: TrainConfig, *, vocab_size: int | None = None
) -> Rows:
    """Read, tokenise, cut and pack training data.

    Args:
        sources: Files, or names of data sets.
        tokenizer: A fast tokenizer of transformers.
        config: Of the run.
        vocab_size: Tokens that the model has; None does not check.

    Raises:
        UsageError: A source or its format is not clear, or the model lacks what the data needs.
        MalformedFile: A source does not parse, no example has anything to learn, or the model has no
            embedding of a token.
        UnsupportedModel: The chat template cannot be learnt from.
    """
    examples: list[Example] = []
    notes = []
    for source in sources:
        data_format, conversations = load_conversations(source, config.data_format)
        prompt = choose_prompt(tokenizer, data_format, config.prompt)
        asked = [messages for messages in conversations if messages[0]["role"] != "assistant"]
        encoded = [encode(tokenizer, messages, prompt) for messages in asked]
        _check_ids(encoded, vocab_size, source)
        long = sum(len(example.ids) > config.max_length for example in encoded)
        kept = [cut for cut in (example.cut(config.max_length) for example in encoded) if cut.targets]
        notes.append(
            f"{source}: {data_format}, prompt {prompt}, {len(kept):,} examples"
            + (f", {long:,} cut to {config.max_length} tokens" if long else "")
            + (
                f", {len(encoded) - len(kept):,} dropped with nothing to learn"
                if len(kept) < len(encoded)
                else ""
            )
            + (
                f", {len(conversations) - len(asked):,} dropped that begin with the assistant"
                if len(asked) < len(conversations)
                else ""
            )
        )
        examples += kept
    if config.max_examples is not None and config.max_examples < len(examples):
        chosen = np.random.default_rng(config.seed).permutation(len(examples))[: config.max_examples]
        examples = [examples[i] for i in sorted(chosen)]
    if not examples:
        raise MalformedFile("no example has anything to learn", where=", ".join(sources))
    rows = pack(examples, config.max_length) if config.packing else [(example,) for example in examples]
    tokens = sum(len(example.ids) for example in examples)
    targets = sum(example.targets for example in examples)
    notes.append(f"{len(rows):,} rows, {tokens:,} tokens, {targets:,} of them learnt")
    return Rows(tuple(rows), tuple(notes))


def _check_ids(examples: Sequence[Example], vocab_size: int | None, where: str) -> None:
    """Refuse tokens for which the model has no embedding."""
    highest = max((int(example.ids.max(initial=0)) for example in examples), default=0)
    if vocab_size is not None and highest >= vocab_size:
        raise MalformedFile(
            "the tokenizer has tokens that the model does not have",
            where=where,
            expected=f"at most {vocab_size - 1}",
            got=highest,
            hint="Take the model's own tokenizer, or resize the model's embedding to it",
        )


def pack(examples: Sequence[Example], max_length: int) -> list[Row]:
    """Fill rows of at most ``max_length`` tokens with whole examples: longest first, first row that fits."""
    rows: list[list[Example]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # heaps of rows, by free tokens
    first = np.full(max_length + 1, len(examples))  # the lowest of each heap, or one that there never is
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        length = len(example.ids)
        room = length + int(first[length:].argmin())
        if with_room[room]:
            place = heappop(with_room[room])
            first[room] = with_room[room][0] if with_room[room] else len(examples)
        else:
            place, room = len(rows), max_length
            rows.append([])
        rows[place].append(example)
        heappush(with_room[room - length], place)
        first[room - length] = with_room[room - length][0]
    return [tuple(row) for row in rows]


@dataclass(frozen=True)
class Collator:
    """Makes a batch of rows.

    Attributes:
        pad_id: Token behind the end of a row; never learnt, never attended to.
        packed: Whether rows hold several examples: then positions say where each begins, and attention
            stays inside (transformers reads that from ``position_ids`` when there is no mask).
    """

    pad_id: int
    packed: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``labels`` and mask or positions, int64 (rows, longest)."""
        longest = max(sum(len(example.ids) for example in row) for row in rows)
        width = -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        labels = np.full((len(rows), width), IGNORED, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        positions = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            at = 0
            for example in row:
                here = slice(at, at := at + len(example.ids))
                ids[i, here], labels[i, here], mask[i, here] = example.ids, example.labels, 1
                labels[i, here.start] = IGNORED  # predicted from the example before, if at all
                positions[i, here] = np.arange(len(example.ids))
            positions[i, at:] = np.arange(width - at)
        batch = {"input_ids": ids, "labels": labels}
        batch |= {"position_ids": positions} if self.packed else {"attention_mask": mask}
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class EpochOrder(Sampler[int]):
    """The order of every epoch.

    Args:
        lengths: Tokens of every row.
        batch_size: Rows of a step.
        seed: Of the shuffle.
        group: Whether a batch gets rows of like length.
        multiple: Rows that several devices take at once. The order is filled up to a multiple of it with the
            number behind the last row (:meth:`Rows.filled`), where accelerate would repeat the first rows.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, *, seed: int, group: bool, multiple: int = 1
    ) -> None:
        self._lengths = np.array(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._group = group
        self._fillers = [len(lengths)] * (-len(lengths) % multiple)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths) + len(self._fillers)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(len(self._lengths))
        return iter((self._grouped(order, rng) if self._group else order).tolist() + self._fillers)

    def _grouped(self, order: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
        """Sort by length inside some batches at a time, then shuffle batches; the short rest stays last."""
        size = self._batch_size
        whole = len(order) // size * size
        chunks = np.split(order, range(size * _BATCHES_SORTED, len(order), size * _BATCHES_SORTED))
        order = np.concatenate([chunk[np.argsort(-self._lengths[chunk], kind="stable")] for chunk in chunks])
        batches = order[:whole].reshape(-1, size)
        return np.concatenate([batches[rng.permutation(len(batches))].reshape(-1), order[whole:]])

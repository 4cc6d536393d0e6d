"""What is measured of every arm: held-out loss, perplexity, divergence, multiple choice; all arms at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from _reproduce_data import BUCKET, Choices, Sequences
from _reproduce_model import Arms
from torch import Tensor
from torch.nn import functional as F

__all__ = ["divergence", "evaluate", "log_likelihood"]

#: Positions whose logits are held at a time.
_POSITIONS = 8192


@torch.inference_mode()
def log_likelihood(model: Arms, sequences: Sequences, budget: int = 1 << 18) -> np.ndarray:
    """Sum of the log-probabilities, nats, of each sequence from its start on: float64 (arms, sequences).

    Sequences that differ in their last token alone, such as the letters behind a question, are read once.

    Args:
        model: The arms.
        sequences: What to score.
        budget: Tokens of a forward pass, all arms together.
    """
    device = model.weights.embedding.device
    found = torch.zeros((model.arms, len(sequences)), dtype=torch.float64, device=device)
    sharing: dict[bytes, list[int]] = {}  # tokens that are read -> sequences that need them
    for index in range(len(sequences)):
        sharing.setdefault(sequences[index][0][:-1].tobytes(), []).append(index)
    groups = sorted(sharing.values(), key=lambda group: -int(sequences.lengths[group[0]]))
    at = 0
    while at < len(groups):
        length = -(-(int(sequences.lengths[groups[at][0]]) - 1) // BUCKET) * BUCKET
        picked = groups[at : at + max(1, budget // (length * model.arms))]
        at += len(picked)
        tokens = np.zeros((1, len(picked), length), np.int64)
        positions, targets, owner = [], [], []
        for row, group in enumerate(picked):
            for index in group:
                ids, start = sequences[index]
                tokens[0, row, : len(ids) - 1] = ids[:-1]
                positions += range(row * length + start - 1, row * length + len(ids) - 1)
                targets += ids[start:].tolist()
                owner += [index] * (len(ids) - start)
        hidden = model.hidden(torch.from_numpy(tokens).to(device))
        where, target, who = (torch.tensor(x, device=device) for x in (positions, targets, owner))
        for arm in range(model.arms):
            for w, t, o in zip(*(torch.split(x, _POSITIONS) for x in (where, target, who)), strict=True):
                logp = -F.cross_entropy(model.exact_logits(hidden[arm, w]), t, reduction="none")
                found[arm].index_add_(0, o, logp.double())
    return found.cpu().numpy()


@torch.inference_mode()
def divergence(model: Arms, reference: Arms, windows: Tensor) -> np.ndarray:
    """Mean KL(reference || arm), nats a token, of each window (n, L): (arms, n)."""
    found = np.zeros((model.arms, len(windows)))
    for i, window in enumerate(windows):
        truth = F.log_softmax(reference.exact_logits(reference.hidden(window[None, None])[0]), dim=-1)
        hidden = model.hidden(window[None, None])
        for arm in range(model.arms):
            logp = F.log_softmax(model.exact_logits(hidden[arm]), dim=-1)
            found[arm, i] = float((truth.exp() * (truth - logp)).sum(-1).mean())
    return found


def _accuracy(scores: np.ndarray, task: Choices, normalised: bool) -> np.ndarray:
    """Share of the questions whose best choice is right: scores (arms, n) to (arms,).

    Of equal choices the first is taken, as `irq-export evaluate` does. Of a task with subjects the mean of
    their shares.
    """
    if normalised:
        scores = scores / np.maximum(task.characters, 1)
    edges = np.flatnonzero(np.diff(task.question, prepend=-1))
    spans = pairwise([*edges.tolist(), scores.shape[1]])
    best = np.stack([start + scores[:, start:end].argmax(axis=1) for start, end in spans], axis=1)
    right = task.gold[best]  # (arms, questions)
    if task.subject is None:
        return right.mean(axis=1)
    subject = task.subject[edges]
    return np.mean([right[:, subject == s].mean(axis=1) for s in np.unique(subject)], axis=0)


def evaluate(
    model: Arms, data: dict[str, Sequences | Choices], held: str, *, tasks: bool
) -> list[dict[str, object]]:
    """Measure every arm.

    Args:
        model: The arms.
        data: Of _reproduce_data.load.
        held: Name of the held-out examples.
        tasks: Multiple choice too.

    Returns:
        For each arm: ``loss`` (nats a token of the held-out answers), ``perplexity`` (wikitext-2), ``books``
        (perplexity of the held-out books), ``nll`` (of each window of wikitext-2), and the tasks' accuracies
        with the rule for ``ties``.
    """
    rows: list[dict[str, object]] = [{} for _ in range(model.arms)]

    def put(name: str, values: np.ndarray) -> None:
        for row, value in zip(rows, values, strict=True):
            row[name] = np.round(value, 6).tolist()

    for name, part in (("loss", data[held]), ("wikitext", data["wikitext"]), ("books", data["books_val"])):
        assert isinstance(part, Sequences)  # noqa: S101
        nats, counts = -log_likelihood(model, part), part.lengths - part.starts
        mean = nats.sum(axis=1) / counts.sum()
        put(name, mean if name == "loss" else np.exp(mean))
        if name == "wikitext":
            put("nll", nats / counts)
    for name, task in data.items():
        if isinstance(task, Choices) and tasks:
            for row in rows:  # which of equal choices is taken; rows up to November 2026: the right one
                row["ties"] = "first"
            put(name, _accuracy(log_likelihood(model, task.sequences), task, name != "boolq"))
    return rows

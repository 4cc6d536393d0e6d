"""How far the head in bfloat16, and counting ties as right, moved what docs/paper.md reports.

Until 22 November 2026 the arms were measured with the final norm and the head in bfloat16, and a question
counted as right where its answer was one of several best. Here the same bfloat16 states are measured that way
("then"), and as `_reproduce_eval.py` does since ("now"): the unquantised base and QLoRA's, before and after
fine-tuning with one seed.

    python scripts/reproduce_paper_rounding.py measure ../smollm2/hf build/paper/smol.npz \\
        --config ../smollm2/hf/config.json > build/paper/rounding.jsonl
    python scripts/reproduce_paper_rounding.py table build/paper/rounding.jsonl
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

try:
    from irq_runtime import _native  # noqa: F401
except ImportError:  # a machine with a GPU needs no native search
    sys.modules["irq_runtime._native"] = types.ModuleType("irq_runtime._native")

from _reproduce_bases import quantise
from _reproduce_data import Choices, Sequences, load
from _reproduce_eval import divergence, log_likelihood
from _reproduce_model import KINDS, Adapters, Arms
from _reproduce_train import Recipe, arm_weights, read_base, train_arms
from torch import Tensor

__all__ = ["Verdicts", "main", "table", "verdicts"]

Row = dict[str, Any]

CODEBOOKS = ("nf4", "nf3", "nf2")
ARMS = ("unquantised", *(f"{book} plain" for book in CODEBOOKS))
TASKS = ("mmlu", "boolq", "arc_easy", "arc_challenge", "openbookqa", "hellaswag")


class _Remembering(Arms):
    """Arms that compute the states of the same tokens once, and their logits as they are asked for."""

    #: Whether `exact_logits` are what they were.
    then = False

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._known: dict[bytes, Tensor] = {}

    def hidden(self, tokens: Tensor) -> Tensor:
        key = tokens.cpu().numpy().tobytes()
        if key not in self._known:
            self._known[key] = super().hidden(tokens)
        return self._known[key]

    def exact_logits(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden).float() if self.then else super().exact_logits(hidden)

    def forget(self) -> None:
        """Drop all states."""
        self._known.clear()


@dataclass(frozen=True)
class Verdicts:
    """What two rules say of scores (arms, sequences): bool (arms, questions).

    Attributes:
        first: The first of the best choices is right.
        some: One of the best choices is right.
        tied: Several choices are best.
    """

    first: np.ndarray
    some: np.ndarray
    tied: np.ndarray


def verdicts(scores: np.ndarray, task: Choices) -> Verdicts:
    """Judge every question."""
    edges = np.flatnonzero(np.diff(task.question, prepend=-1)).tolist()
    first, some, tied = [], [], []
    for start, end in pairwise([*edges, scores.shape[1]]):
        part, gold = scores[:, start:end], task.gold[start:end]
        top = part == part.max(axis=1, keepdims=True)
        first.append(gold[top.argmax(axis=1)])
        some.append((top & gold).any(axis=1))
        tied.append(top.sum(axis=1) > 1)
    return Verdicts(*(np.stack(found, axis=1) for found in (first, some, tied)))


def _both(model: _Remembering, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods (arms, n) of then and of now."""
    found = []
    for model.then in (True, False):
        found.append(log_likelihood(model, sequences))
    model.forget()
    return found[0], found[1]


def _percent(values: np.ndarray) -> list[float]:
    """Mean and its standard error."""
    return [
        round(100 * float(values.mean()), 3),
        round(100 * float(values.std() / np.sqrt(len(values))), 3),
    ]


def _texts(model: _Remembering, data: dict[str, Sequences | Choices]) -> Iterator[Row]:
    for name in ("wikitext", "instruct_held"):
        text = data[name]
        counts = (text.lengths - text.starts).sum()  # type: ignore[union-attr]
        then, now = (-scores.sum(axis=1) / counts for scores in _both(model, text))  # type: ignore[arg-type]
        for arm, a, b in zip(ARMS, then, now, strict=True):
            yield {"nats": name, "arm": arm, "then": round(float(a), 6), "now": round(float(b), 6)}


def _divergences(model: _Remembering, reference: _Remembering, windows: Tensor) -> Iterator[Row]:
    found = []
    for model.then in (True, False):
        reference.then = model.then
        found.append(divergence(model, reference, windows).mean(axis=1))
    model.forget()
    for arm, a, b in zip(ARMS, *found, strict=True):
        yield {"nats": "KL", "arm": arm, "then": round(float(a), 6), "now": round(float(b), 6)}


def _tasks(model: _Remembering, data: dict[str, Sequences | Choices]) -> Iterator[Row]:
    for name, task in data.items():
        if not isinstance(task, Choices):
            continue
        scale = 1 if name == "boolq" else np.maximum(task.characters, 1)
        then, now = (verdicts(scores / scale, task) for scores in _both(model, task.sequences))
        for i, arm in enumerate(ARMS):
            moved = then.some[i].astype(int) - now.first[i]
            ties = then.some[i].astype(int) - then.first[i]
            row = {"task": name, "arm": arm, "questions": len(moved), "then": _percent(then.some[i])}
            row |= {"now": _percent(now.first[i]), "then - now": _percent(moved)}
            row |= {"tied then": _percent(then.tied[i]), "tied now": _percent(now.tied[i])}
            yield row | {"of it ties": _percent(ties)}


def table(rows: list[Row]) -> str:
    """The table of docs/paper.md: points by which each column was too high, 95 % intervals over questions."""
    titles = [
        "",
        "base or arm",
        *(f"{task}: then − now" for task in TASKS),
        "mmlu: tied then, %",
        "boolq: tied then, %",
    ]
    lines = [titles, ["---"] * len(titles)]
    of = {(row["stage"], row["arm"], row["task"]): row for row in rows if "task" in row}
    for stage, arm in dict.fromkeys((stage, arm) for stage, arm, _ in of):
        moved = [of[stage, arm, task]["then - now"] for task in TASKS]
        cells = [f"{mean:+.1f} ± {1.96 * error:.1f}" for mean, error in moved]
        cells += [f"{of[stage, arm, task]['tied then'][0]:.1f}" for task in ("mmlu", "boolq")]
        lines.append([stage, arm, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@click.group(help=__doc__)
def main() -> None:
    torch.set_float32_matmul_precision("highest")


@main.command("table")
@click.argument("path", metavar="ROWS", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def table_command(path: Path) -> None:
    """Print the table of docs/paper.md."""
    click.echo(table([json.loads(line) for line in path.read_text("utf-8").splitlines()]))


@main.command("measure")
@click.argument("base", type=click.Path(path_type=Path, exists=True))
@click.argument("data_path", metavar="DATA", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--config", type=click.Path(path_type=Path, exists=True), required=True, help="Of BASE.")
@click.option("--questions", type=int, help="The first of each task; all by default.")
@click.option("--windows", default=64, show_default=True, help="Of wikitext-2.")
@click.option("--steps", default=500, show_default=True, help="Of fine-tuning; 0: none.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def measure_command(
    base: Path, data_path: Path, config: Path, questions: int | None, windows: int, steps: int, device: str
) -> None:
    """Print what both rules say, as JSON lines."""
    shape, found = read_base(base, config, device)
    full = {kind: found[kind] for kind in KINDS}
    plain = [quantise(full, book, "plain", {}, torch.bfloat16).linears for book in CODEBOOKS]
    weights = arm_weights(found, [full, *plain], torch.bfloat16)
    reference = _Remembering(shape, arm_weights(found, [full], torch.bfloat16))
    data = {
        name: part.first(questions) if isinstance(part, Choices) and questions else part
        for name, part in load(data_path).items()
    }
    data["wikitext"] = text = data["wikitext"].first(windows)
    ids = torch.from_numpy(text.ids.reshape(windows, -1).astype(np.int64)).to(device)  # type: ignore[union-attr]

    def measure(model: _Remembering, stage: str) -> None:
        for rows in (_texts(model, data), _divergences(model, reference, ids), _tasks(model, data)):
            for row in rows:
                click.echo(json.dumps({"stage": stage} | row))

    measure(_Remembering(shape, weights), "before")
    if steps:
        off, seeds, recipe = [False] * len(ARMS), [0] * len(ARMS), Recipe(steps)
        adapters = Adapters(shape, seeds, off, off, rank=recipe.rank, scaling=recipe.scaling, device=device)
        train_arms(Arms(shape, weights, adapters), data["instruct_train"], seeds, recipe, float("inf"))  # type: ignore[arg-type]
        measure(_Remembering(shape, weights, adapters), "after")


if __name__ == "__main__":
    main()

"""A tiny model in floating point with a tokenizer and data, and the command that trains it in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import save_tiny_model
from tiny_tokenizers import save_tiny_tokenizer

__all__ = ["held_out_curve", "loss_curve", "save_tiny_training", "train_arguments"]

_WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]
_RECIPE = {
    "--rank": "4",
    "--lr": "1e-2",
    "--batch-size": "4",
    "--log-every": "1",
    "--max-length": "96",
    "--device": "cpu",
    "--prompt": "plain",
}


def save_tiny_training(path: Path) -> None:
    """Write ``model`` and ``data.json``, 19 rows, into a directory."""
    save_tiny_model(path / "model", vocab_size=384, hidden_size=64, intermediate_size=64, head_dim=16)
    save_tiny_tokenizer(path / "model")
    settings = path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "</s>"}))
    rows = [
        {
            "instruction": f"Say {_WORDS[i % 8]}",
            "input": "",
            "output": " ".join([_WORDS[i % 8]] * (i % 5 + 1)),
        }
        for i in range(19)
    ]
    (path / "data.json").write_text(json.dumps(rows))


def train_arguments(source: Path, output: Path, *more: str, model: Path | None = None) -> list[str]:
    """Return the command line of a run on what :func:`save_tiny_training` wrote, or on another model."""
    recipe = [word for flag in _RECIPE.items() for word in flag]
    where = ["--data", str(source / "data.json"), "-o", str(output)]
    return ["train", str(model or source / "model"), *where, *recipe, *more]


def loss_curve(output: Path) -> list[tuple[int, float, float]]:
    """Return step, loss and gradient norm of every line of a run's metrics."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in _metrics(output) if "loss" in line]


def held_out_curve(output: Path) -> list[tuple[int, float]]:
    """Return step and loss of every evaluation of a run."""
    return [(line["step"], line["eval_loss"]) for line in _metrics(output) if "eval_loss" in line]


def _metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train" / "metrics.jsonl").read_text().splitlines()]

"""Draw the loss curve of a run: ``python scripts/plot_training.py RUN/train/metrics.jsonl curve.png``.

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_WINDOW = 20  # logs in the running mean


def main(metrics: Path, target: Path) -> None:
    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*train, strict=True), alpha=0.3, linewidth=0.8, label="training, each log")
    means = [
        (step, sum(loss for _, loss in train[max(0, i - _WINDOW + 1) : i + 1]) / min(i + 1, _WINDOW))
        for i, (step, _) in enumerate(train)
    ]
    axes.plot(*zip(*means, strict=True), color="tab:blue", label=f"training, mean of {_WINDOW}")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", markersize=3, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per learnt token")
    axes.legend()
    figure.savefig(target, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

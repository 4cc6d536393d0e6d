"""Draw the loss curve of a run: ``python scripts/plot_training.py RUN/train/metrics.jsonl curve.png``.

Needs matplotlib (``pip install matplotlib``), which no extra of this package brings.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

_WINDOW = 20  # logs in the running mean


def plot(metrics: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run (needs matplotlib).")
    parser.add_argument("metrics", type=Path, help="RUN/train/metrics.jsonl")
    parser.add_argument("target", type=Path, help="the picture")
    args = parser.parse_args(arguments)
    plot(args.metrics, args.target)


if __name__ == "__main__":
    main()

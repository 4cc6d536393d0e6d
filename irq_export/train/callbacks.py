"""What happens beside the steps: metrics, progress, resumable states, a stop when the loss is not finite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from irq_export.train.dataset import EpochOrder
from irq_export.train.run_dir import RunDir
from irq_formats.errors import IrqError

__all__ = ["MetricsCallback", "OrderCallback", "Report", "StateCallback"]

#: Called with (steps done, steps in all, text).
Report = Callable[[int, int, str], None]

_LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


class OrderCallback(TrainerCallback):
    """Tells the sampler which epoch begins, also in the middle of one that is resumed."""

    def __init__(self, order: EpochOrder) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch."""
        self._order.set_epoch(int(state.epoch or 0))


class MetricsCallback(TrainerCallback):
    """Appends every log to a JSON Lines file and shows it.

    Args:
        path: The file.
        report: Shows progress; None is silent.
    """

    def __init__(self, path: Path, report: Report | None) -> None:
        self._path = path
        self._report = report
        self._started = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._report and state.is_world_process_zero:
            self._report(state.global_step, state.max_steps, "")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a line.

        Raises:
            IrqError: The loss is not finite.
        """
        found = {key: logs[key] for key in _LOGGED if logs and key in logs}
        if not found or not state.is_world_process_zero:
            return
        if not all(math.isfinite(value) for value in found.values()):
            got = ", ".join(f"{key} {value}" for key, value in found.items())
            raise _diverged(f"step {state.global_step}", got)
        seconds = round(time.monotonic() - self._started, 3)
        entry = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 6),
            **found,
            "seconds": seconds,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._report:
            text = " ".join(f"{key} {value:.4g}" for key, value in found.items())
            self._report(state.global_step, state.max_steps, text)


def _diverged(where: str, got: str) -> IrqError:
    return IrqError(
        "the training diverged",
        where=where,
        got=got,
        hint="Start again with a lower --lr and another -o; the states that are kept are from before",
    )


class StateCallback(TrainerCallback):
    """Makes a saved state valid once every process has written its part; logs and saves after the last step.

    A state whose adapter is not finite is removed, before it takes the place of an older one.

    Args:
        run: Where.
        keep: How many states stay.
    """

    def __init__(self, run: RunDir, keep: int) -> None:
        self._run = run
        self._keep = keep

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a line of metrics and a state after the last step."""
        if state.global_step >= state.max_steps:
            control.should_log = control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the state.

        Raises:
            IrqError: Its adapter is not finite.
        """
        from accelerate import PartialState  # type: ignore[import-untyped]

        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        if broken := self._run.not_finite(state.global_step):
            raise _diverged(f"step {state.global_step}", f"{broken}, which is not finite")
        self._run.seal(state.global_step, self._keep)

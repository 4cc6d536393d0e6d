"""``irq-export train``: fine-tune a model with IR-QLoRA."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from irq_export.cli.common import console, emit, json_option, progress, verb
from irq_export.train.config import Setting, TrainConfig, make_config, settings

if TYPE_CHECKING:
    from irq_export.train.run_dir import RunDir

__all__ = ["command"]


def _option(setting: Setting) -> Callable[[Any], Any]:
    """Make the flag of a setting; unset means that a file or the default decides."""
    names = ["-o", setting.flag] if setting.name == "output" else [setting.flag]
    if setting.kind is bool:
        shown = "" if setting.default is None else f"  [default: {'on' if setting.default else 'off'}]"
        text = setting.text + shown
        return click.option(f"{setting.flag}/--no-{setting.flag.removeprefix('--')}", default=None, help=text)
    shown = f"  [default: {setting.default}]" if setting.default not in (None, "", ()) else ""
    text = setting.text + ("  (repeatable)" if setting.many else "") + shown
    kind = click.Choice(setting.choices) if setting.choices else setting.kind
    return click.option(*names, setting.name, type=kind, multiple=setting.many, help=text)


def _all_options(command: Any) -> Any:
    for setting in reversed(settings()):
        if setting.name != "model":
            command = _option(setting)(command)
    return command


@click.command(name="train")
@click.argument("model", required=False)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML or YAML with the same names as the flags (lr = 1e-4); flags win.",
)
@_all_options
@click.option("--resume", is_flag=True, help="Continue the run in the output directory.")
@click.option("--dry-run", is_flag=True, help="Show data, memory and disk; load and write nothing.")
@json_option
@verb
def command(config_file: Path | None, resume: bool, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Fine-tune a model with IR-QLoRA; the defaults are the paper's, but for the search (docs/paper.md).

    MODEL is a Hugging Face directory in floating point, which is quantised first, or an IR-QLoRA checkpoint.
    The output directory is a checkpoint with its adapter: to-gguf and verify take it as it is.
    """
    from irq_export.train.run_dir import RunDir

    if resume and flags["output"] and config_file is None:
        begun = RunDir(Path(flags["output"])).record_file
        if begun.is_file():
            said = {name: value for name, value in flags.items() if value is not None and value != ()}
            flags = {**_recorded(begun), **said}
    config = make_config(flags, config_file)
    if dry_run:
        _show_plan(config, as_json=as_json)
        return
    from irq_export.train.run import train

    try:
        with _steps() as report:
            result = train(config, resume=resume, report=report, say=_say)
    except KeyboardInterrupt:
        run = RunDir(Path(config.output))
        if not run.record_file.is_file():
            raise
        _stop(run)
    if not _is_first():
        return
    lines = [
        f"{result.steps:,} steps in {result.seconds:.1f} s, loss {result.loss:.4f}"
        + (f", held-out {result.eval_loss:.4f}" if result.eval_loss is not None else "")
        + (f", largest beta {result.betas:.3g}" if config.iec else ""),
        f"base hash {result.base_hash}",
        f"wrote {result.output}: checkpoint, adapter, train/metrics.jsonl",
    ]
    emit({"train": result.to_dict()}, "\n".join(lines), as_json=as_json)


def _stop(run: RunDir) -> NoReturn:
    """End after an interruption of a run that is begun: what there is of it stays."""
    if os.environ.get("RANK", "0") == "0":  # accelerate may not have been asked yet
        states = run.states()
        step = states[-1].name.removeprefix("checkpoint-") if states else 0
        _say(f"interrupted; irq-export train -o {run.path} --resume goes on after step {step}")
    sys.exit(130)


def _recorded(path: Path) -> dict[str, Any]:
    """Read the settings of a run that is resumed by its directory alone."""
    from irq_formats.errors import MalformedFile
    from irq_formats.strict_json import parse_object

    values = parse_object(path.read_bytes(), where=path).get("settings")
    known = {setting.name: setting for setting in settings()}
    if not isinstance(values, dict) or values.keys() - known.keys():
        raise MalformedFile("not the record of a run", where=path)
    return {name: tuple(value) if known[name].many else value for name, value in values.items()}


def _show_plan(config: TrainConfig, *, as_json: bool) -> None:
    from irq_export.train.base import open_base
    from irq_export.train.dataset import load_data
    from irq_export.train.memory import estimate_memory
    from irq_export.train.run import bytes_per_value
    from irq_export.trained_tokenizer import load_tokenizer

    estimate = estimate_memory(config, bytes_per_value=bytes_per_value(config))
    vocab_size = open_base(config).model.vocab_size
    rows, held_out = load_data(config, load_tokenizer(config.model), vocab_size)
    steps = config.total_steps(len(rows))
    lines = [
        *rows.notes,
        *(held_out.notes if held_out else ()),
        f"{steps:,} steps of {config.batch_size}",
        f"{estimate.trainable:,} parameters to train",
        f"base {estimate.base:,} bytes, adapter with gradients and optimizer {estimate.adapter:,} bytes",
        f"activations at most about {estimate.activations:,} bytes",
        f"before that {estimate.measuring:,} bytes to measure importance",
        f"{estimate.total / 2**30:.2f} GiB on a device",
        f"disk {estimate.disk:,} bytes and {config.keep} states of about {12 * estimate.trainable:,}",
    ]
    plan = {
        "settings": config.to_dict(),
        "data": list(rows.notes),
        "eval_data": list(held_out.notes) if held_out else [],
        "steps": steps,
        "memory": estimate.to_dict(),
    }
    emit({"plan": plan}, "\n".join(lines), as_json=as_json)


def _is_first() -> bool:
    """Whether this process speaks for all."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    return bool(PartialState().is_main_process)


def _say(line: str) -> None:
    console().print(line, markup=False)


@contextmanager
def _steps() -> Iterator[Callable[[int, int, str], None]]:
    """Show steps on stderr: a bar on a terminal, else a line for every log."""
    with progress("train") as bar:
        shown = console().is_terminal

        def update(done: int, total: int, text: str) -> None:
            if shown:
                bar(done, total, text or f"{done}/{total}")
            elif text and done:
                _say(f"step {done}/{total} {text}")

        yield update

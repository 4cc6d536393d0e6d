"""``irq-export evaluate``: benchmarks on one model, or on two side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from irq_export.evaluate.harness import check_window, draw, measure_task, measure_windows
from irq_export.evaluate.measures import Difference, Measure, difference
from irq_export.evaluate.models import (
    ONNX_RUNTIMES,
    RUNTIMES,
    EvaluatedModel,
    ModelSource,
    find_model,
    open_model,
)
from irq_export.evaluate.tasks import Task, TextTask, load_task
from irq_export.hf_directory import torch_device
from irq_export.perplexity import cut_windows
from irq_formats.errors import UsageError

__all__ = ["Evaluation", "ModelRun", "Row", "evaluate"]

#: Version of the JSON report (formats/schema/evaluation.schema.json).
SCHEMA = "irq.evaluation/1"

Progress = Callable[[int, int, str], None]
#: Which models take which adapter, by what runs them.
_ADAPTERS: dict[str, tuple[str, ...]] = {
    "adapter": (),
    "adapter_gguf": RUNTIMES,
    "adapter_onnx": ONNX_RUNTIMES,
}
_DEFAULTS = {"mode": "exact", "device": "cpu", "dtype": "float32"}


@dataclass(frozen=True)
class ModelRun:
    """One model of an evaluation.

    Attributes:
        path: As given.
        runtime: What ran it.
        seconds: Wall time of each task.
    """

    path: str
    runtime: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One number of one task, for every model.

    Attributes:
        task: Its name.
        metric: ``acc``, ``acc_norm``, ``acc_subjects`` or ``perplexity``.
        samples: Questions, or windows of text.
        values: One a model.
        stderrs: Standard errors, one a model; None where there is none.
        change: Second model minus first, with its paired standard error; None for one model.
    """

    task: str
    metric: str
    samples: int
    values: tuple[float, ...]
    stderrs: tuple[float | None, ...]
    change: Difference | None


@dataclass(frozen=True)
class Evaluation:
    """The result.

    Attributes:
        models: In the order given.
        rows: In the order of the tasks.
        notes: What makes a task's numbers differ from the usual ones.
        limit: Questions or windows a task, or None.
        seed: Of the drawing, where there is a limit.
    """

    models: tuple[ModelRun, ...]
    rows: tuple[Row, ...]
    notes: dict[str, str]
    limit: int | None
    seed: int

    def to_dict(self) -> dict[str, object]:
        """Return the report, for JSON."""
        return {"evaluation": SCHEMA, **asdict(self)}

    def to_text(self) -> str:
        """Return a table for people."""
        lines = [f"{'AB'[i]}: {run.path} ({run.runtime})" for i, run in enumerate(self.models)]
        for row in self.rows:
            cells = [_cell(row.metric, v, e) for v, e in zip(row.values, row.stderrs, strict=True)]
            if row.change is not None:
                cells.append(_cell(row.metric, row.change.value, row.change.stderr, sign=True))
            lines.append(f"{row.task:<14} {row.metric:<12} {row.samples:>6}  " + "   ".join(cells))
        lines += [f"{task}: {note}" for task, note in self.notes.items() if note]
        return "\n".join(lines)


def evaluate(
    models: Sequence[str | Path],
    *,
    tasks: Sequence[str],
    data: str | Path,
    adapter: str | Path | None = None,
    adapter_gguf: str | Path | None = None,
    adapter_onnx: str | Path | None = None,
    runtime: str | None = None,
    mode: str = "exact",
    threads: int = 2,
    device: str = "cpu",
    dtype: str = "float32",
    batch_tokens: int = 4096,
    limit: int | None = None,
    seed: int = 0,
    window: int = 512,
    progress: Progress | None = None,
) -> Evaluation:
    """Run benchmarks on one model, or on two and compare them question by question.

    Args:
        models: One or two of what :func:`~irq_export.evaluate.models.open_model` opens.
        tasks: Names of :data:`~irq_export.evaluate.tasks.TASKS`.
        data: Folder of the benchmarks' files.
        adapter: PEFT directory, for models that are directories of weights.
        adapter_gguf: Separate adapter file, for models that are GGUF files.
        adapter_onnx: Adapter file, for models that are ONNX folders; default: the folder's only one.
        runtime: For GGUF files ``native`` (default), ``reference`` or ``llama.cpp``; for ONNX folders
            ``onnxruntime+irq`` (default) or ``onnxruntime``. Of two models it holds for those it can run.
        mode: Of the native engine.
        threads: Of native, llama.cpp and onnxruntime.
        device: Of torch.
        dtype: Of torch.
        batch_tokens: Of torch.
        limit: Draw so many questions (windows: take the first) of each task.
        seed: Of the drawing.
        window: Tokens of a window of text.
        progress: Called with (requests done, requests in all, what).

    Raises:
        UsageError: No or more than two models, an unknown task, two models with different tokenizers, an
            option that no model heeds, or a window longer than what a model reads.
        MalformedFile: A file breaks its format.
        WrongBase: The adapter belongs to another base.
    """
    if not 1 <= len(models) <= 2 or not tasks:
        raise UsageError("nothing to evaluate", expected="one or two models, at least one task")
    if (limit is not None and limit < 1) or window < 4 or seed < 0:
        raise UsageError(
            "out of range", expected="limit >= 1, window >= 4, seed >= 0", got=(limit, window, seed)
        )
    sources = [find_model(path) for path in models]
    adapters = {"adapter": adapter, "adapter_gguf": adapter_gguf, "adapter_onnx": adapter_onnx}
    kinds = [source.runtimes for source in sources]
    _check_options(kinds, runtime, {**adapters, "mode": mode, "device": device, "dtype": dtype})
    loaded = [load_task(name, data) for name in dict.fromkeys(tasks)]
    loaded = [draw(task, limit, seed) if isinstance(task, Task) else task for task in loaded]
    _check_models(sources, loaded, window, runtime)
    runs: list[ModelRun] = []
    measures: list[list[Measure]] = []
    for i, source in enumerate(sources):
        with open_model(
            source,
            **{name: path for name, path in adapters.items() if kinds[i] == _ADAPTERS[name]},
            runtime=runtime if runtime in kinds[i] else None,
            mode=mode,
            threads=threads,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
        ) as model:
            label = "" if len(models) == 1 else f"{'AB'[i]}: "
            found, seconds = _measure_all(model, loaded, limit, window, _labelled(progress, label))
        measures.append([measure for _, measure in found])
        names = [name for name, _ in found]
        runs.append(ModelRun(str(source.path), model.scorer.name, seconds))
    rows = tuple(_row(name, pair) for name, pair in zip(names, zip(*measures, strict=True), strict=True))
    return Evaluation(tuple(runs), rows, {task.name: task.note for task in loaded}, limit, seed)


def _measure_all(
    model: EvaluatedModel,
    tasks: Sequence[Task | TextTask],
    limit: int | None,
    window: int,
    progress: Progress | None,
) -> tuple[list[tuple[str, Measure]], dict[str, float]]:
    """Return (task name, measure) in order, and the seconds of each task."""
    found: list[tuple[str, Measure]] = []
    seconds: dict[str, float] = {}
    for task in tasks:
        started = time.perf_counter()
        if isinstance(task, TextTask):
            windows = cut_windows(model.tokenizer, task.text, window)[:limit]
            measures = measure_windows(windows, model.scorer, task.name, progress)
        else:
            measures = measure_task(
                task, lambda text: model.tokenizer.encode(text, add_special=False), model.scorer, progress
            )
        found += [(task.name, measure) for measure in measures]
        seconds[task.name] = round(time.perf_counter() - started, 3)
    return found, seconds


def _row(task: str, measures: tuple[Measure, ...]) -> Row:
    change = difference(measures[0], measures[1]) if len(measures) == 2 else None
    return Row(
        task,
        measures[0].name,
        measures[0].samples.size,
        tuple(measure.value for measure in measures),
        tuple(measure.stderr for measure in measures),
        change,
    )


def _check_options(
    kinds: Sequence[tuple[str, ...]], runtime: str | None, options: Mapping[str, str | Path | None]
) -> None:
    """Refuse what no model would heed, and adapters and devices that are not there."""
    if runtime is not None and not any(runtime in known for known in kinds):
        known = " | ".join(dict.fromkeys(name for names in kinds for name in names)) or "none: torch runs it"
        raise UsageError("no model that this runtime runs", expected=known, got=runtime)
    heeded = {name: kind in kinds for name, kind in _ADAPTERS.items()}
    heeded["mode"] = RUNTIMES in kinds and runtime not in RUNTIMES[1:]
    heeded["device"] = heeded["dtype"] = () in kinds
    for name, given in options.items():
        if given == _DEFAULTS.get(name):
            continue
        if not heeded[name]:
            raise UsageError(f"no model here takes --{name.replace('_', '-')}", got=given)
        if name in _ADAPTERS and not Path(str(given)).exists():
            raise UsageError("no such adapter", where=given)
        if name == "device":
            torch_device(str(given))


def _check_models(
    sources: Sequence[ModelSource], tasks: Sequence[Task | TextTask], window: int, runtime: str | None
) -> None:
    """Refuse what would fail after the first model is done: windows too long, tokenizers that differ."""
    if any(isinstance(task, TextTask) for task in tasks):
        spare = 1 if runtime == "llama.cpp" else 0  # its server keeps room for a token of its own
        check_window(window, min(source.positions for source in sources) - spare)
    texts = [
        task.text[:10_000] if isinstance(task, TextTask) else task.questions[0].contexts[0] for task in tasks
    ]
    fingerprints = [[source.tokenizer.encode(text) for text in texts] for source in sources]
    if fingerprints[0] != fingerprints[-1]:
        raise UsageError("the two models have different tokenizers", where=sources[-1].path)


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    return None if progress is None else lambda done, total, what: progress(done, total, label + what)


def _cell(metric: str, value: float, stderr: float | None, *, sign: bool = False) -> str:
    digits = 4 if metric.startswith("acc") else 3
    error = "" if stderr is None else f" ± {stderr:.{digits}f}"
    return f"{value:{'+' if sign else ''}.{digits}f}{error}"

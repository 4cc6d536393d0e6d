"""``irq-export evaluate``: benchmarks on one model, or on two side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from irq_export.evaluate.harness import draw, measure_task, measure_windows
from irq_export.evaluate.measures import Difference, Measure, difference
from irq_export.evaluate.models import RUNTIMES, EvaluatedModel, open_model, runtimes_of
from irq_export.evaluate.tasks import Task, TextTask, load_task
from irq_export.perplexity import cut_windows
from irq_formats.errors import UsageError

__all__ = ["Evaluation", "ModelRun", "Row", "evaluate"]

#: Version of the JSON report (formats/schema/evaluation.schema.json).
SCHEMA = "irq.evaluation/1"

Progress = Callable[[int, int, str], None]


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
        UsageError: No or more than two models, an unknown task, or two models with different tokenizers.
        MalformedFile: A file breaks its format.
        WrongBase: The adapter belongs to another base.
    """
    if not 1 <= len(models) <= 2 or not tasks:
        raise UsageError("nothing to evaluate", expected="one or two models, at least one task")
    if (limit is not None and limit < 1) or window < 4:
        raise UsageError("out of range", expected="limit >= 1, window >= 4", got=(limit, window))
    kinds = [runtimes_of(path) for path in models]
    if runtime is not None and not any(runtime in known for known in kinds):
        known = " | ".join(dict.fromkeys(name for names in kinds for name in names)) or "none: torch runs it"
        raise UsageError("no model that this runtime runs", expected=known, got=runtime)
    loaded = [load_task(name, data) for name in dict.fromkeys(tasks)]
    loaded = [draw(task, limit, seed) if isinstance(task, Task) else task for task in loaded]
    runs: list[ModelRun] = []
    measures: list[list[Measure]] = []
    fingerprint: list[int] | None = None
    for i, path in enumerate(models):
        with open_model(
            path,
            adapter=None if kinds[i] else adapter,
            adapter_gguf=adapter_gguf if kinds[i] == RUNTIMES else None,
            adapter_onnx=adapter_onnx,
            runtime=runtime if runtime in kinds[i] else None,
            mode=mode,
            threads=threads,
            device=device,
            dtype=dtype,
            batch_tokens=batch_tokens,
        ) as model:
            tokens = _fingerprint(model, loaded)
            if fingerprint is not None and tokens != fingerprint:
                raise UsageError("the two models have different tokenizers", where=path)
            fingerprint = tokens
            label = "" if len(models) == 1 else f"{'AB'[i]}: "
            found, seconds = _measure_all(model, loaded, limit, window, _labelled(progress, label))
        measures.append([measure for _, measure in found])
        names = [name for name, _ in found]
        runs.append(ModelRun(str(path), model.scorer.name, seconds))
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


def _fingerprint(model: EvaluatedModel, tasks: Sequence[Task | TextTask]) -> list[int]:
    """Tokens of the beginning of every task: two models that are compared must agree on them."""
    tokens: list[int] = []
    for task in tasks:
        text = task.text[:10_000] if isinstance(task, TextTask) else task.questions[0].contexts[0]
        tokens += model.tokenizer.encode(text)
    return tokens


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    return None if progress is None else lambda done, total, what: progress(done, total, label + what)


def _cell(metric: str, value: float, stderr: float | None, *, sign: bool = False) -> str:
    digits = 4 if metric.startswith("acc") else 3
    error = "" if stderr is None else f" ± {stderr:.{digits}f}"
    return f"{value:{'+' if sign else ''}.{digits}f}{error}"

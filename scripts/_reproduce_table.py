"""The tables of docs/paper.md from the rows of scripts/reproduce_paper.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = ["compact", "tables"]

Row = dict[str, Any]

#: MMLU of LLaMA-7B on Alpaca in the paper (its tables 4 and 9): codebook, arm.
PAPER: dict[tuple[str, str], float] = {
    ("nf4", "QLoRA"): 38.4,
    ("nf4", "+ ICQ"): 40.3,
    ("nf4", "+ IEC(U1)"): 39.4,
    ("nf4", "+ IEC(U2)"): 39.7,
    ("nf4", "+ IEC"): 40.2,
    ("nf4", "IR-QLoRA"): 40.8,
    ("nf3", "QLoRA"): 37.8,
    ("nf3", "IR-QLoRA"): 38.4,
    ("nf2", "QLoRA"): 26.2,
    ("nf2", "IR-QLoRA"): 27.8,
}
#: What each part of the method is worth: arms that differ in it alone.
QUESTIONS: tuple[tuple[str, str, str], ...] = (
    ("ICQ", "+ ICQ", "QLoRA"),
    ("IEC", "IR-QLoRA", "+ ICQ"),
    ("ICQ and IEC", "IR-QLoRA", "QLoRA"),
    ("refit", "QLoRA + refit", "QLoRA"),
    ("ICQ and IEC, all refitted", "IR-QLoRA + refit", "QLoRA + refit"),
    ("calibrated refit for refit", "QLoRA, calibrated refit", "QLoRA + refit"),
    ("calibrated refit", "QLoRA, calibrated refit", "QLoRA"),
    ("IEC, calibrated", "IEC, calibrated refit", "QLoRA, calibrated refit"),
    ("16 bits", "LoRA, 16 bits", "QLoRA"),
)
TASKS = ("arc_easy", "arc_challenge", "openbookqa", "boolq", "hellaswag")
#: Tasks whose choices are one token, often of equal likelihood where logits are bfloat16.
_ONE_TOKEN = ("boolq", "mmlu")
#: Groups of consecutive windows of wikitext-2, over which intervals are taken.
GROUPS = 64
#: 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def compact(row: Row) -> Row:
    """A row as it is kept in the repository: windows in groups, no training curve, five digits."""
    kept = {key: value for key, value in row.items() if key not in ("curve", "recipe", "setting")}
    if "nll" in kept:
        kept["nll"] = [float(np.mean(part)) for part in np.array_split(row["nll"], GROUPS)]
    return {key: _short(value) for key, value in kept.items()}


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _interval(values: np.ndarray, digits: int) -> str:
    """Mean of paired differences and the half width of its 95 % interval (Student's t)."""
    if len(values) == 0:
        return ""
    mean = f"{values.mean():+.{digits}f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    half = _T[min(len(values) - 2, len(_T) - 1)] * values.std(ddof=1) / math.sqrt(len(values))
    return f"{mean} ± {half:.{digits}f}"


def _over_windows(differences: np.ndarray, digits: int) -> str:
    """Mean of (groups,) paired differences and its 95 % interval over groups of windows."""
    half = 1.96 * differences.std(ddof=1) / math.sqrt(len(differences))
    return f"{differences.mean():+.{digits}f} ± {half:.{digits}f}"


def _markdown(titles: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _perplexity(value: float) -> str:
    return "> 10^5" if value > 1e5 else f"{value:.2f}"


def _select(rows: list[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _before(rows: list[Row], model: str) -> list[str]:
    titles = [
        "codes",
        "bits",
        "H",
        "rel. MSE",
        "KL",
        "perplexity",
        "ln(perplexity / plain)",
        "books",
        "answers",
    ]
    titles += ["search, s"]
    lines = []
    full = _select(rows, model=model, stage="before", codebook="none")
    for row in full:
        cells = ["unquantised", "16", "", "", "", _perplexity(row["wikitext"]), "", f"{row['books']:.2f}"]
        lines.append([*cells, f"{row['loss']:.3f}", ""])
    for codebook in ("nf4", "nf3", "nf2", "int4"):
        of_book = _select(rows, model=model, stage="before", codebook=codebook)
        plain = [row for row in of_book if row["arm"] == "plain"]
        for row in of_book:
            difference = ""
            if plain and row["arm"] != "plain":
                difference = _over_windows(np.array(row["nll"]) - np.array(plain[0]["nll"]), 3)
            kl = np.array(row["kl"])
            lines.append(
                [
                    f"{codebook} {row['arm']}",
                    f"{row['bits_per_weight']:.3f}",
                    f"{row['entropy']:.3f}",
                    f"{row['rel_mse']:.5f}",
                    f"{kl.mean():.3f} ± {1.96 * kl.std(ddof=1) / math.sqrt(len(kl)):.3f}",
                    _perplexity(row["wikitext"]),
                    difference,
                    _perplexity(row["books"]),
                    f"{row['loss']:.3f}",
                    f"{row['seconds']:.1f}",
                ]
            )
    return _markdown(titles, lines)


def _after(rows: list[Row], model: str, codebook: str) -> list[str]:
    """One table: every arm, and its differences from QLoRA seed by seed."""
    chosen = _select(rows, model=model, stage="after", codebook=codebook)
    sixteen = _select(rows, model=model, stage="after", codebook="none")
    base = {row["seed"]: row for row in chosen if row["arm"] == "QLoRA"}
    titles = [
        "arm",
        "seeds",
        "held-out loss",
        "loss − QLoRA",
        "perplexity",
        "ln(perplexity / QLoRA)",
        "windows",
        "books",
        "ln(books / QLoRA)",
        "paper, MMLU",
    ]
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in [*sixteen, *chosen]):
        of_arm = [row for row in [*sixteen, *chosen] if row["arm"] == arm]
        pairs = [(row, base[row["seed"]]) for row in of_arm if row["seed"] in base and arm != "QLoRA"]

        def paired(value: Callable[[Row], float], pairs: list[tuple[Row, Row]] = pairs) -> np.ndarray:
            return np.array([value(row) - value(other) for row, other in pairs])

        windows = ""
        if pairs:
            shift = np.mean([np.array(row["nll"]) - np.array(other["nll"]) for row, other in pairs], axis=0)
            windows = _over_windows(shift, 4)
        paper = PAPER.get((codebook, arm))
        gain = "" if paper is None else f"{paper:.1f}"
        if paper is not None and arm != "QLoRA":
            gain += f" ({paper - PAPER[codebook, 'QLoRA']:+.1f})"
        lines.append(
            [
                arm,
                str(len(of_arm)),
                f"{np.mean([row['loss'] for row in of_arm]):.4f}",
                _interval(paired(lambda row: row["loss"]), 4),
                f"{np.mean([row['wikitext'] for row in of_arm]):.2f}",
                _interval(paired(lambda row: math.log(row["wikitext"])), 4),
                windows,
                _perplexity(float(np.mean([row["books"] for row in of_arm]))),
                _interval(paired(lambda row: math.log(row["books"])), 4),
                gain,
            ]
        )
    return _markdown(titles, lines)


def _effects(rows: list[Row], model: str) -> list[str]:
    """What each part is worth after fine-tuning, seed by seed: held-out loss, ln(perplexity) of two texts."""
    after = _select(rows, model=model, stage="after")
    books = [book for book in ("nf4", "nf3", "nf2", "int4") if _select(after, codebook=book)]
    lines = []
    for name, arm, other in QUESTIONS:
        cells = []
        for book in books:
            of = {
                (row["arm"], row["seed"]): row for row in after if row["codebook"] in (book, "none")
            }  # unquantised arms are of every codebook
            seeds = [seed for a, seed in of if a == arm and (other, seed) in of]
            pairs = [(of[arm, seed], of[other, seed]) for seed in seeds]
            cells.append(_interval(np.array([row["loss"] - base["loss"] for row, base in pairs]), 4))
            for text in ("wikitext", "books"):
                nats = np.array([math.log(row[text] / base[text]) for row, base in pairs])
                cells.append(_interval(nats, 4))
        if any(cells):
            lines.append([name, f"{arm} − {other}", *cells])
    titles = [f"{book} {what}" for book in books for what in ("loss", "ln(wikitext)", "ln(books)")]
    return _markdown(["part", "arms", *titles], lines)


def _choices(rows: list[Row], model: str, codebook: str) -> list[str]:
    """Multiple choice of the unquantised base, the bases before, and the arms after fine-tuning."""
    before = _select(rows, model=model, stage="before", codebook="none")
    before += _select(rows, model=model, stage="before", codebook=codebook)
    after = _select(rows, model=model, stage="after", codebook="none")
    after += _select(rows, model=model, stage="after", codebook=codebook)
    tasks = [task for task in TASKS if before and task in before[0]]
    more = [task for task in ("mmlu",) if before and task in before[0]]  # of other questions: not in the mean
    lines = []
    for stage, part in (("before", before), ("after", [row for row in after if tasks[0] in row])):
        for arm in dict.fromkeys(row["arm"] for row in part):
            of_arm = [row for row in part if row["arm"] == arm]
            means = [100 * float(np.mean([row[task] for row in of_arm])) for task in tasks]
            name = "unquantised" if arm == "full" else arm
            cells = [f"{m:.1f}" for m in (*means, np.mean(means))]
            cells += [f"{100 * float(np.mean([row[task] for row in of_arm])):.1f}" for task in more]
            lines.append([stage, name, *cells])
    names = {
        task: task if task not in _ONE_TOKEN or _is_first(before + after) else f"{task}, ties right"
        for task in (*tasks, *more)
    }
    return _markdown(
        ["", "base or arm", *(names[t] for t in tasks), "mean", *(names[t] for t in more)], lines
    )


def _is_first(rows: list[Row]) -> bool:
    """Whether the first of equal choices was taken, and not, as once, the right one."""
    return all(row.get("ties") == "first" for row in rows if TASKS[0] in row)


def tables(rows: list[Row]) -> str:
    """All tables as Markdown, models in the order of the rows."""
    out: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = _select(rows, model=model)
        out += [f"## {model}: before fine-tuning", "", *_before(rows, model), ""]
        if _select(of_model, stage="after"):
            out += [f"## {model}: what each part is worth after fine-tuning", "", *_effects(rows, model), ""]
        for codebook in ("nf4", "nf3", "nf2", "int4"):
            after = [row for row in of_model if row["stage"] == "after" and row["codebook"] == codebook]
            if not after:
                continue
            out += [f"## {model}: {codebook}, after {after[0]['steps']} steps", ""]
            out += [*_after(rows, model, codebook), ""]
            if any(TASKS[0] in row for row in after):
                out += [
                    f"### {model}: {codebook}, multiple choice, %",
                    "",
                    *_choices(rows, model, codebook),
                    "",
                ]
    return "\n".join(out)

"""Reproduce IR-QLoRA's ablation on a small model, all arms side by side, row by row.

Rows are JSON lines; a row that is there is not computed again, so that runs add up; rows of another base,
data, rank, rate or number of questions are refused. The steps, for SmolLM2-135M (a GPU; `get_smollm2.py`
fetches it) and for the demo model (seconds on a GPU, hours on a CPU):

    python scripts/reproduce_paper.py prepare ../shared/data irq_export/demo_model build/paper/demo.npz
    python scripts/reproduce_paper.py prepare ../shared/data ../smollm2/hf build/paper/smol.npz --books 8000
    python scripts/reproduce_paper.py base ../smollm2/hf build/paper/smol.npz build/paper/base.safetensors
    python scripts/reproduce_paper.py run build/paper/base.safetensors build/paper/smol.npz \\
        --config ../smollm2/hf/config.json
    python scripts/reproduce_paper.py table build/paper/rows.jsonl

Every arm of a seed reads the same examples in the same order and starts from the same A; differences between
arms are taken seed by seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

try:
    from irq_runtime import _native  # noqa: F401
except ImportError:  # a machine with a GPU needs no native search
    sys.modules["irq_runtime._native"] = types.ModuleType("irq_runtime._native")

from _reproduce_bases import METHODS, Base, input_moments, quantise
from _reproduce_data import Choices, load, prepare
from _reproduce_eval import divergence, evaluate
from _reproduce_model import KINDS, Adapters, Arms, Shape, rate_losses
from _reproduce_table import compact, tables
from _reproduce_train import Recipe, arm_weights, read_base, step_times, train_arms, train_base, write_base

log = logging.getLogger("reproduce_paper")

#: Base, beta1, beta2 of every arm.
ARMS: dict[str, tuple[str, bool, bool]] = {
    "LoRA, 16 bits": ("full", False, False),
    "QLoRA": ("plain", False, False),
    "+ ICQ": ("ICQ", False, False),
    "+ IEC(U1)": ("plain", True, False),
    "+ IEC(U2)": ("plain", False, True),
    "+ IEC": ("plain", True, True),
    "IR-QLoRA": ("ICQ", True, True),
    "QLoRA + refit": ("plain + refit", False, False),
    "IR-QLoRA + refit": ("ICQ + refit", True, True),
    "QLoRA, calibrated refit": ("calibrated refit", False, False),
    "QLoRA, calibrated": ("calibrated", False, False),
    "IEC, calibrated": ("calibrated", True, True),
    "IEC, calibrated refit": ("calibrated refit", True, True),  # what `irq-export train` does by default
}
KEY = ("model", "stage", "codebook", "arm", "seed", "steps", "data")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, but for a last one that was cut off while it was written."""
    return [
        json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line[-1:] == "\n"
    ]


def fingerprint(path: Path) -> str:
    """A hash of what a base or a data file holds."""
    with (path / "model.safetensors" if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Rows:
    """The results: JSON lines, appended one by one.

    Rows of one model have one setting: what they were computed from and how, but for what `KEY` names.
    """

    def __init__(self, path: Path, model: str, setting: dict[str, Any]) -> None:
        self.path, self.setting = path, setting
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(path) if path.exists() else []
        for row in rows:
            if row["model"] == model and row.get("setting") != setting:
                raise click.UsageError(
                    f"{path} has rows of {model!r} of another setting, {row.get('setting')} for {setting}: "
                    "give another --rows or --name"
                )
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)  # a row that was cut off goes
        self._keys = {self._key(row) for row in rows}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in KEY)

    def has(self, **key: object) -> bool:
        """Whether the row is there."""
        return self._key(key) in self._keys

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._keys.add(self._key(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"setting": self.setting}) + "\n")
        short = {k: v for k, v in row.items() if not isinstance(v, list) and k not in ("recipe", "stage")}
        log.info("%s %s", row["stage"], json.dumps(short))


def _adapter_facts(model: Arms, adapters: Adapters, shape: Shape) -> list[dict[str, float]]:
    """For each arm: mean magnitude of its betas, and the norm of its update over that of its weights."""
    update, norm = 0.0, 0.0
    with torch.no_grad():
        for kind, a, b in adapters.folded(torch.float32):
            gram = (b.mT @ b) * (a @ a.mT)  # (layers, arms, r, r); its sum is |B A|^2
            update = update + gram.sum((0, 2, 3)) * adapters.scaling**2
            norm = norm + model.weights.linears[kind].float().square().sum((0, 2, 3))
        ratio = (update / norm).sqrt().tolist()
        beta = (adapters.beta * adapters.mask[:, None]).abs().mean(dim=(0, 2))  # (2, arms)
    names = ("update", "beta1", "beta2")
    return [dict(zip(names, map(float, v), strict=True)) for v in zip(ratio, *beta.tolist(), strict=True)]


Job = tuple[str, str, int]  # codebook, arm, seed


def _chunks(jobs: list[Job], at_once: int) -> Iterator[list[Job]]:
    """Cut the jobs into passes of about one size, in their order."""
    parts = -(-len(jobs) // at_once)
    size = -(-len(jobs) // max(parts, 1)) if jobs else 1
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


def _thin(data: dict[str, Any], windows: int | None, questions: int | None) -> dict[str, Any]:
    """Keep the first windows of wikitext-2 and the first questions of each task."""
    found = dict(data)
    for name, part in data.items():
        if isinstance(part, Choices) and questions is not None:
            found[name] = part.first(questions)
    if windows is not None:
        found["wikitext"] = data["wikitext"].first(windows)
    return found


@click.group(help=__doc__)
def main() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(relativeCreated)8.0f ms  %(message)s", stream=sys.stderr
    )
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = 64  # one element-wise part, many shapes


@main.command("prepare")
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--books", default=0, show_default=True, help="Windows of 1024 tokens to train a base on.")
def prepare_command(data: Path, model: Path, output: Path, books: int) -> None:
    """Tokenise everything (a CPU; minutes). Without --books: no multiple choice either."""
    end = json.loads((model / "config.json").read_text("utf-8"))["eos_token_id"]
    click.echo(json.dumps(prepare(data, model / "tokenizer.json", end, output, full=books > 0, books=books)))


@main.command("base")
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True), help="config.json; MODEL's by default."
)
@click.option("--batch", default=32, show_default=True)
@click.option("--passes", default=2, show_default=True)
@click.option("--steps", type=int, help="Stop after so many; what --passes and --seconds allow by default.")
@click.option("--rate", default=2e-4, show_default=True)
@click.option("--seconds", default=90.0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def base_command(
    model: Path, data: Path, output: Path, config: Path | None, batch: int, passes: int, steps: int | None,
    rate: float, seconds: float, device: str,
) -> None:  # fmt: skip
    """Train all weights on books, so that they lie on no grid."""
    shape, base = read_base(model, config or model / "config.json", device)
    books: Any = load(data)["books"]
    trained, facts = train_base(
        shape, base, books, batch=batch, passes=passes, most=steps, rate=rate, seconds=seconds
    )
    write_base(output, trained)
    output.with_suffix(".json").write_text(json.dumps(facts), "utf-8")
    click.echo(json.dumps(facts))


@main.command("time")
@click.argument("config", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--length", default=128, show_default=True, help="Tokens of an example.")
@click.option("--steps", default=12, show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def time_command(config: Path, length: int, steps: int, rank: int, device: str) -> None:
    """Time a step of a model of this shape, random weights: one arm, with IEC, many arms."""
    shape = Shape.from_config(json.loads(config.read_text("utf-8")))
    for row in step_times(shape, Recipe(steps=steps, rank=rank), length, device):
        click.echo(json.dumps(row))


@main.command("run")
@click.argument("base_path", metavar="BASE", type=click.Path(path_type=Path, exists=True))
@click.argument("data_path", metavar="DATA", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True), required=True, help="config.json of BASE."
)
@click.option("--rows", "rows_path", type=click.Path(path_type=Path), default=Path("build/paper/rows.jsonl"))
@click.option("--name", default="SmolLM2-135M", show_default=True, help="Of the model, in the rows.")
@click.option("--codebook", multiple=True, default=("nf4", "nf2", "nf3"), show_default=True)
@click.option("--arm", "arm_names", multiple=True, default=tuple(ARMS), help="Arms to train; all by default.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=tuple(METHODS),
    help="Bases to measure before; all by default.",
)
@click.option("--no-arms", is_flag=True, help="Only the bases, before fine-tuning.")
@click.option("--only-arms", is_flag=True, help="Only the arms.")
@click.option("--seeds", default=2, show_default=True)
@click.option("--task-seeds", type=int, help="Multiple choice after so many seeds only; all by default.")
@click.option(
    "--data", "data_name", default="instruct", show_default=True, type=click.Choice(["instruct", "p3"])
)
@click.option("--steps", default=500, show_default=True)
@click.option("--rank", default=64, show_default=True)
@click.option("--rate", default=2e-4, show_default=True)
@click.option("--at-once", default=18, show_default=True, help="Arms side by side (memory).")
@click.option("--windows", type=int, help="Measure on so many windows of wikitext-2; all by default.")
@click.option("--questions", type=int, help="Measure on so many questions of each task; all by default.")
@click.option("--seconds", default=1e9, help="Start nothing after so many seconds.")
@click.option("--fuse/--no-fuse", default=torch.cuda.is_available(), show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def run_command(
    base_path: Path, data_path: Path, config: Path, rows_path: Path, name: str, codebook: tuple[str, ...],
    arm_names: tuple[str, ...], methods: tuple[str, ...], no_arms: bool, only_arms: bool, seeds: int,
    task_seeds: int | None, data_name: str, steps: int, rank: int, rate: float, at_once: int,
    windows: int | None, questions: int | None, seconds: float, fuse: bool, device: str,
) -> None:  # fmt: skip
    """Measure every base before fine-tuning, then train and measure the arms."""
    deadline = time.monotonic() + seconds
    setting = {"base": fingerprint(base_path), "data": fingerprint(data_path), "rank": rank, "rate": rate}
    rows = Rows(rows_path, name, setting | {"windows": windows, "questions": questions})
    data = _thin(load(data_path), windows, questions)
    shape, base = read_base(base_path, config, device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    recipe = Recipe(steps=steps, rank=rank, rate=rate)
    tasks = "hellaswag" in data
    full = {kind: base[kind] for kind in KINDS}
    kept: dict[tuple[str, str], Base] = {}
    text = data["calibration"]
    calibration = torch.from_numpy(text.ids.reshape(len(text), -1).astype(np.int64)).to(device)
    moments = input_moments(shape, arm_weights(base, [full], dtype), calibration)

    def quantised(codebook: str, method: str) -> Base:
        if method == "full":
            return Base({kind: w.to(dtype) for kind, w in full.items()}, {})
        if (codebook, method) not in kept:
            kept[codebook, method] = quantise(full, codebook, method, moments, dtype)
            log.info("%s %s: %s", codebook, method, kept[codebook, method].facts)
        return kept[codebook, method]

    def before(codebook: str) -> None:
        key: dict[str, Any] = {"model": name, "stage": "before", "codebook": codebook, "data": data_name}
        names = [m for m in (["full"] if codebook == "none" else methods) if not rows.has(**key, arm=m)]
        if not names:
            return
        bases = [quantised(codebook, m) for m in names]
        model = Arms(shape, arm_weights(base, [b.linears for b in bases], dtype))
        wiki = data["wikitext"].first(64)
        few = torch.from_numpy(wiki.ids.reshape(len(wiki), -1).astype(np.int64)).to(device)
        kl = divergence(model, Arms(shape, arm_weights(base, [full], dtype)), few)
        measured = evaluate(model, data, f"{data_name}_held", tasks=tasks)
        for m, b, found, windows_kl in zip(names, bases, measured, kl, strict=True):
            rows.add(key | {"arm": m} | b.facts | found | {"kl": windows_kl.round(6).tolist()})

    def after(jobs: list[Job]) -> bool:
        books, names, of_seed = zip(*jobs, strict=True)
        method, u1, u2 = zip(*(ARMS[arm] for arm in names), strict=True)
        adapters = Adapters(shape, of_seed, u1, u2, rank=rank, scaling=recipe.scaling, device=device)
        linears = [quantised(b, m).linears for b, m in zip(books, method, strict=True)]
        model = Arms(shape, arm_weights(base, linears, dtype), adapters, fuse=fuse)
        done = train_arms(model, data[f"{data_name}_train"], of_seed, recipe, deadline)
        if done is None:
            return False
        facts = _adapter_facts(model, adapters, shape)
        asked = tasks and (task_seeds is None or min(of_seed) < task_seeds)
        measured = evaluate(model, data, f"{data_name}_held", tasks=asked)
        curve = rate_losses(done["losses"], max(1, steps // 20)).round(4)
        step_ms = round(float(1000 * done["seconds"][0] / max(1, steps - 10) / len(jobs)), 3)
        for i, (codebook, arm, seed) in enumerate(jobs):
            row = {
                "stage": "after",
                "model": name,
                "codebook": codebook,
                "arm": arm,
                "seed": seed,
                "steps": steps,
            }
            row |= {"data": data_name, "recipe": asdict(recipe), "arms": len(jobs), "step_ms": step_ms}
            rows.add(row | {"curve": curve[:, i].tolist()} | facts[i] | measured[i])
        return True

    for book in ("none", *codebook):
        if not only_arms and time.monotonic() < deadline:
            before(book)
    key: dict[str, Any] = {"model": name, "stage": "after", "steps": steps, "data": data_name}
    wanted = [
        (book, arm, seed)
        for seed, book, arm in product(range(seeds), ("none", *codebook), [] if no_arms else arm_names)
        if (ARMS[arm][0] == "full") == (book == "none")
        and not rows.has(**key, codebook=book, arm=arm, seed=seed)
    ]
    for jobs in _chunks(wanted, at_once):
        if time.monotonic() > deadline or not after(jobs):
            log.info("out of time")
            return
    if device.startswith("cuda"):
        log.info("peak memory %.1f GiB", torch.cuda.max_memory_allocated() / 2**30)


@main.command("table")
@click.argument(
    "rows_paths", metavar="ROWS...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True)
)
@click.option(
    "--compact", "compact_path", type=click.Path(path_type=Path), help="Write the rows here, shortened."
)
def table_command(rows_paths: tuple[Path, ...], compact_path: Path | None) -> None:
    """Print the tables of docs/paper.md."""
    rows = [compact(row) for path in rows_paths for row in read_rows(path)]
    if compact_path is not None:
        compact_path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    click.echo(tables(rows))


if __name__ == "__main__":
    main()

"""Compare the kernels of several commits in one process: gemv over every matrix of a model, in turn.

    scripts/bench_builds.py ../speed/nf4.gguf 7815fb5 HEAD worktree --rounds 40

A machine whose speed drifts by half between minutes cannot compare two programs; two builds that are visited
in turn it can. The last row only reads the same bytes, in the same ranges of rows on as many threads: what is
left to gain. Each build of runtime/src/kernels gets a namespace of its own (-Dirq=irq_0 ...) and all are
linked with the engine of the work tree, which opens the model. Shown per build and mode: GB/s of a matrix
that stays in the cache, and for all layers and the head (from memory, as decoding reads them) the median
milliseconds, the tenth percentile and the median over rounds of the ratio to the first build. The
views of matrices (irq/kernels.h, `Matrix`) must be laid out alike in all of them. Needs cmake and g++.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HARNESS = ROOT / "scripts" / "bench_builds"
# As runtime/src/kernels/CMakeLists.txt has them: without -fPIC GCC inlines otherwise.
FLAGS = ["-O3", "-DNDEBUG", "-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-w"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mbmi2", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "vbmi"))]
SOURCES = {"cpu": [], "matrix": [], "scalar": [], "avx2": AVX2, "avx512": AVX512}


def run(*command: str | Path, **options: Any) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def checkout(revision: str, target: Path) -> Path:
    """The sources of a commit, or of the work tree."""
    if revision == "worktree":
        return ROOT
    target.mkdir()
    archive = subprocess.run(
        ["git", "archive", revision, "runtime", "formats"], cwd=ROOT, check=True, capture_output=True
    )
    run("tar", "x", "-C", target, input=archive.stdout)
    return target


def compile_kernels(source: Path, index: int, work: Path) -> list[Path]:
    runtime, objects = source / "runtime", []
    includes = [f"-I{runtime / 'include'}", f"-I{source / 'formats' / 'include'}"]
    names = [f"-Dirq=irq_{index}", f"-DBUILD={index}"]
    files = [(runtime / "src" / "kernels" / f"{name}.cpp", flags) for name, flags in SOURCES.items()]
    for file, flags in [*files, (HARNESS / "build.cpp", [])]:
        objects.append(work / f"{index}-{file.stem}.o")
        run("g++", *FLAGS, *flags, *names, *includes, "-c", file, "-o", objects[-1])
    return objects


def table(report: dict[str, Any], revisions: list[str]) -> list[str]:
    lines = ["| build | mode | cache, GB/s | layers, ms | p10 | ratio | GB/s | head, ms | p10 | ratio |"]
    lines.append("|---" * 10 + "|")
    for mode in ("fast", "exact", "read"):
        rows = [row for row in report["rows"] if row["mode"] == mode]
        for row in rows:
            build = "" if mode == "read" else revisions[row["build"]]
            cells = [build, mode, f"{max(row['cache_bytes_per_s']) / 1e9:.1f}"]
            for part in ("layers_s", "head_s"):
                times, first = row[part], report["rows"][0][part] if mode == "read" else rows[0][part]
                ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
                low = statistics.quantiles(times, n=10)[0]
                cells += [f"{1e3 * statistics.median(times):.2f}", f"{1e3 * low:.2f}", f"{ratio:.2f}"]
                if part == "layers_s":
                    cells.append(f"{report['layer_bytes'] / statistics.median(times) / 1e9:.1f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the kernels of several commits in one process.")
    parser.add_argument("model", type=Path, help="irq GGUF")
    parser.add_argument("revisions", nargs="+", help="commits, or `worktree`; the first is the measure")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        objects = [
            file
            for i, revision in enumerate(args.revisions)
            for file in compile_kernels(checkout(revision, work / f"source{i}"), i, work)
        ]
        engine = work / "engine"
        run("cmake", "-S", ROOT / "runtime", "-B", engine, "-DIRQ_PYTHON=OFF", stdout=subprocess.DEVNULL)
        run("cmake", "--build", engine, "--target", "irq_engine", stdout=subprocess.DEVNULL)
        includes = [f"-I{ROOT / 'runtime' / 'include'}", f"-I{ROOT / 'formats' / 'include'}"]
        libraries = [engine / "src" / name / f"libirq_{name}.a" for name in ("engine", "kernels")]
        program = work / "bench"
        count = f"-DBUILDS={len(args.revisions)}"
        run(
            "g++",
            *FLAGS,
            count,
            *includes,
            HARNESS / "main.cpp",
            *objects,
            *libraries,
            "-lpthread",
            "-o",
            program,
        )
        done = subprocess.run(
            [program, args.model, str(args.rounds), str(args.threads)],
            check=True,
            capture_output=True,
            text=True,
        )
    sys.stdout.write("\n".join(table(json.loads(done.stdout), args.revisions)) + "\n")


if __name__ == "__main__":
    main()

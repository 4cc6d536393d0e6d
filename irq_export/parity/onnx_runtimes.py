"""onnxruntime and onnxruntime-genai as runtimes of a verification, with our library and without.

Every file that is given to them has been opened by :func:`irq_formats.onnx.model_file.open_model` before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irq_export.parity.runtimes import Tokens
from irq_formats.errors import IrqError, UnsupportedModel
from irq_formats.onnx.model_file import OnnxModel
from irq_formats.onnx.operators import DOMAIN
from irq_runtime.onnx import library_path, register

__all__ = ["GenaiAnswer", "OnnxRuntime", "count_kernels", "measure_load", "run_genai"]

_TIMEOUT_S = 3600


class OnnxRuntime:
    """A session of onnxruntime on the CPU.

    Args:
        model: An opened model.
        library: Whether our kernels run.
        threads: Compute threads.
        profile: Beginning of the name of a file for onnxruntime's profile; None profiles nothing.

    Raises:
        UnsupportedModel: onnxruntime refuses the model.
    """

    def __init__(self, model: OnnxModel, *, library: bool, threads: int, profile: Path | None = None) -> None:
        import onnxruntime

        self.name = "onnxruntime+irq" if library else "onnxruntime"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # else one warning for every input that has a default
        options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if library:
            register(options)
        self._path = model.path
        try:
            self._session = onnxruntime.InferenceSession(
                str(model.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own, which share no base
            raise UnsupportedModel("onnxruntime cannot load it", where=model.path, got=error) from error
        self._past = [value for value in self._session.get_inputs() if value.name.startswith("past_")]
        self._run_options = onnxruntime.RunOptions()
        self._adapter: Any = None

    def use(self, adapter: Path | None) -> None:
        """Switch to an adapter file, or to none, in the running session.

        Raises:
            UnsupportedModel: onnxruntime cannot read it.
        """
        import onnxruntime

        self._run_options = onnxruntime.RunOptions()
        if adapter is None:
            return
        self._adapter = onnxruntime.LoraAdapter()
        try:
            self._adapter.Load(str(adapter))
        except Exception as error:  # onnxruntime's own, which share no base
            raise UnsupportedModel("onnxruntime cannot read the adapter", where=adapter, got=error) from error
        self._run_options.add_active_adapter(self._adapter)

    def logits(self, tokens: Tokens) -> NDArray[np.floating]:
        """Return logits ``(n, vocab)``."""
        return self.step(list(tokens), self.empty_cache())[0]

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """Return ``count`` tokens by argmax, with the cache."""
        found: list[int] = []
        step, cache = list(tokens), self.empty_cache()
        for _ in range(count):
            logits, cache = self.step(step, cache)
            step = [int(logits[-1].argmax())]
            found += step
        return found

    def end_profiling(self) -> Path:
        """Return the file with the profile."""
        return Path(self._session.end_profiling())

    def empty_cache(self) -> list[NDArray[np.floating]]:
        """Return keys and values of no position, each ``(1, kv heads, 0, head_dim)``."""
        dtype = np.float16 if "float16" in self._past[0].type else np.float32
        return [np.zeros((1, value.shape[1], 0, value.shape[3]), dtype) for value in self._past]

    def step(
        self, tokens: Sequence[int], cache: Sequence[NDArray[np.floating]]
    ) -> tuple[NDArray[np.floating], list[NDArray[np.floating]]]:
        """Return the logits ``(n, vocab)`` of tokens behind a cache, and the cache after them.

        Raises:
            UnsupportedModel: onnxruntime fails on it.
        """
        total = cache[0].shape[2] + len(tokens)
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            **{value.name: array for value, array in zip(self._past, cache, strict=True)},
        }
        try:
            logits, *present = self._session.run(None, feed, self._run_options)
        except Exception as error:  # onnxruntime's own, which share no base
            raise UnsupportedModel("onnxruntime cannot run it", where=self._path, got=error) from error
        return logits[0], present


@dataclass(frozen=True)
class GenaiAnswer:
    """What onnxruntime-genai computed.

    Attributes:
        logits: Of every case, ``(n, vocab)``.
        greedy: Tokens of every case.
        encoded: Tokens of every text, of its own tokenizer.
    """

    logits: list[NDArray[np.floating]]
    greedy: list[list[int]]
    encoded: list[list[int]]


def run_genai(
    folder: Path,
    cases: Sequence[tuple[str, Path | None]],
    *,
    library: bool,
    tokens: Tokens,
    prompt: Sequence[int],
    greedy: int,
    texts: Sequence[tuple[str, bool]],
    never: int,
    threads: int,
) -> GenaiAnswer:
    """Run onnxruntime-genai on an export, in a process of its own.

    Args:
        folder: The export.
        cases: Name and file of the adapters to run in turn; no file is the base.
        library: Add our kernels to what the folder names.
        tokens: To compute logits of.
        prompt: To continue.
        greedy: Tokens to generate.
        texts: To encode, and whether to add special tokens.
        never: A token that the models do not generate; the only one that ends a text.
        threads: Compute threads.

    Raises:
        UnsupportedModel: genai refuses the folder, or dies of it.
    """
    with tempfile.TemporaryDirectory(prefix="irq-verify-") as output:
        answer = _work(
            {
                "job": "generate",
                "folder": str(folder.resolve()),
                "library": str(library_path()) if library else "",
                "cases": [
                    {"name": name, "adapter": "" if file is None else str(file.resolve())}
                    for name, file in cases
                ],
                "tokens": [int(token) for token in tokens],
                "prompt": list(prompt),
                "greedy": greedy,
                "texts": [list(text) for text in texts],
                "no_token": never,
                "threads": threads,
                "output": output,
            },
            where=folder,
        )
        logits = [np.load(Path(output) / f"{index}.npy") for index in range(len(cases))]
    return GenaiAnswer(logits, answer["greedy"], answer["encoded"] or [])


def measure_load(model: OnnxModel, *, library: bool) -> int:
    """Return by how many bytes the resident memory of a fresh process rises at most while it loads a model.

    Mapped pages of the files count as soon as they are touched. The imports before do not count.
    """
    job = {
        "job": "measure_load",
        "model": str(model.path.resolve()),
        "library": str(library_path()) if library else "",
    }
    return int(_work(job, where=model.path)["peak"])


def count_kernels(model: OnnxModel, *, library: bool) -> int:
    """Return how many different nodes of our domain ran as such in one step, by onnxruntime's own profile.

    A node whose function body was inlined is not among them.
    """
    with tempfile.TemporaryDirectory(prefix="irq-verify-") as directory:
        runtime = OnnxRuntime(model, library=library, threads=1, profile=Path(directory) / "profile")
        runtime.logits([0])
        events = json.loads(runtime.end_profiling().read_text(encoding="utf-8"))
    ours = {node.op_type for node in model.proto.graph.node if node.domain == DOMAIN}
    return len(
        {
            event["name"]
            for event in events
            if event.get("cat") == "Node"
            and event["name"].endswith("_kernel_time")
            and event.get("args", {}).get("op_name") in ours
        }
    )


def _work(job: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """Run a job of :mod:`irq_export.parity.onnx_worker` in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONSAFEPATH": "1",  # nothing is imported from the working directory
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "irq_export.parity.onnx_worker"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise IrqError(
            "the runtime does not answer", where=where, got=f"nothing in {_TIMEOUT_S} s"
        ) from error
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise UnsupportedModel(
            f"the runtime could not run it (exit status {done.returncode})",
            where=where,
            got=words[-1][:300] if words else None,
        )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer

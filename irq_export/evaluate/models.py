"""Open whatever is to be evaluated: a checkpoint, a Hugging Face model, or an exported file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_export.evaluate.scorers import (
    LlamaCppScorer,
    Scorer,
    engine_scorer,
    onnx_scorer,
    reference_scorer,
)
from irq_export.hf_directory import load_causal_lm, read_tokenizer, torch_device
from irq_export.parity.target import is_onnx
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.files import read_small
from irq_formats.gguf.pair import check_pair, model_files
from irq_formats.gguf.reader import open_gguf
from irq_formats.quantization import QUANT_METHOD
from irq_formats.strict_json import parse_object
from irq_runtime.engine import Engine
from irq_runtime.model_file import read_config as read_gguf_config
from irq_runtime.reference import load_model
from irq_runtime.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ONNX_RUNTIMES", "RUNTIMES", "EvaluatedModel", "ModelSource", "find_model", "open_model"]

#: What runs a GGUF file; the first is the default. A directory of weights always runs in torch.
RUNTIMES = ("native", "reference", "llama.cpp")
#: What runs a folder of ``to-onnx``: onnxruntime, with our library or without.
ONNX_RUNTIMES = ("onnxruntime+irq", "onnxruntime")
#: Longest sequence kept for any task.
_CONTEXT = 4096


@dataclass(frozen=True)
class ModelSource:
    """A model that can be evaluated, as its files describe it; nothing is loaded yet.

    Attributes:
        path: As given.
        runtimes: What can run it, the default first; nothing to choose for a directory of weights.
        tokenizer: Of the model.
        positions: Tokens of the longest sequence it is given.
    """

    path: Path
    runtimes: tuple[str, ...]
    tokenizer: Tokenizer
    positions: int


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and its tokenizer.

    Attributes:
        path: As given.
        scorer: Runs it.
        tokenizer: Of the model.
    """

    path: Path
    scorer: Scorer
    tokenizer: Tokenizer


def find_model(path: str | Path) -> ModelSource:
    """Read what the files of a model say about it.

    Args:
        path: Checkpoint or Hugging Face directory, GGUF file, directory of a stock pair, or ONNX folder.

    Raises:
        UsageError: No model there, or none with a tokenizer.
        MalformedFile: A file breaks its specification.
        UnsupportedModel: A model this version does not run.
    """
    path = Path(path)
    runtimes: tuple[str, ...]
    if is_onnx(path):
        runtimes, folder = ONNX_RUNTIMES, path.parent if path.suffix == ".onnx" else path
        positions, tokenizer = _onnx_positions(folder), _directory_tokenizer(folder)
    elif (path / "config.json").is_file():
        runtimes, tokenizer = (), _directory_tokenizer(path)
        positions = getattr(_hf_config(path), "max_position_embeddings", _CONTEXT)
    else:
        runtimes, gguf = RUNTIMES, open_gguf(model_files(path, None)[0])
        positions, tokenizer = read_gguf_config(gguf).max_position_embeddings, load_tokenizer(gguf)
    return ModelSource(path, runtimes, tokenizer, min(positions, _CONTEXT))


@contextmanager
def open_model(
    path: str | Path | ModelSource,
    *,
    adapter: str | Path | None = None,
    adapter_gguf: str | Path | None = None,
    adapter_onnx: str | Path | None = None,
    runtime: str | None = None,
    mode: str = "exact",
    threads: int = 2,
    device: str = "cpu",
    dtype: str = "float32",
    batch_tokens: int = 4096,
) -> Iterator[EvaluatedModel]:
    """Open a model for evaluation.

    Args:
        path: What :func:`find_model` takes or returns.
        adapter: PEFT directory, for a directory of weights; default: the checkpoint's own, if it has one.
        adapter_gguf: Separate adapter file, for a GGUF.
        adapter_onnx: Adapter file, for an ONNX folder; default: its only one, if there is one.
        runtime: One of those of the source.
        mode: Of the native engine, ``exact`` or ``fast``.
        threads: Of native, llama.cpp and onnxruntime.
        device: Of torch.
        dtype: Of torch: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        batch_tokens: Of torch, tokens a batch.

    Raises:
        UsageError: No model there, or an option that does not belong to it.
        WrongBase: The adapter belongs to another base.
        MalformedFile: A file breaks its specification.
        UnsupportedModel: A model this version does not run.
    """
    source = path if isinstance(path, ModelSource) else find_model(path)
    if source.runtimes and runtime not in (None, *source.runtimes):
        expected = " | ".join(source.runtimes)
        raise UsageError("unknown runtime", where=source.path, expected=expected, got=runtime)
    for given, runtimes, option in (
        (adapter, (), "--adapter"),
        (adapter_gguf, RUNTIMES, "--adapter-gguf"),
        (adapter_onnx, ONNX_RUNTIMES, "--adapter-onnx"),
    ):
        if given is not None and source.runtimes != runtimes:
            raise UsageError(f"this model takes no {option}", where=source.path, got=given)
    runtime = runtime or next(iter(source.runtimes), None)
    scorer: Scorer
    if source.runtimes == ONNX_RUNTIMES:
        scorer = _open_onnx(source, adapter_onnx, library=runtime == "onnxruntime+irq", threads=threads)
    elif not source.runtimes:
        scorer = _open_torch(source, adapter, device, dtype, batch_tokens)
    else:
        model, lora = model_files(source.path, None if adapter_gguf is None else Path(adapter_gguf))
        if runtime == "native":
            engine = Engine(model, lora, threads=threads, mode=mode, context=source.positions)
            scorer = engine_scorer(engine)
        elif runtime == "reference":
            scorer = reference_scorer(load_model(model, lora))
            scorer.max_length = source.positions
        else:
            from irq_export.parity.llamacpp import LlamaCpp

            check_pair(open_gguf(model), None if lora is None else open_gguf(lora))  # llama.cpp does not
            with LlamaCpp(model, lora, threads=threads, ctx=source.positions - 1) as server:
                yield EvaluatedModel(source.path, LlamaCppScorer(server), source.tokenizer)
            return
    yield EvaluatedModel(source.path, scorer, source.tokenizer)


def _open_torch(
    source: ModelSource, adapter: str | Path | None, device: str, dtype: str, batch_tokens: int
) -> Scorer:
    import torch

    from irq_export.evaluate.torch_scorer import TorchScorer

    path, where = source.path, torch_device(device)
    quantization = getattr(_hf_config(path), "quantization_config", None)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model: Any
    if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
        from irq_export.export.gguf.adapters import export_adapter
        from irq_export.iec import attach
        from irq_export.quantizer import load_model as load_checkpoint
        from irq_formats.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        chosen = checkpoint.adapter_dir if adapter is None else Path(adapter)
        found = None if chosen is None else export_adapter(checkpoint, chosen, "keep")
        model = load_checkpoint(path, dtype=torch_dtype, device=where, verify=False)
        if found is not None:
            attach(model, found, dtype=torch_dtype)
    else:
        model = load_causal_lm(path, dtype=torch_dtype, device=where)
        if adapter is not None:
            from irq_export.iec import attach
            from irq_formats.peft_adapter import read_peft_adapter

            attach(model, read_peft_adapter(adapter), dtype=torch_dtype)
    return TorchScorer(model.to(where).eval(), max_length=source.positions, batch_tokens=batch_tokens)


def _open_onnx(source: ModelSource, adapter: str | Path | None, *, library: bool, threads: int) -> Scorer:
    from irq_export.parity.onnx_runtimes import OnnxRuntime
    from irq_formats.onnx.model_file import open_model as open_onnx

    path = source.path
    folder, file = (path, path / "model.onnx") if path.is_dir() else (path.parent, path)
    beside = sorted(folder.glob("*.onnx_adapter"))
    if adapter is None and len(beside) > 1:
        names = ", ".join(name.name for name in beside)
        raise UsageError("several adapters in the folder", where=folder, got=names, hint="--adapter-onnx")
    session = OnnxRuntime(open_onnx(file), library=library, threads=threads)
    session.use(Path(adapter) if adapter is not None else next(iter(beside), None))
    return onnx_scorer(session, source.positions)


def _onnx_positions(folder: Path) -> int:
    """Read how many positions ``genai_config.json`` gives a model."""
    settings = folder / "genai_config.json"
    try:
        values: Any = parse_object(read_small(settings, limit=1 << 20), where=settings)
        return int(values["model"]["context_length"])
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise MalformedFile("no length of the context", where=settings, got=error) from error


def _hf_config(path: Path) -> Any:
    """Return what transformers makes of a ``config.json``; it knows the names that families use."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel("transformers does not know the model", where=path, got=error) from error


def _directory_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a directory, with BOS if it puts one before a text."""
    model = read_tokenizer(path)
    plain, special = (model.encode("a", add_special_tokens=add).ids for add in (False, True))
    return Tokenizer(model, bos=special[0] if special[:1] != plain[:1] else None)

"""Open whatever is to be evaluated: a checkpoint, a Hugging Face model, or an exported file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from irq_export.evaluate.scorers import (
    LlamaCppScorer,
    Scorer,
    engine_scorer,
    onnx_scorer,
    reference_scorer,
)
from irq_export.parity.target import is_onnx
from irq_formats.errors import MalformedFile, UsageError
from irq_formats.gguf.irq_payload import ARCHITECTURE
from irq_formats.gguf.model_keys import IRQ_PREFIX, read_model
from irq_formats.gguf.pair import model_files
from irq_formats.gguf.reader import open_gguf
from irq_formats.quantization import QUANT_METHOD
from irq_runtime.engine import Engine
from irq_runtime.reference import load_model
from irq_runtime.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ONNX_RUNTIMES", "RUNTIMES", "EvaluatedModel", "open_model", "runtimes_of"]

#: What runs a GGUF file; the first is the default. A directory of weights always runs in torch.
RUNTIMES = ("native", "reference", "llama.cpp")
#: What runs a folder of ``to-onnx``: onnxruntime, with our library or without.
ONNX_RUNTIMES = ("onnxruntime+irq", "onnxruntime")
#: Longest sequence kept for any task.
_CONTEXT = 4096


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


def runtimes_of(path: str | Path) -> tuple[str, ...]:
    """Return what can run a model, the default first; nothing to choose for a directory of weights."""
    if is_onnx(Path(path)):
        return ONNX_RUNTIMES
    return () if (Path(path) / "config.json").is_file() else RUNTIMES


@contextmanager
def open_model(
    path: str | Path,
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
        path: Checkpoint or Hugging Face directory, GGUF file, directory of a stock pair, or ONNX folder.
        adapter: PEFT directory, for a directory of weights; default: the checkpoint's own, if it has one.
        adapter_gguf: Separate adapter file, for a GGUF.
        adapter_onnx: Adapter file, for an ONNX folder; default: its only one, if there is one.
        runtime: One of :func:`runtimes_of` the path.
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
    path = Path(path)
    known = runtimes_of(path)
    if known and runtime not in (None, *known):
        raise UsageError("unknown runtime", where=path, expected=" | ".join(known), got=runtime)
    if known == ONNX_RUNTIMES:
        yield _open_onnx(path, adapter_onnx, runtime or known[0], threads)
        return
    if not known:
        if adapter_gguf is not None:
            raise UsageError(
                "a directory of weights takes a PEFT adapter", got=adapter_gguf, hint="--adapter"
            )
        yield _open_torch(path, adapter, device, dtype, batch_tokens)
        return
    runtime = runtime or known[0]
    model, lora = model_files(path, None if adapter_gguf is None else Path(adapter_gguf))
    gguf = open_gguf(model)
    tokenizer = load_tokenizer(gguf)
    architecture = str(gguf.metadata["general.architecture"])
    prefix = IRQ_PREFIX if architecture == ARCHITECTURE else architecture
    context = min(read_model(gguf.metadata, prefix, gguf.tensors).max_position_embeddings, _CONTEXT)
    if runtime == "native":
        engine = Engine(model, lora, threads=threads, mode=mode, context=context)
        yield EvaluatedModel(path, engine_scorer(engine), tokenizer)
    elif runtime == "reference":
        yield EvaluatedModel(path, reference_scorer(load_model(model, lora)), tokenizer)
    else:
        from irq_export.parity.llamacpp import LlamaCpp

        with LlamaCpp(model, lora, threads=threads, ctx=context - 1) as server:
            yield EvaluatedModel(path, LlamaCppScorer(server), tokenizer)


def _open_torch(
    path: Path, adapter: str | Path | None, device: str, dtype: str, batch_tokens: int
) -> EvaluatedModel:
    import torch

    from irq_export.evaluate.torch_scorer import TorchScorer

    tokenizer = _read_tokenizer(path)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    torch_dtype: torch.dtype = getattr(torch, dtype)
    model: Any
    if quantization.get("quant_method") == QUANT_METHOD:
        from irq_export.export.gguf.adapters import export_adapter
        from irq_export.iec import attach
        from irq_export.quantizer import load_model as load_checkpoint
        from irq_formats.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path)
        source = checkpoint.adapter_dir if adapter is None else Path(adapter)
        found = None if source is None else export_adapter(checkpoint, source, "keep")
        model = load_checkpoint(path, dtype=torch_dtype, device=device, verify=False)
        if found is not None:
            attach(model, found, dtype=torch_dtype)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch_dtype, local_files_only=True, use_safetensors=True
        )
        if adapter is not None:
            from irq_export.iec import attach
            from irq_formats.peft_adapter import read_peft_adapter

            attach(model, read_peft_adapter(adapter), dtype=torch_dtype)
    model = model.to(device).eval()
    limit = min(model.config.max_position_embeddings, _CONTEXT)
    scorer = TorchScorer(model, max_length=limit, batch_tokens=batch_tokens)
    return EvaluatedModel(path, scorer, tokenizer)


def _open_onnx(path: Path, adapter: str | Path | None, runtime: str, threads: int) -> EvaluatedModel:
    from irq_export.parity.onnx_runtimes import OnnxRuntime
    from irq_formats.files import read_small
    from irq_formats.onnx.model_file import open_model as open_onnx
    from irq_formats.strict_json import parse_object

    folder = path.parent if path.suffix == ".onnx" else path
    model = open_onnx(folder / "model.onnx" if path.is_dir() else path)
    beside = sorted(folder.glob("*.onnx_adapter"))
    if adapter is None and len(beside) > 1:
        names = ", ".join(file.name for file in beside)
        raise UsageError("several adapters in the folder", where=folder, got=names, hint="--adapter-onnx")
    session = OnnxRuntime(model, library=runtime == "onnxruntime+irq", threads=threads)
    session.use(Path(adapter) if adapter is not None else next(iter(beside), None))
    settings = folder / "genai_config.json"
    try:
        values: Any = parse_object(read_small(settings, limit=1 << 20), where=settings)
        context = int(values["model"]["context_length"])
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise MalformedFile("no length of the context", where=settings, got=error) from error
    return EvaluatedModel(path, onnx_scorer(session, min(context, _CONTEXT)), _read_tokenizer(folder))


def _read_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json`` of a directory."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UsageError("the directory has no tokenizer.json", where=path)
    try:
        model = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise MalformedFile("not a tokenizer", where=file, got=error) from error
    model.no_truncation()
    model.no_padding()
    plain, special = (model.encode("a", add_special_tokens=add).ids for add in (False, True))
    return Tokenizer(model, bos=special[0] if special[:1] != plain[:1] else None)

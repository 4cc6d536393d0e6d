"""Measure on a text how much every input channel of every linear carries: the mean of its square.

Weighted by it, the least squares fit of a block's scale and offset makes small the error of the layer's
output instead of that of its weights (irq_export.icq_calibrated), at the same bits and run-time cost. The
file is safetensors: one float32 vector ``(in,)`` for each linear, under its module name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from irq_export.hf_directory import check_tokens, load_causal_lm, read_tokenizer, torch_device
from irq_formats.atomic import atomic_file
from irq_formats.checkpoint import read_config
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError, WrongBase
from irq_formats.safetensors_io import open_safetensors
from irq_formats.safetensors_types import TensorSpec
from irq_formats.safetensors_writer import SafeTensorsWriter

__all__ = ["CalibrateReport", "Importance", "calibrate", "input_importance", "measure", "read_importance"]

#: Marks the file; the value is the version of its layout.
_KEY = "irq.importance"

#: Called with windows done, windows in all, and what is in work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Importance:
    """Mean squares of the inputs of every linear.

    Attributes:
        moments: Module name -> float32 ``(in,)``.
        tokens: Tokens they were measured on.
        text_sha256: Of the text.
    """

    moments: Mapping[str, Tensor]
    tokens: int
    text_sha256: str

    def of(self, module: str) -> Tensor:
        """Return the vector of a module.

        Raises:
            WrongBase: It was not measured.
        """
        if module not in self.moments:
            raise WrongBase(
                "the importance of this layer was not measured",
                where=module,
                hint="The file belongs to another model: measure this one (irq-export calibrate).",
            )
        return self.moments[module]

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """Return the provenance, for the record."""
        return {"importance": True, "tokens": self.tokens, "text_sha256": self.text_sha256}


@dataclass(frozen=True)
class CalibrateReport:
    """What :func:`calibrate` did.

    Attributes:
        output: The file.
        layers: Linears measured.
        tokens: Tokens read.
        perplexity: Of the model on that text, to see that it is text the model knows.
    """

    output: Path
    layers: int
    tokens: int
    perplexity: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields, for JSON."""
        return {**asdict(self), "output": str(self.output)}


@torch.inference_mode()
def input_importance(
    model: nn.Module, windows: Tensor, progress: Progress | None = None
) -> tuple[dict[str, Tensor], float]:
    """Run token windows through a causal LM and average the squares of what every linear reads.

    Args:
        model: A transformers causal LM; its head is left out.
        windows: Token ids ``(n, L)``, on the device of the model.
        progress: Called before each window.

    Returns:
        Module name -> float32 ``(in,)``, CPU; and the mean negative log-likelihood, nats a token.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).float().square().sum(dim=0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    nats = 0.0
    try:
        for done, window in enumerate(windows):
            if progress:
                progress(done, len(windows), "calibration")
            nats += float(model(input_ids=window[None], labels=window[None], use_cache=False).loss)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / windows.numel()).cpu() for name, total in sums.items()}, nats / len(windows)


def measure(
    model_dir: str | Path,
    ids: Sequence[int],
    source: str,
    *,
    windows: int = 128,
    context: int = 512,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Importance, float]:
    """Measure the importance of the inputs of every linear of a model on tokens.

    Args:
        model_dir: Hugging Face directory, not quantised.
        ids: Tokens; whole windows of them are read.
        source: SHA-256 of where the tokens come from, for the record.
        windows: Read so many at most.
        context: Tokens of a window.
        device: Where to run the model: float32 on a CPU, else bfloat16.
        progress: Called with (windows done, windows in all, what).

    Returns:
        The importance, and the perplexity of the model on these tokens.

    Raises:
        UsageError: No such model or device, or fewer tokens than a window.
        UnsupportedModel: The model is quantised already, or transformers cannot open it.
        MalformedFile: The model lacks weights, or embeddings of some of the tokens.
    """
    where = torch_device(device)
    path = Path(model_dir)
    if read_config(path).get("quantization_config") is not None:
        raise UnsupportedModel(
            "the model is quantised already", where=path, hint="Measure its floating-point weights"
        )
    count = min(windows, len(ids) // context)
    if count < 1:
        raise UsageError("the text is shorter than a window", expected=context, got=len(ids))
    tokens = torch.tensor(ids[: count * context], device=where).view(count, context)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    model = load_causal_lm(path, dtype=dtype, device=where)
    check_tokens(int(tokens.max()), model)
    moments, nats = input_importance(model, tokens, progress)
    return Importance(moments, tokens.numel(), source), float(torch.tensor(nats).exp())


def calibrate(
    model_dir: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    windows: int = 128,
    context: int = 512,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CalibrateReport:
    """Measure the importance of the inputs of every linear of a model and write it to a file.

    Args:
        model_dir: Hugging Face directory, not quantised, with ``tokenizer.json``.
        text: UTF-8 file, of the kind the model is for.
        output: The file, safetensors.
        windows: Read so many at most.
        context: Tokens of a window.
        device: Where to run the model.
        overwrite: Replace an existing file.
        progress: Called with (windows done, windows in all, what).

    Returns:
        What was measured.

    Raises:
        UsageError: No such model, text or device, or a text shorter than a window.
        UnsupportedModel: The model is quantised already, or transformers cannot open it.
        MalformedFile: The model lacks weights, or embeddings of some of the tokens; or no tokenizer.
        OutputExists: ``output`` exists and ``overwrite`` is false.
    """
    model_dir, text, output = Path(model_dir), Path(text), Path(output)
    for path in (model_dir / "config.json", text):
        if not path.is_file():
            raise UsageError("no such file", where=path)
    tokenizer = read_tokenizer(model_dir)
    raw = text.read_bytes()
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", where=text) from error
    ids = tokenizer.encode(content[: windows * context * 16], add_special_tokens=False).ids
    digest = hashlib.sha256(raw).hexdigest()
    with atomic_file(output, overwrite=overwrite) as file:
        importance, perplexity = measure(
            model_dir, ids, digest, windows=windows, context=context, device=device, progress=progress
        )
        moments = importance.moments
        specs = [TensorSpec(name, "F32", tuple(vector.shape)) for name, vector in moments.items()]
        record = {_KEY: "1", "tokens": str(importance.tokens), "text_sha256": digest}
        with SafeTensorsWriter(file, specs, record) as writer:
            for name, vector in moments.items():
                writer.write(name, vector.numpy())
    return CalibrateReport(output, len(moments), importance.tokens, perplexity)


def read_importance(path: str | Path) -> Importance:
    """Read a file of :func:`calibrate`.

    Raises:
        UsageError: There is no such file.
        MalformedFile: It is another file.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError("no such file", where=path, hint="Write it with irq-export calibrate")
    file = open_safetensors(path)
    moments = {name: torch.from_numpy(file.read_f32(name).copy()) for name in file.tensors}
    if file.metadata.get(_KEY) != "1" or any(v.ndim != 1 for v in moments.values()):
        raise MalformedFile("not a file of irq-export calibrate", where=path, expected=f"{_KEY} 1")
    tokens = file.metadata.get("tokens", "")
    if not tokens.isdecimal():
        raise MalformedFile("number of tokens", where=path, got=tokens)
    return Importance(moments, int(tokens), file.metadata.get("text_sha256", ""))

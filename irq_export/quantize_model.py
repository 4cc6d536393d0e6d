"""Quantise a Hugging Face model directory to a checkpoint (spec/irq-checkpoint.md), tensor by tensor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from irq_export.calibrate import Importance, read_importance
from irq_export.hf_directory import torch_device
from irq_export.icq import SearchConfig, check_settings, quantize_rows
from irq_export.icq_calibrated import quantize_calibrated
from irq_export.quantize_plan import INT8, QuantizePlan, plan_quantization
from irq_formats.blocks import BlockSpec, BlockTensor, encode_int8
from irq_formats.checkpoint_writer import checkpoint_writer
from irq_formats.companions import companion_files
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.preflight import check_dir_target, check_room
from irq_formats.safetensors_io import DTYPES, SafeTensors, TensorRef

__all__ = ["QuantizeReport", "TensorReport", "quantize"]

#: Called with tensors done, tensors in all, and the name of the one in work.
Progress = Callable[[int, int, str], None]

_CHUNK_BYTES = 32 << 20
_MANIFEST_SLACK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorReport:
    """What quantisation did to one matrix.

    Attributes:
        name: Hugging Face module name.
        shape: ``(out, in)``.
        codebook: Of its codes.
        entropy_before: Mean entropy of a block's codes without search, bits; None for int8.
        entropy_after: The same for the stored codes.
        rel_mse: Squared error over squared norm.
        nbytes: Stored bytes.
    """

    name: str
    shape: tuple[int, int]
    codebook: str
    entropy_before: float | None
    entropy_after: float | None
    rel_mse: float
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / prod(self.shape)


@dataclass(frozen=True)
class QuantizeReport:
    """The result of :func:`quantize`.

    Attributes:
        output: The checkpoint.
        base_hash: Its base hash.
        tensors: Every quantised matrix, in the order of the model.
        skipped: Tensors kept in floating point or left out, with the reason.
        output_bytes: Bytes of the safetensors files.
        seconds: Wall time.
    """

    output: Path
    base_hash: str
    tensors: tuple[TensorReport, ...]
    skipped: dict[str, str]
    output_bytes: int
    seconds: float

    def bits_per_weight(self, codebook: str | None = None) -> float:
        """Stored bits per weight of all quantised matrices, or of those of one codebook; 0 without any."""
        chosen = [tensor for tensor in self.tensors if codebook in (None, tensor.codebook)]
        weights = sum(prod(tensor.shape) for tensor in chosen)
        return 8 * sum(tensor.nbytes for tensor in chosen) / weights if weights else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the report for ``--json``."""
        return {
            **asdict(self),
            "output": str(self.output),
            "bits_per_weight": self.bits_per_weight(),
            "tensors": [{**asdict(t), "bits_per_weight": t.bits_per_weight} for t in self.tensors],
        }


def quantize(
    model_dir: str | Path,
    output_dir: str | Path,
    *,
    codebook: str = "nf4",
    block_size: int = 64,
    icq: bool | None = None,
    tie: str = "mse",
    refine: str = "ls",
    objective: str = "entropy",
    numerics: str = "exact",
    scale: str = "dq8",
    tau: str = "dq8",
    scale_rounding: str = "fp16",
    embedding: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    importance: str | Path | Importance | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantise the linear layers of a Llama-family model; everything else keeps its own dtype.

    Args:
        model_dir: Hugging Face directory with safetensors weights.
        output_dir: The checkpoint, a new directory.
        codebook: ``nf4 nf3 nf2 int4 int3 int2``.
        block_size: Weights per block, 64 or 32. A matrix whose input is no multiple stays as it is.
        icq: Search an offset per block that maximises the entropy of the codes; otherwise scales start from
            the absolute maximum. None: for every codebook but nf4, where it does not pay (docs/paper.md),
            and for nf4 where ``objective`` or ``tie`` is not the default.
        tie: Among equally good offsets ``mse`` takes the least squared error, ``first`` the released choice.
        refine: ``ls`` refits scale and offset by least squares after the search; ``none`` is the paper.
        objective: ``entropy``, or ``mse`` to search for the least squared error instead.
        numerics: ``exact``, or ``reference`` for the released code's arithmetic bit for bit.
        scale: Storage of scales: ``dq8 f16 f32``.
        tau: Storage of offsets: ``dq8 f16 f32 none``.
        scale_rounding: ``fp16``, or ``none`` to keep dq8 scales in float32.
        embedding: ``int8`` quantises the embedding and an untied head to Q8_0.
        include: Shell patterns of module names; where given, only linears that match are quantised.
        exclude: Shell patterns of linears that are not quantised.
        importance: Of ``irq_export.calibrate``, or its file: scale and offset are fitted to what the inputs
            of each linear carry; nothing is searched (``icq``, ``tie``, ``refine``, ``objective`` stay
            default).
        device: Where to compute: ``cpu``, ``cuda``, ``cuda:1``. What is written does not depend on it, but
            for a fit to ``importance``: its float32 sums depend on the order of additions, and at most one
            code in a thousand on them (docs/train.md).
        overwrite: Replace an existing checkpoint.
        progress: Called with (tensors done, tensors in all, name).

    Returns:
        What was done to every tensor.

    Raises:
        UsageError: Contradictory settings, no model, or a pattern that matches nothing.
        UnsupportedModel: A model this version cannot quantise, or weights that are not finite.
        MalformedFile: The directory breaks its format.
        OutputExists: ``output_dir`` exists and ``overwrite`` is false.
        PreflightRefused: Too little disk space.
    """
    started = time.monotonic()
    spec = BlockSpec(codebook, block_size, scale, tau, scale_rounding)
    search = SearchConfig.for_codebook(
        codebook, icq=icq, objective=objective, tie=tie, refine=refine, numerics=numerics
    )
    check_settings(spec, search)
    calibration = None
    if importance is not None:
        untouched = icq is None and search == SearchConfig.for_codebook(codebook)
        calibration = _calibration(importance, spec, untouched)
    where = torch_device(device)
    plan = plan_quantization(model_dir, spec, embedding=embedding, include=include, exclude=exclude)
    output = Path(output_dir)
    _preflight(plan, output, overwrite)
    reports: list[TensorReport] = []
    with checkpoint_writer(output, overwrite=overwrite) as writer:
        for done, tensor in enumerate(plan.tensors):
            if progress:
                progress(done, len(plan.tensors), tensor.module)
            if tensor.spec is None:
                writer.add_plain(tensor.ref, partial(_read_finite, plan.source, tensor.ref))
                continue
            how = search if calibration is None else calibration
            block, report = _quantize_one(tensor.module, tensor.spec, tensor.ref, plan.source, how, where)
            writer.add_block(tensor.module, block)
            reports.append(report)
        for companion in companion_files(plan.path):
            writer.copy_file(plan.path, companion)
        record = search.to_dict() if calibration is None else calibration.to_dict()
        quantization = writer.finish(plan.config, spec=spec, skipped=plan.skipped, search=record)
    return QuantizeReport(
        output=output,
        base_hash=quantization.base_hash,
        tensors=tuple(reports),
        skipped=plan.skipped,
        output_bytes=sum(path.stat().st_size for path in output.glob("*.safetensors")),
        seconds=time.monotonic() - started,
    )


def _calibration(given: str | Path | Importance, spec: BlockSpec, untouched: bool) -> Importance:
    """Return the importance of the inputs, which leaves nothing to search: its settings must be untouched."""
    if not untouched:
        raise UsageError(
            "with importance nothing is searched",
            expected="icq, objective, tie, refine and numerics as they are by default",
            hint="Leave them out, or quantise without --importance",
        )
    if spec.tau == "none":
        raise UsageError("importance fits an offset, and tau none stores none", hint="Leave tau out")
    return given if isinstance(given, Importance) else read_importance(given)


def _preflight(plan: QuantizePlan, output: Path, overwrite: bool) -> None:
    """Refuse what would fail after minutes of work."""
    if output.resolve() == plan.path.resolve():
        raise UsageError("output and model are the same directory", where=output)
    check_dir_target(output, overwrite=overwrite)
    check_room(output, plan.output_bytes + _MANIFEST_SLACK_BYTES)


def _quantize_one(
    name: str,
    spec: BlockSpec,
    ref: TensorRef,
    source: SafeTensors,
    how: SearchConfig | Importance,
    device: torch.device,
) -> tuple[BlockTensor, TensorReport]:
    """Quantise the matrix of module ``name``."""
    before: float | None = None
    after: float | None = None
    if spec == INT8:
        block, rel_mse = _quantize_int8(source, ref)
    else:
        shape = (ref.shape[0], ref.shape[1])

        def read(rows: slice) -> torch.Tensor:
            return torch.from_numpy(_read_rows(source, ref, rows)).to(device)

        if isinstance(how, Importance):
            moments = how.of(name).to(device)
            result = quantize_calibrated(read(slice(0, shape[0])), spec, moments, where=ref.name)
        else:
            result = quantize_rows(read, shape, spec, how, where=ref.name)
        block, rel_mse = result.block, result.rel_mse
        before, after = result.entropy_before, result.entropy_after
    return block, TensorReport(name, block.shape, spec.codebook, before, after, rel_mse, block.nbytes)


def _quantize_int8(source: SafeTensors, ref: TensorRef) -> tuple[BlockTensor, float]:
    """Quantise to Q8_0, a few rows at a time; return the tensor and its relative squared error."""
    parts: list[BlockTensor] = []
    error, norm = 0.0, 0.0
    for rows in _row_chunks(ref):
        weight = _read_rows(source, ref, rows)
        parts.append(encode_int8(weight))
        error += float(np.square(weight - parts[-1].dequantize(), dtype=np.float64).sum())
        norm += float(np.square(weight, dtype=np.float64).sum())
    joined = {name: np.concatenate([part.parts[name] for part in parts]) for name in parts[0].parts}
    return BlockTensor(INT8, (ref.shape[0], ref.shape[1]), joined), error / norm if norm else 0.0


def _row_chunks(ref: TensorRef) -> Iterator[slice]:
    """Slices of rows (elements of a vector) of at most ``_CHUNK_BYTES``."""
    step = max(1, _CHUNK_BYTES * ref.shape[0] // max(1, ref.nbytes))
    return (slice(start, min(start + step, ref.shape[0])) for start in range(0, ref.shape[0], step))


def _read_rows(source: SafeTensors, ref: TensorRef, rows: slice) -> NDArray[np.float32]:
    """Read some rows as float32, exactly.

    Raises:
        UnsupportedModel: A value is not finite.
    """
    shape = (rows.stop - rows.start, *ref.shape[1:])
    row_bytes = ref.nbytes // ref.shape[0]
    raw = source.files[ref.shard].read_array(ref.offset + rows.start * row_bytes, DTYPES[ref.dtype], shape)
    if ref.dtype == "BF16":
        values = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = raw.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise UnsupportedModel(
            "values that are not finite", where=ref.name, got=f"rows {rows.start} to {rows.stop}"
        )
    return values


def _read_finite(source: SafeTensors, ref: TensorRef) -> NDArray[np.generic]:
    """Read a whole tensor in its own dtype (BF16 as uint16), after checking that all of it is finite."""
    for rows in _row_chunks(ref):
        _read_rows(source, ref, rows)
    return source.read(ref.name)

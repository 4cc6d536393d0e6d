"""Reading an export back: is what lies on the disk the checkpoint, bit for bit?

Files are opened with the strict reader and compared with what is decoded from the checkpoint, not with
what the writer meant to write: codes, scales and offsets for the irq profile; for a stock pair the codes
that its blocks hold and the offsets in its adapter, and where blocks are exact the decoded weights too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irq_export.export.gguf.adapters import lora_pair
from irq_export.export.gguf.plan import Plan, PlannedFile
from irq_export.export.gguf.tensors import Array, is_interleaved, row_order
from irq_formats.adapter import Adapter, delta_weight
from irq_formats.checkpoint import Checkpoint
from irq_formats.errors import ParityFailed, UnsupportedModel
from irq_formats.gguf import GgmlType, GgufFile, open_gguf
from irq_formats.gguf.irq_check import check_irq
from irq_formats.gguf.irq_payload import ARCHITECTURE, check_header, read_adapter, read_blocks
from irq_formats.gguf.model_keys import IRQ_PREFIX, read_model
from irq_formats.gguf.pair import ADAPTER_NAME, BASE_NAME
from irq_formats.gguf.repack import repack, uninterleave_heads, unpack_codes
from irq_formats.names import hf_to_gguf, tensor_shapes

__all__ = ["ReadBack", "compare_files", "is_same_model", "read_back"]

#: Half a unit in the last place, relative to the value, of every merge type; and the smallest step.
_HALF_ULP = {
    GgmlType.F32: (2.0**-24, 2.0**-149),
    GgmlType.F16: (2.0**-11, 2.0**-24),
    GgmlType.BF16: (2.0**-8, 2.0**-133),
}

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class ReadBack:
    """What was compared.

    Attributes:
        exact: Tensors found bit for bit what the checkpoint holds.
        rounded: Matrices whose weights the file holds rounded (nf codebooks in Q8_0, merges).
        weight_nmse: Of these: squared error over sum of squares; 0 if there are none.
    """

    exact: int
    rounded: int
    weight_nmse: float


class _Comparison:
    """Collects what was compared; the first difference raises."""

    def __init__(self) -> None:
        self.exact = self.rounded = 0
        self.error = self.power = 0.0

    def same(self, got: Array, expected: Array, where: str) -> None:
        """Compare bits."""
        if got.dtype != expected.dtype or got.shape != expected.shape or not _same_bytes(got, expected):
            raise ParityFailed("the written tensor differs from the checkpoint", where=where)
        self.exact += 1

    def equal(self, got: Array, expected: Array, where: str) -> None:
        """Compare numbers, so that -0 equals 0."""
        if not np.array_equal(got, expected):
            raise ParityFailed("the written weights differ from the checkpoint", where=where)
        self.exact += 1

    def measure(self, got: Array, expected: Array) -> None:
        """Add to the error of rounded weights."""
        self.rounded += 1
        self.error += float(np.square(got.astype(np.float64) - expected.astype(np.float64)).sum())
        self.power += float(np.square(expected.astype(np.float64)).sum())

    def result(self) -> ReadBack:
        return ReadBack(self.exact, self.rounded, self.error / self.power if self.power else 0.0)


def _same_bytes(a: Array, b: Array) -> bool:
    """Compare the bytes of two arrays of one shape and dtype, without copies of them."""
    left, right = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    chunks = (slice(start, start + _CHUNK_BYTES) for start in range(0, left.size, _CHUNK_BYTES))
    return all(np.array_equal(left[chunk], right[chunk]) for chunk in chunks)


def read_back(plan: Plan, checkpoint: Checkpoint, adapter: Adapter) -> ReadBack:
    """Compare the written files with the checkpoint.

    Args:
        plan: What was written; its paths.
        checkpoint: The source.
        adapter: The adapter as exported (folded if it was folded).

    Raises:
        ParityFailed: Anything differs.
        MalformedFile: A file breaks its specification.
    """
    files = {file.name: open_gguf(plan.path(file)) for file in plan.files}
    for file in plan.files:
        _same_metadata(files[file.name], file)
    if plan.profile == "stock":
        model, extra = files[BASE_NAME], files.get(ADAPTER_NAME)
    else:  # a separate adapter is planned before the model
        *separate, model = files.values()
        extra = separate[0] if separate else None
    return compare_files(plan.profile, model, extra, checkpoint, adapter)


def compare_files(
    profile: str, model: GgufFile, extra: GgufFile | None, checkpoint: Checkpoint, adapter: Adapter
) -> ReadBack:
    """Compare every array of an export with the checkpoint.

    Args:
        profile: ``irq``, ``stock`` or ``merge``.
        model: The model file; of a pair, the base.
        extra: The adapter file beside it, if there is one.
        checkpoint: The source.
        adapter: The adapter as exported (folded if it was folded).

    Raises:
        ParityFailed: Anything differs, or is missing.
        MalformedFile: A file breaks its specification.
    """
    if not is_same_model(model, checkpoint):
        raise ParityFailed("the file is of another model", where=model.path)
    comparison = _Comparison()
    if profile == "irq":
        _compare_irq(model, extra, checkpoint, adapter, comparison)
    elif profile == "stock":
        _compare_pair(model, extra, checkpoint, adapter, comparison)
    else:
        _compare_merged(model, checkpoint, adapter, comparison)
    return comparison.result()


def is_same_model(gguf: GgufFile, checkpoint: Checkpoint) -> bool:
    """Whether a model file has tensors of the names and shapes of the checkpoint's model."""
    architecture = str(gguf.metadata.get("general.architecture"))
    prefix = IRQ_PREFIX if architecture == ARCHITECTURE else architecture
    config = read_model(gguf.metadata, prefix, gguf.tensors)
    return tensor_shapes(config) == tensor_shapes(checkpoint.model)


def _same_metadata(gguf: GgufFile, planned: PlannedFile) -> None:
    def plain(values: object) -> object:
        return values.tolist() if isinstance(values, np.ndarray) else values

    written = {key: (value.type, value.element, plain(value.value)) for key, value in gguf.values.items()}
    expected = {key: (v.type, v.element, plain(v.value)) for key, v in planned.metadata.items()}
    if written != expected:
        keys = [key for key in expected if written.get(key) != expected[key]]
        raise ParityFailed("the written metadata differ", where=gguf.path, got=keys[:5])


def _compare_irq(
    model: GgufFile,
    separate: GgufFile | None,
    checkpoint: Checkpoint,
    adapter: Adapter,
    comparison: _Comparison,
) -> None:
    check_irq(model)
    blocks = read_blocks(model)
    modules = {hf_to_gguf(module): module for module in checkpoint.blocks}
    if set(blocks) != set(modules):
        raise ParityFailed("the file has other quantised matrices", where=model.path)
    for name, load in blocks.items():
        expected = checkpoint.block_tensor(modules[name])
        for part, array in load().parts.items():
            comparison.same(array, expected.parts[part], f"{name}.{part}")
    for hf_name in checkpoint.plain:
        name = hf_to_gguf(hf_name)
        comparison.same(model.read(name), checkpoint.plain_raw(hf_name), name)
    source = separate or model
    if separate is not None:
        check_header(separate, "adapter")
    layers = read_adapter(source)
    if set(layers) != {hf_to_gguf(module) for module in adapter.layers}:
        raise ParityFailed("the written adapter has other layers", where=source.path)
    for module, layer in adapter.layers.items():
        got, name = layers[hf_to_gguf(module)], hf_to_gguf(module)
        comparison.same(got.lora_a, np.asarray(layer.lora_a, np.float32), f"{name}.lora_a")
        comparison.same(got.lora_b, np.asarray(layer.lora_b, np.float32), f"{name}.lora_b")
        scalars = (got.beta1, got.beta2, got.scaling), (layer.beta1, layer.beta2, layer.scaling)
        comparison.equal(np.array(scalars[0]), np.array(scalars[1]), name)


def _compare_pair(
    base: GgufFile,
    extra: GgufFile | None,
    checkpoint: Checkpoint,
    adapter: Adapter,
    comparison: _Comparison,
) -> None:
    _compare_floats(base, checkpoint, comparison)
    for module in dict.fromkeys([*checkpoint.blocks, *adapter.layers]):
        name = f"{hf_to_gguf(module)}.weight"
        tau = None
        if module in checkpoint.blocks:
            tau = _compare_blocks(base, checkpoint, module, comparison)
        block_size = checkpoint.blocks[module].spec.block_size if module in checkpoint.blocks else 0
        layer = adapter.layers.get(module)
        if tau is None and layer is None:
            continue
        if extra is None:
            raise ParityFailed("the adapter file is missing", where=base.path)
        if f"{name}.lora_a" not in extra.tensors or f"{name}.lora_b" not in extra.tensors:
            raise ParityFailed("the adapter lacks a matrix", where=f"{extra.path}: {name}")
        a, b = lora_pair(layer, tau, block_size)
        comparison.same(extra.read(f"{name}.lora_a"), a, f"{name}.lora_a")
        b = np.asarray(row_order(checkpoint.model, name)(b))
        comparison.same(extra.read(f"{name}.lora_b"), b, f"{name}.lora_b")


def _compare_blocks(
    base: GgufFile, checkpoint: Checkpoint, module: str, comparison: _Comparison
) -> NDArray[np.float32] | None:
    """Compare one matrix of the base; return the offsets that its adapter must hold."""
    name = f"{hf_to_gguf(module)}.weight"
    tensor, kind = checkpoint.block_tensor(module), base.tensors[name].type
    weight = _hf_rows(base.read_f32(name), checkpoint, name)
    if kind is GgmlType.BF16:
        _compare_rounded(weight, tensor.dequantize().astype(np.float64), kind, name, comparison)
        return None
    try:
        codes = unpack_codes(
            _hf_rows(base.read(name), checkpoint, name).view(np.uint8), tensor.spec.codebook, kind
        )
    except UnsupportedModel as error:
        raise ParityFailed("the file holds other codes", where=name, got=error) from error
    comparison.same(codes, tensor.codes(), name)
    zero = np.zeros_like(tensor.tau())
    scaled = tensor.spec.codec.decode(tensor.codes(), tensor.scale(), zero)
    if tensor.spec.codebook.startswith("nf"):
        if not np.array_equal(_hf_rows(base.read(name), checkpoint, name), repack(tensor, kind)):
            raise ParityFailed("the steps are not those nearest to the levels", where=name)
        comparison.measure(weight, scaled)
    else:
        comparison.equal(weight, scaled, name)
    return None if tensor.spec.tau == "none" else tensor.tau()


def _compare_merged(
    gguf: GgufFile, checkpoint: Checkpoint, adapter: Adapter, comparison: _Comparison
) -> None:
    _compare_floats(gguf, checkpoint, comparison, skip=set(adapter.layers))
    for module in dict.fromkeys([*checkpoint.blocks, *adapter.layers]):
        name = f"{hf_to_gguf(module)}.weight"
        if module in checkpoint.blocks:
            exact = checkpoint.block_tensor(module).dequantize().astype(np.float64)
        else:
            exact = checkpoint.plain_f32(f"{module}.weight").astype(np.float64)
        if module in adapter.layers:
            exact += delta_weight(adapter.layers[module])
        weight, kind = _hf_rows(gguf.read_f32(name), checkpoint, name), gguf.tensors[name].type
        if kind is GgmlType.Q8_0:
            comparison.equal(weight, exact, name)
        else:
            _compare_rounded(weight, exact, kind, name, comparison)


def _compare_rounded(
    weight: Array,
    exact: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    kind: GgmlType,
    name: str,
    comparison: _Comparison,
) -> None:
    """Check that weights are the exact ones rounded once (up to the order of float64 sums)."""
    if kind not in _HALF_ULP:
        raise ParityFailed(
            "the file holds these weights in another type",
            where=name,
            expected=" | ".join(known.name for known in _HALF_ULP),
            got=kind.name,
        )
    relative, smallest = _HALF_ULP[kind]
    bound = relative * np.abs(exact) * (1 + 1e-9) + smallest + 1e-12 * np.abs(exact).max(initial=0)
    if not (np.abs(weight.astype(np.float64) - exact) <= bound).all():  # NaN is no weight
        raise ParityFailed(f"a merged weight is not the nearest {kind.name}", where=name)
    comparison.measure(weight, exact)


def _compare_floats(
    gguf: GgufFile, checkpoint: Checkpoint, comparison: _Comparison, skip: set[str] | None = None
) -> None:
    for hf_name in checkpoint.plain:
        if hf_name.removesuffix(".weight") in (skip or ()):
            continue
        name = hf_to_gguf(hf_name)
        comparison.same(_hf_rows(gguf.read_f32(name), checkpoint, name), checkpoint.plain_f32(hf_name), name)


def _hf_rows(array: Array, checkpoint: Checkpoint, name: str) -> Array:
    """Put rows of q and k back into Hugging Face's order."""
    if is_interleaved(checkpoint.model, name):
        return uninterleave_heads(array, checkpoint.model.head_dim)
    return array

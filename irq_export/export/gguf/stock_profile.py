"""Profile stock: a pair of files that unmodified llama.cpp runs (spec/irq-gguf.md, section 5).

``base.gguf`` holds the codes in ggml's own types. ``adapter.gguf`` holds, as one LoRA at scale 1, the
adapter and behind it the block offsets tau as extra rank: without it the base is not the model. What
our runtimes need to find the codes again travels in ``irq.stock.*`` keys, which llama.cpp ignores.
"""

from __future__ import annotations

import numpy as np

from irq_export.export.gguf.adapters import NO_ADAPTER, lora_pair
from irq_export.export.gguf.merged import merged_matrix
from irq_export.export.gguf.plan import PlannedFile
from irq_export.export.gguf.tensors import (
    Array,
    ExportTensor,
    adapter_origins,
    block_origins,
    float_tensor,
    read_tau,
    row_order,
)
from irq_formats.adapter import Adapter
from irq_formats.checkpoint import Checkpoint, hf_tensor_shapes
from irq_formats.errors import UnsupportedModel
from irq_formats.gguf import BOOL, F32, STR, U32, GgmlType, GgufValue, TensorSource
from irq_formats.gguf.model_keys import model_metadata
from irq_formats.gguf.pair import ADAPTER_NAME, BASE_NAME
from irq_formats.gguf.repack import NF_TABLES, carrier, repack
from irq_formats.model import ModelConfig
from irq_formats.names import hf_to_gguf, linear_names
from irq_formats.rope import rope_factors

__all__ = [
    "carried_type",
    "rope_tensors",
    "stock_files",
    "stock_header",
]


#: Version of the ``irq.stock.*`` keys.
STOCK_VERSION = 1
_WORK_BYTES = 96 << 20  # temporaries of repack


def carried_type(checkpoint: Checkpoint, module: str, *, int2_type: str, nf_type: str) -> GgmlType:
    """Return the type of a quantised matrix in ``base.gguf``.

    Raises:
        UnsupportedModel: The matrix has offsets and is not a linear layer, or q2_0 does not fit it.
    """
    spec = checkpoint.blocks[module].spec
    if spec.tau != "none" and module not in linear_names(checkpoint.model):
        raise UnsupportedModel(
            "block offsets of an embedding or head have no place in a stock file",
            where=module,
            expected="int8, or floating point",
            got=spec.codebook,
            hint="Quantise it with --embedding int8, or export --profile irq",
        )
    if spec.codebook in NF_TABLES and nf_type == "bf16":
        return GgmlType.BF16
    if spec.codebook == "int2" and int2_type == "q2_0" and spec.block_size != GgmlType.Q2_0.block_size:
        raise UnsupportedModel(
            "Q2_0 has blocks of 64", where=module, got=spec.block_size, hint="Use --int2-type q4_0"
        )
    return carrier(spec.codebook, spec.block_size, q2_0=int2_type != "q4_0")


def stock_files(
    checkpoint: Checkpoint,
    adapter: Adapter,
    tokenizer: dict[str, GgufValue],
    *,
    int2_type: str,
    nf_type: str,
) -> tuple[PlannedFile, ...]:
    """Return ``base.gguf`` and, unless there is nothing to put into it, ``adapter.gguf``."""
    kinds = {
        module: carried_type(checkpoint, module, int2_type=int2_type, nf_type=nf_type)
        for module in checkpoint.blocks
    }
    tensors = rope_tensors(checkpoint.model)
    pairs: list[ExportTensor] = []
    ranks: dict[str, tuple[int, int]] = {}
    for name in hf_tensor_shapes(checkpoint.model):
        module = name.removesuffix(".weight")
        if module in checkpoint.blocks:
            tensors.append(_base_matrix(checkpoint, module, kinds[module]))
        else:
            kind = GgmlType.F32 if len(checkpoint.plain[name].shape) == 1 else None
            order = row_order(checkpoint.model, hf_to_gguf(name))
            tensors.append(float_tensor(checkpoint, name, kind=kind, order=order))
        tau = module in kinds and kinds[module] is not GgmlType.BF16
        found, rank = _adapter_pair(checkpoint, adapter, module, tau=tau)
        if found:
            pairs += found
            ranks[hf_to_gguf(module)] = rank
    base = PlannedFile(BASE_NAME, _base_metadata(checkpoint, ranks) | tokenizer, tuple(tensors))
    if not pairs:
        return (base,)
    return base, PlannedFile(ADAPTER_NAME, _adapter_metadata(checkpoint, ranks), tuple(pairs))


def stock_header(config: ModelConfig) -> dict[str, GgufValue]:
    """Return the keys every stock model starts with."""
    return {
        "general.architecture": STR(config.architecture),
        "general.type": STR("model"),
        "general.quantization_version": U32(2),
        **model_metadata(config, config.architecture),
    }


def rope_tensors(config: ModelConfig) -> list[ExportTensor]:
    """Return ``rope_freqs.weight`` where the model scales its rotary frequencies like Llama 3.

    Raises:
        UnsupportedModel: It does so, and is of an architecture for which llama.cpp has no such tensor.
    """
    factors = rope_factors(config)
    if factors is None:
        return []
    if config.architecture != "llama":
        raise UnsupportedModel(
            "llama.cpp scales rotary frequencies like Llama 3 in llama models only",
            where="config.json: rope_scaling",
            expected="none or linear",
            got=f"llama3, in {config.architecture}",
            hint="Use --profile irq",
        )
    source = TensorSource("rope_freqs.weight", factors.shape, GgmlType.F32, lambda: factors)
    return [ExportTensor(source, (), factors.nbytes)]


def _base_metadata(checkpoint: Checkpoint, ranks: dict[str, tuple[int, int]]) -> dict[str, GgufValue]:
    specs = {hf_to_gguf(module): block.spec for module, block in checkpoint.blocks.items()}
    return stock_header(checkpoint.model) | {
        "irq.stock.version": U32(STOCK_VERSION),
        "irq.base_hash": STR(checkpoint.base_hash),
        "irq.stock.name": STR.array(list(specs)),
        "irq.stock.codebook": STR.array([spec.codebook for spec in specs.values()]),
        "irq.stock.block_size": U32.array([spec.block_size for spec in specs.values()]),
        "irq.stock.tau": BOOL.array([name in ranks and ranks[name][1] > 0 for name in specs]),
    }


def _adapter_metadata(checkpoint: Checkpoint, ranks: dict[str, tuple[int, int]]) -> dict[str, GgufValue]:
    """Return the keys of llama.cpp's LoRA; alpha 0 means scale 1 (``llama-adapter.h``)."""
    return {
        "general.architecture": STR(checkpoint.model.architecture),
        "general.type": STR("adapter"),
        "adapter.type": STR("lora"),
        "adapter.lora.alpha": F32(0.0),
        "irq.stock.version": U32(STOCK_VERSION),
        "irq.adapter.base_hash": STR(checkpoint.base_hash),
        "irq.stock.name": STR.array(list(ranks)),
        "irq.stock.lora_rank": U32.array([rank for rank, _ in ranks.values()]),
        "irq.stock.tau_rank": U32.array([rank for _, rank in ranks.values()]),
    }


def _base_matrix(checkpoint: Checkpoint, module: str, kind: GgmlType) -> ExportTensor:
    """Return codes and scales of a matrix in a stock type; for BF16 the decoded weights."""
    if kind is GgmlType.BF16:
        return merged_matrix(checkpoint, NO_ADAPTER, module, kind)
    name = f"{hf_to_gguf(module)}.weight"
    shape = checkpoint.blocks[module].shape
    order = row_order(checkpoint.model, name)

    def load() -> Array:
        return order(repack(checkpoint.block_tensor(module), kind))

    nbytes = kind.nbytes(shape)
    work_bytes = 2 * shape[0] * shape[1] + 2 * nbytes + _WORK_BYTES
    origins = block_origins(checkpoint, module, tau=False)
    return ExportTensor(TensorSource(name, shape, kind, load), origins, work_bytes, nbytes)


def _adapter_pair(
    checkpoint: Checkpoint, adapter: Adapter, module: str, *, tau: bool
) -> tuple[list[ExportTensor], tuple[int, int]]:
    """Return ``lora_a`` and ``lora_b`` of a matrix, if it needs them, and the ranks of adapter and tau."""
    layer = adapter.layers.get(module)
    block = checkpoint.blocks.get(module)
    blocks = block.shape[1] // block.spec.block_size if tau and block and block.spec.tau != "none" else 0
    if layer is None and not blocks:
        return [], (0, 0)
    out, width = layer.shape if layer else block.shape if block else (0, 0)
    rank = (layer.rank if layer else 0, blocks)
    block_size = width // blocks if blocks else width
    name = f"{hf_to_gguf(module)}.weight"
    order = row_order(checkpoint.model, name)

    def load_a() -> Array:  # does not depend on the values of tau
        return lora_pair(layer, np.zeros((out, blocks), np.float32) if blocks else None, block_size)[0]

    def load_b() -> Array:
        return order(lora_pair(layer, read_tau(checkpoint, module) if blocks else None, block_size)[1])

    f32 = GgmlType.F32
    a = TensorSource(f"{name}.lora_a", (sum(rank), width), f32, load_a)
    b = TensorSource(f"{name}.lora_b", (out, sum(rank)), f32, load_b)
    work_bytes = 3 * (f32.nbytes(a.shape) + f32.nbytes(b.shape))
    lora = adapter_origins(adapter, module)
    offsets = block_origins(checkpoint, module, tau=True) if blocks else ()
    return [
        ExportTensor(a, lora[:1], work_bytes, 4 * blocks * width),
        ExportTensor(b, lora[1:] + offsets, work_bytes, 4 * blocks * out),
    ], rank

"""How much memory a run needs, from the headers of its model alone.

Exact for what is stored (base, adapter, gradients, optimizer); an upper estimate for activations: the hidden
states that checkpointing keeps at every layer, the working set of one layer, and the logits in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from irq_export.train.config import TrainConfig
from irq_export.train.run_dir import is_quantized, quantize_settings
from irq_formats.blocks import BlockSpec, part_layout
from irq_formats.checkpoint import open_checkpoint
from irq_formats.model import ModelConfig
from irq_formats.names import gguf_to_hf, linear_names, tensor_shapes

__all__ = ["MemoryEstimate", "estimate_memory"]

#: Copies of the logits that live at once: in the dtype of the model, in float32, and the gradient.
_LOGITS = 3


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device while training.

    Attributes:
        base: The model, quantised matrices as stored.
        adapter: Adapter, gradients and Adam's moments, float32 each.
        activations: Upper estimate for one micro-batch of rows of full length.
        trainable: Parameters of the adapter.
        disk: Bytes of the checkpoint that is written.
        measuring: The model in floating point, on which importance is measured before the training.
    """

    base: int
    adapter: int
    activations: int
    trainable: int
    disk: int
    measuring: int

    @property
    def total(self) -> int:
        """The most at any time."""
        return max(self.base + self.adapter + self.activations, self.measuring)

    def to_dict(self) -> dict[str, int]:
        """Return the estimate for ``--json``."""
        return {**asdict(self), "total": self.total}


def estimate_memory(config: TrainConfig, *, bytes_per_value: int, devices: int = 1) -> MemoryEstimate:
    """Estimate a run before anything is loaded.

    Args:
        config: The run.
        bytes_per_value: Of activations and of tensors that are not quantised: 2 for bf16, 4 for fp32.
        devices: How many share a batch.

    Raises:
        UsageError: There is no model.
        UnsupportedModel: It cannot be trained.
        MalformedFile: It contradicts itself.
    """
    model, base, disk = _base(config, bytes_per_value)
    shapes = {gguf_to_hf(name): shape for name, shape in tensor_shapes(model).items()}
    adapted = [
        name
        for name in linear_names(model)
        if not config.targets or name.rpartition(".")[2] in config.targets
    ]
    trainable = sum(config.rank * sum(shapes[f"{name}.weight"]) + 2 * config.iec for name in adapted)
    rows = config.micro_batch or -(-config.batch_size // devices)
    tokens = rows * config.max_length
    layer = tokens * (6 * model.hidden_size + 4 * model.intermediate_size) * bytes_per_value
    kept = tokens * model.hidden_size * bytes_per_value * model.num_hidden_layers
    if not config.gradient_checkpointing:
        kept = layer * model.num_hidden_layers
    largest = max(prod(shape) for shape in shapes.values()) * bytes_per_value
    logits = tokens * model.vocab_size * 4 * _LOGITS
    activations = kept + layer + largest + logits
    measured = config.importance_source == "data" and not is_quantized(Path(config.model))
    measuring = bytes_per_value * sum(map(prod, shapes.values())) if measured else 0
    return MemoryEstimate(base, 16 * trainable, activations, trainable, disk, measuring)


def _base(config: TrainConfig, bytes_per_value: int) -> tuple[ModelConfig, int, int]:
    """Return the model, its bytes in memory, and its bytes on disk."""
    path = Path(config.model)
    if is_quantized(path):
        checkpoint = open_checkpoint(path, verify=False)
        blocks = sum(_block_bytes(entry.spec, entry.shape) for entry in checkpoint.blocks.values())
        plain = sum(prod(ref.shape) for ref in checkpoint.plain.values())
        disk = blocks + sum(ref.nbytes for ref in checkpoint.plain.values())
        return checkpoint.model, blocks + plain * bytes_per_value, disk
    from irq_export.quantize_plan import plan_quantization

    settings = quantize_settings(config)
    keys = ("codebook", "tau", "scale_rounding")
    spec = BlockSpec(**{key: settings[key] for key in keys if key in settings})
    plan = plan_quantization(path, spec, embedding=settings.get("embedding"))
    base = sum(
        prod(tensor.ref.shape) * bytes_per_value if tensor.spec is None else tensor.nbytes
        for tensor in plan.tensors
    )
    return ModelConfig.from_hf(plan.config), base, plan.output_bytes


def _block_bytes(spec: BlockSpec, shape: tuple[int, int]) -> int:
    return sum(dtype.itemsize * prod(part) for dtype, part in part_layout(spec, shape).values())

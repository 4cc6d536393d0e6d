"""How much memory a run needs, from the headers of its model alone.

Exact for what is stored (base, adapter, gradients, optimizer); an upper estimate for activations: the hidden
states that checkpointing keeps at every layer, the working set of one layer, and the logits in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from irq_export.quantize_plan import QuantizePlan
from irq_export.train.base import Base, open_base
from irq_export.train.config import TrainConfig
from irq_formats.blocks import BlockSpec, part_layout
from irq_formats.names import tensor_shapes

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
    base = open_base(config)
    model = base.model
    rows = config.micro_batch or -(-config.batch_size // devices)
    tokens = rows * config.max_length
    layer = tokens * (6 * model.hidden_size + 4 * model.intermediate_size) * bytes_per_value
    kept = tokens * model.hidden_size * bytes_per_value * model.num_hidden_layers
    if not config.gradient_checkpointing:
        kept = layer * model.num_hidden_layers
    sizes = [prod(shape) for shape in tensor_shapes(model).values()]
    largest = max(sizes) * bytes_per_value
    logits = tokens * model.vocab_size * 4 * _LOGITS
    activations = kept + layer + largest + logits
    measured = config.importance_source == "data" and isinstance(base.source, QuantizePlan)
    measuring = bytes_per_value * sum(sizes) if measured else 0
    held = _held_bytes(base, bytes_per_value)
    return MemoryEstimate(held, 16 * base.trainable, activations, base.trainable, base.disk_bytes, measuring)


def _held_bytes(base: Base, bytes_per_value: int) -> int:
    """Return the bytes of the model in memory."""
    if isinstance(base.source, QuantizePlan):
        return sum(
            prod(tensor.ref.shape) * bytes_per_value if tensor.spec is None else tensor.nbytes
            for tensor in base.source.tensors
        )
    blocks = sum(_block_bytes(entry.spec, entry.shape) for entry in base.source.blocks.values())
    return blocks + sum(prod(ref.shape) for ref in base.source.plain.values()) * bytes_per_value


def _block_bytes(spec: BlockSpec, shape: tuple[int, int]) -> int:
    return sum(dtype.itemsize * prod(part) for dtype, part in part_layout(spec, shape).values())

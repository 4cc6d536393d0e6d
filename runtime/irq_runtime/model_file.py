"""What a GGUF file says about its model, whichever profile it is of."""

from __future__ import annotations

from irq_formats.errors import UsageError
from irq_formats.fields import Fields
from irq_formats.gguf import GgufFile
from irq_formats.gguf.irq_payload import ARCHITECTURE
from irq_formats.gguf.model_keys import IRQ_PREFIX, read_model
from irq_formats.model import ModelConfig

__all__ = ["check_context", "read_config"]


def read_config(gguf: GgufFile) -> ModelConfig:
    """Return the model of a file of the irq or a stock profile.

    Raises:
        MalformedFile: A key is missing, of the wrong type or out of range.
        UnsupportedModel: Another architecture.
    """
    architecture = Fields(gguf.metadata, str(gguf.path)).string("general.architecture")
    prefix = IRQ_PREFIX if architecture == ARCHITECTURE else architecture
    return read_model(gguf.metadata, prefix, gguf.tensors)


def check_context(config: ModelConfig, context: int | None) -> int:
    """Return how many positions a text may have: ``context``, or all that the model was trained for.

    Raises:
        UsageError: The model has no such positions.
    """
    most = config.max_position_embeddings
    if context is not None and not 1 <= context <= most:
        raise UsageError("the model has no such context", expected=f"1 to {most} positions", got=context)
    return context or most

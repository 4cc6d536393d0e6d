"""What does a GGUF file or a checkpoint hold? A summary from headers alone, without torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import numpy as np

from irq_formats.blocks import BlockSpec, part_layout
from irq_formats.checkpoint import open_checkpoint
from irq_formats.errors import UsageError
from irq_formats.gguf import GgufFile, open_gguf
from irq_formats.gguf.irq_payload import ARCHITECTURE, block_table
from irq_formats.gguf.pair import ADAPTER_NAME, BASE_NAME, matrices_without_offsets

__all__ = ["Summary", "inspect"]


@dataclass(frozen=True)
class Summary:
    """What a file or directory holds.

    Attributes:
        path: The file, or the checkpoint directory.
        kind: ``checkpoint``, ``irq model``, ``irq adapter``, ``stock model`` or ``stock adapter``.
        architecture: Model family or ``general.architecture``.
        nbytes: Bytes of the tensors.
        tensors: Number of tensors by type.
        codebooks: Number of block-quantised matrices by codebook.
        bits_per_weight: Stored bits per weight of these matrices; None where they are stored otherwise.
        adapter: Adapted layers and rank, or None.
        base_hash: Hash of the quantised base, or None.
        tokenizer: Kind and size of the vocabulary, or None.
    """

    path: str
    kind: str
    architecture: str
    nbytes: int
    tensors: dict[str, int]
    codebooks: dict[str, int]
    bits_per_weight: float | None
    adapter: str | None
    base_hash: str | None
    tokenizer: str | None

    def to_dict(self) -> dict[str, object]:
        """Return the fields, for ``--json``."""
        return asdict(self)

    def to_text(self) -> str:
        """Return the summary for people."""
        count = sum(self.tensors.values())
        rows = {
            "kind": f"{self.kind}, {self.architecture}",
            "tensors": f"{count} ({_counts(self.tensors)}), {self.nbytes:,} bytes",
            "quantised": _counts(self.codebooks),
            "bits/weight": None if self.bits_per_weight is None else f"{self.bits_per_weight:.4f}",
            "adapter": self.adapter,
            "base hash": self.base_hash,
            "tokenizer": self.tokenizer,
        }
        return "\n".join([self.path, *(f"  {key:12}{value}" for key, value in rows.items() if value)])


def inspect(path: str | Path) -> list[Summary]:
    """Summarise a GGUF file, the directory of a stock pair, or a checkpoint.

    Raises:
        UsageError: There is nothing of the kind at ``path``.
        MalformedFile: It breaks its specification.
    """
    path = Path(path)
    if not path.is_dir():
        return [_inspect_gguf(open_gguf(path))]
    pair = [path / name for name in (BASE_NAME, ADAPTER_NAME) if (path / name).is_file()]
    if pair:
        return [_inspect_gguf(open_gguf(file)) for file in pair]
    if not (path / "config.json").is_file():
        raise UsageError("neither a checkpoint nor a stock pair", where=path)
    return [_inspect_checkpoint(path)]


def _counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items())


def _bits_per_weight(entries: list[tuple[BlockSpec, tuple[int, int]]]) -> float | None:
    """Return the stored bits per weight of block tensors, from their layouts."""
    layouts = [part_layout(spec, shape) for spec, shape in entries]
    nbytes = sum(dtype.itemsize * prod(shape) for layout in layouts for dtype, shape in layout.values())
    weights = sum(prod(shape) for _, shape in entries)
    return 8 * nbytes / weights if weights else None


def _inspect_gguf(gguf: GgufFile) -> Summary:
    values = gguf.metadata
    architecture = str(values["general.architecture"])
    entries = list(block_table(gguf).values()) if "irq.blocks.name" in values else []
    codebooks = [entry.spec.codebook for entry in entries] or _strings(values.get("irq.stock.codebook"))
    is_adapter = values.get("general.type") == "adapter"
    own = architecture == ARCHITECTURE
    base_hash = values.get("irq.base_hash", values.get("irq.adapter.base_hash"))
    return Summary(
        path=str(gguf.path),
        kind=f"{'irq' if own else 'stock'} {'adapter' if is_adapter else 'model'}",
        architecture=str(values.get("irq.model.family", architecture)),
        nbytes=sum(tensor.nbytes for tensor in gguf.tensors.values()),
        tensors=dict(Counter(tensor.type.name for tensor in gguf.tensors.values())),
        codebooks=dict(Counter(codebooks)),
        bits_per_weight=_bits_per_weight([(entry.spec, entry.shape) for entry in entries]),
        adapter=_adapter(gguf),
        base_hash=None if base_hash is None else str(base_hash),
        tokenizer=_tokenizer(values),
    )


def _adapter(gguf: GgufFile) -> str | None:
    """Describe the LoRA matrices of a file, or those that a base is nothing without."""
    if elsewhere := matrices_without_offsets(gguf):
        return f"needed, for the block offsets of {len(elsewhere)} layers"
    ranks = [tensor.shape[0] for name, tensor in gguf.tensors.items() if name.endswith(".lora_a")]
    if not ranks:
        return None
    text = f"{len(ranks)} layers, rank {_range(np.array(ranks))}"
    tau = gguf.metadata.get("irq.stock.tau_rank")
    if isinstance(tau, np.ndarray) and tau.size:
        text += f", of which block offsets {_range(tau)}"
    if any(name.endswith(".lora_beta") for name in gguf.tensors):
        text += ", elastic connections kept"
    return text


def _range(values: np.ndarray[tuple[int, ...], np.dtype[np.integer]]) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _tokenizer(values: Mapping[str, object]) -> str | None:
    tokens = values.get("tokenizer.ggml.tokens")
    if "tokenizer.ggml.model" not in values:
        return None
    text = str(values["tokenizer.ggml.model"])
    text += f", {len(tokens)} tokens" if isinstance(tokens, list) else ""
    text += f", pre {values['tokenizer.ggml.pre']}" if "tokenizer.ggml.pre" in values else ""
    return text + (", chat template" if "tokenizer.chat_template" in values else "")


def _strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _inspect_checkpoint(path: Path) -> Summary:
    checkpoint = open_checkpoint(path, verify=False)
    entries = [(block.spec, block.shape) for block in checkpoint.blocks.values()]
    refs = checkpoint.tensors.tensors.values()
    return Summary(
        path=str(path),
        kind="checkpoint",
        architecture=checkpoint.model.family,
        nbytes=sum(ref.nbytes for ref in refs),
        tensors=dict(Counter(ref.dtype for ref in refs)),
        codebooks=dict(Counter(spec.codebook for spec, _ in entries)),
        bits_per_weight=_bits_per_weight(entries),
        adapter=None if checkpoint.adapter_dir is None else str(checkpoint.adapter_dir),
        base_hash=checkpoint.base_hash,
        tokenizer="tokenizer.json" if (path / "tokenizer.json").is_file() else None,
    )

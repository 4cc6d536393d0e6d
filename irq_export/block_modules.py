"""Torch modules whose weight is a block-quantised matrix (spec/irq-blocks.md).

The parts are buffers under the names of the checkpoint, in the dtypes of the checkpoint; the weight is
decoded whenever it is needed (:mod:`irq_export.block_linear`), bit for bit as :mod:`irq_formats.blocks`
does. Moving a module between devices moves its parts; casting a module (``.double()``,
``.to(torch.bfloat16)``) leaves them alone, and a cast that goes around the module is refused by its next
forward pass. :meth:`BlockModule.shardable` makes them parameters of plain bytes, which FSDP2 shards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from irq_export.block_linear import Parts, block_linear, decode, select_rows
from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.errors import UsageError

__all__ = ["SHARDED", "BlockModule", "IrqEmbedding", "IrqHead", "IrqLinear", "IrqTiedHead"]

#: Bytes as FSDP2 shards them: torch below 2.13 shards nothing but floating-point types.
SHARDED = torch.uint8 if torch.__version__ >= "2.13" else torch.float8_e4m3fn


class BlockModule(nn.Module):
    """Holds the parts of a :class:`~irq_formats.blocks.BlockTensor` as buffers.

    Args:
        spec: How to read the parts.
        shape: ``(out, in)`` of the matrix.

    Attributes:
        base_hash: Of the checkpoint it belongs to, where known; adapters check it.
    """

    base_hash: str | None = None

    def __init__(self, spec: BlockSpec, shape: tuple[int, int]) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        layout = part_layout(spec, shape)
        self.part_names = tuple(layout)
        self._dtypes: dict[str, torch.dtype] = {n: getattr(torch, d.name) for n, (d, _) in layout.items()}
        for name, (_, part_shape) in layout.items():
            self.register_buffer(name, torch.zeros(part_shape, dtype=self._dtypes[name]))

    def part(self, name: str) -> Tensor:
        """Return a part in its dtype.

        Raises:
            UsageError: Somebody has cast it (a mixed-precision policy with a ``buffer_dtype``, say).
        """
        dtype = self._dtypes[name]
        stored = self._buffers.get(name)
        if stored is None:  # a parameter of bytes, see shardable()
            held: Tensor = getattr(self, name)
            if held.dtype == SHARDED:
                return held.view(dtype)
            stored = held
        if stored.dtype != dtype:
            raise UsageError(
                f"{name} of a quantised layer was cast, and its bits are lost",
                expected=dtype,
                got=stored.dtype,
                hint="Load the model again, and leave buffer_dtype out of the mixed-precision policy",
            )
        return stored

    def shardable(self) -> None:
        """Turn the parts into frozen parameters of bytes: FSDP2 shards them, and casts no bytes.

        With torch below 2.13 a policy does cast them, and the next forward pass refuses.
        """
        for name in self.part_names:
            stored = self.part(name).view(SHARDED)
            del self._buffers[name]
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))

    @torch.no_grad()
    def load_block(self, tensor: BlockTensor) -> None:
        """Copy the parts of a block tensor of the same spec and shape."""
        for name in self.part_names:
            self.part(name).copy_(torch.from_numpy(np.ascontiguousarray(tensor.parts[name])))

    def block_tensor(self) -> BlockTensor:
        """Return the parts as a block tensor (copies on the CPU)."""
        parts = {name: self.part(name).cpu().numpy().copy() for name in self.part_names}
        return BlockTensor(self.spec, self.shape, parts)

    def parts(self) -> Parts:
        """The parts, as the functions of :mod:`irq_export.block_linear` take them."""
        stored, spec = {name: self.part(name) for name in self.part_names}, self.spec
        return Parts(
            stored["codes"],
            stored["scale"],
            stored.get("scale_absmax"),
            stored.get("scale_offset"),
            stored.get("tau"),
            stored.get("tau_absmax"),
            spec.codebook,
            spec.block_size,
            spec.scale_rounding,
        )

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the matrix ``(out, in)``: float32 is bit-equal to ``BlockTensor.dequantize``."""
        return decode(self.parts(), dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockModule:
        """Move the parts, never cast them: ``fn`` is shown plain bytes, which a cast leaves alone."""
        dtypes = {name: self.get_buffer(name).dtype for name in self.part_names if name in self._buffers}
        try:
            for name in dtypes:
                self._buffers[name] = self.get_buffer(name).view(torch.uint8)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)
        return self

    def extra_repr(self) -> str:
        """Describe the matrix in ``print(model)``."""
        return f"{self.shape[0]}x{self.shape[1]}, {self.spec.codebook}, block {self.spec.block_size}"


class IrqLinear(BlockModule):
    """A frozen linear layer with a block-quantised weight; gradients flow to its input.

    Args:
        spec: How to read the parts.
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is a bias, a parameter in the dtype of the model.
        dtype: Of the bias.
    """

    def __init__(
        self,
        spec: BlockSpec,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, (out_features, in_features))
        self.in_features = in_features
        self.out_features = out_features
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False)

    @property
    def qweight(self) -> Tensor:
        """The packed codes, under the name by which PEFT finds the device of a quantised layer."""
        return self.part("codes")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)`` in the dtype of ``x``, or of autocast."""
        return block_linear(x, self.parts(), self.bias)


class IrqHead(IrqLinear):
    """An output head of its own: an :class:`IrqLinear` that also gives out its weight.

    Args:
        spec: How to read the parts.
        in_features: Width of the hidden states.
        out_features: Size of the vocabulary.
        bias: As of :class:`IrqLinear`.
        dtype: Of bias and weight; follows casts of the module.
    """

    def __init__(
        self,
        spec: BlockSpec,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, in_features, out_features, bias=bias, dtype=dtype)
        self.register_buffer("compute", torch.empty(0, dtype=dtype), persistent=False)  # as of IrqEmbedding

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, for losses that multiply by it themselves (TRL)."""
        return self.dequantize(self.get_buffer("compute").dtype)


class IrqEmbedding(BlockModule):
    """A frozen embedding with a block-quantised table; only the rows asked for are decoded.

    Args:
        spec: How to read the parts.
        num_embeddings: Rows.
        embedding_dim: Width.
        dtype: Of the rows given out; follows casts of the module.
    """

    def __init__(
        self, spec: BlockSpec, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(spec, (num_embeddings, embedding_dim))
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        # Empty: only its dtype counts, which a cast of the module changes as it does a parameter's.
        self.register_buffer("compute", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up integer ids of any shape ``(...)``: ``(..., embedding_dim)``."""
        rows = select_rows(self.parts(), ids.reshape(-1))
        weight = decode(rows, self.get_buffer("compute").dtype)
        return weight.view(*ids.shape, self.embedding_dim)


class IrqTiedHead(nn.Module):
    """An output head that is the embedding; it owns nothing.

    Args:
        embedding: The embedding, which stays a submodule of the model only.
    """

    def __init__(self, embedding: IrqEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that the embedding is not registered twice
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        self.bias = None

    @property
    def weight(self) -> Tensor:
        """The decoded matrix, for losses that multiply by it themselves (TRL)."""
        embedding = self._embedding[0]
        return embedding.dequantize(embedding.get_buffer("compute").dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states ``(..., embedding_dim)`` to logits ``(..., num_embeddings)``."""
        return block_linear(x, self._embedding[0].parts())

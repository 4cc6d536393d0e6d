"""Torch modules whose weight is a block-quantised matrix (spec/irq-blocks.md).

The parts are buffers under the names of the checkpoint, in the dtypes of the checkpoint; the weight is
decoded whenever it is needed, with the arithmetic of :mod:`irq_formats.blocks`, bit for bit: one
rounding per operation, float32, then one cast to the dtype of the activations. Moving a module between
devices moves its parts; casting a module (``.double()``, ``.to(torch.bfloat16)``) leaves them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from irq_formats.blocks import BlockSpec, BlockTensor, part_layout
from irq_formats.codebooks import CODEBOOKS
from irq_formats.double_quant import GROUP_SIZE, dynamic_map
from irq_formats.packing import block_bytes

__all__ = [
    "BlockModule",
    "IrqEmbedding",
    "IrqLinear",
    "IrqTiedHead",
    "decode_weight",
    "dq8_values",
    "unpack_codes",
]


@cache
def _levels(codebook: str, device: torch.device) -> Tensor:
    """Levels of a codebook, float32 ``(2**bits,)``; for int8 in the order of the unsigned byte."""
    levels = CODEBOOKS[codebook].levels
    return torch.tensor(np.roll(levels, 128) if codebook == "int8" else levels, device=device)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    return torch.tensor(dynamic_map(), device=device)


def _take(table: Tensor, index: Tensor) -> Tensor:
    return torch.index_select(table, 0, index.reshape(-1).int()).view(index.shape)


def unpack_codes(packed: Tensor, spec: BlockSpec) -> Tensor:
    """Unpack codes.

    Args:
        packed: uint8 ``(rows, in * bits / 8)``.
        spec: Codebook and block size.

    Returns:
        uint8 ``(blocks, block_size)``, blocks in row order.
    """
    size = spec.block_size
    blocks = packed.reshape(-1, block_bytes(spec.bits, size))
    if spec.bits == 8:
        return blocks
    if spec.bits != 3:
        return _unpack_planes(blocks, spec.bits)
    low, high = blocks[:, : size // 4], blocks[:, size // 4 :]
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    high_bits = ((high.unsqueeze(-1) >> bit) & 1).flatten(1)  # (blocks, block_size)
    return _unpack_planes(low, 2) | high_bits << 2


def _unpack_planes(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=1)


def dq8_values(index: Tensor, absmax: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    """Expand double-quantised block values, as :func:`irq_formats.double_quant.decode_dq8` does.

    Args:
        index: uint8, any shape, read in C order.
        absmax: float32 ``(ceil(index.numel() / 256),)``.
        mean: float32 ``(1,)``, or zero.

    Returns:
        float32, shape of ``index``.
    """
    group = absmax.repeat_interleave(GROUP_SIZE)[: index.numel()].view(index.shape)
    return _take(_dynamic_map(index.device), index) * group + mean


def decode_weight(codes: Tensor, scale: Tensor, tau: Tensor | None, spec: BlockSpec) -> Tensor:
    """Return ``fl32(fl32(scale * levels[code]) + tau)``.

    Args:
        codes: Packed, uint8 ``(rows, in * bits / 8)``.
        scale: Effective scales, float32 ``(rows, nb)``.
        tau: Effective offsets, float32 ``(rows, nb)``, or None for zero.
        spec: Codebook and block size.

    Returns:
        float32 ``(rows, in)``.
    """
    weight = _take(_levels(spec.codebook, codes.device), unpack_codes(codes, spec))
    weight *= scale.reshape(-1, 1)
    if tau is not None:  # a second operation, never addcmul: the product is rounded first
        weight += tau.reshape(-1, 1)
    elif spec.codebook != "int8":
        weight += 0.0  # as the specification: turns -0 into 0
    return weight.view(scale.shape[0], -1)


class BlockModule(nn.Module):
    """Holds the parts of a :class:`~irq_formats.blocks.BlockTensor` as buffers.

    Args:
        spec: How to read the parts.
        shape: ``(out, in)`` of the matrix.
    """

    def __init__(self, spec: BlockSpec, shape: tuple[int, int]) -> None:
        super().__init__()
        self.spec = spec
        self.shape = shape
        layout = part_layout(spec, shape)
        self.part_names = tuple(layout)
        for name, (dtype, part_shape) in layout.items():
            self.register_buffer(name, torch.zeros(part_shape, dtype=getattr(torch, dtype.name)))

    @torch.no_grad()
    def load_block(self, tensor: BlockTensor) -> None:
        """Copy the parts of a block tensor of the same spec and shape."""
        for name in self.part_names:
            self.get_buffer(name).copy_(torch.from_numpy(np.ascontiguousarray(tensor.parts[name])))

    def block_tensor(self) -> BlockTensor:
        """Return the parts as a block tensor (copies on the CPU)."""
        parts = {name: self.get_buffer(name).cpu().numpy().copy() for name in self.part_names}
        return BlockTensor(self.spec, self.shape, parts)

    def effective_scale(self) -> Tensor:
        """Effective scales, float32 ``(out, nb)``."""
        stored = self.get_buffer("scale")
        if self.spec.scale != "dq8":
            return stored.float()
        values = dq8_values(stored, self.get_buffer("scale_absmax"), self.get_buffer("scale_offset"))
        return values.half().float() if self.spec.scale_rounding == "fp16" else values

    def effective_tau(self) -> Tensor | None:
        """Effective offsets, float32 ``(out, nb)``, or None where the spec has none."""
        if self.spec.tau == "none":
            return None
        stored = self.get_buffer("tau")
        return dq8_values(stored, self.get_buffer("tau_absmax")) if self.spec.tau == "dq8" else stored.float()

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """Decode the matrix, float32 ``(out, in)``, bit-equal to ``BlockTensor.dequantize``."""
        return decode_weight(
            self.get_buffer("codes"), self.effective_scale(), self.effective_tau(), self.spec
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockModule:
        """Move the parts, never cast them: ``fn`` is shown plain bytes, which a cast leaves alone."""
        dtypes = {name: self.get_buffer(name).dtype for name in self.part_names}
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

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)`` in the dtype of ``x``."""
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)


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
        rows = ids.reshape(-1)
        tau = self.effective_tau()
        weight = decode_weight(
            self.get_buffer("codes")[rows],
            self.effective_scale()[rows],
            None if tau is None else tau[rows],
            self.spec,
        )
        return weight.view(*ids.shape, self.embedding_dim).to(self.get_buffer("compute").dtype)


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

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states ``(..., embedding_dim)`` to logits ``(..., num_embeddings)``."""
        return F.linear(x, self._embedding[0].dequantize().to(x.dtype))

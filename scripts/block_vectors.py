"""Golden vectors of the blocks: formats/vectors/blocks/*.bin and blocks.json (see make_vectors.py)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from irq_formats.blocks import BlockSpec, BlockTensor, encode, encode_int8
from irq_formats.codebooks import CODEBOOKS

# magic, version, codebook id, block size, rows, columns, offsets of codes, scale, tau, decoded (bytes)
HEADER = struct.Struct("<4s9I")
ROWS, COLUMNS = 5, 192  # 15 or 30 blocks: a short last group


def weights(seed: int) -> np.ndarray:
    """float32 (5, 192): Gaussian, with a zero block, a constant block and an outlier."""
    w = (np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    w[1, :64] = 0
    w[2, 64:128] = 0.37
    w[3, 7] = -1.5
    return w


def choose_pair(w: np.ndarray, spec: BlockSpec) -> tuple[np.ndarray, np.ndarray]:
    """A plain choice of scale and tau: lower median and absmax (no search), float32 (out, nb) each."""
    blocks = w.reshape(w.shape[0], -1, spec.block_size)
    tau = np.sort(blocks, axis=2)[:, :, spec.block_size // 2 - 1]
    if spec.tau == "none":
        tau = np.zeros_like(tau)
    scale = np.abs(blocks - tau[..., None]).max(axis=2)
    if CODEBOOKS[spec.codebook].affine:
        scale = np.float32(2) * scale / np.float32(2**spec.bits - 1)
        if spec.tau != "none":
            tau = tau + scale / np.float32(2)
    return scale.astype(np.float32), tau.astype(np.float32)


def cases() -> list[tuple[str, np.ndarray, BlockTensor]]:
    """Return (name, weight, tensor) of every case."""
    found = []
    for i, name in enumerate(CODEBOOKS):
        w = weights(i)
        if name == "int8":
            found.append((name, w, encode_int8(w)))
            continue
        for block_size in (64, 32):
            for scale, tau in (("dq8", "dq8"), ("f16", "f16"), ("dq8", "none"), ("f32", "f32")):
                spec = BlockSpec(name, block_size, scale, tau)
                found.append(
                    (f"{name}-{block_size}-{scale}-{tau}", w, encode(w, *choose_pair(w, spec), spec))
                )
    return found


def write_blocks(directory: Path) -> int:
    """Write every vector; return how many."""
    directory.mkdir(parents=True, exist_ok=True)
    index = []
    for name, weight, tensor in cases():
        arrays = {
            "codes": tensor.parts["codes"],
            "effective_scale": tensor.scale(),
            "effective_tau": tensor.tau(),
            "decoded": tensor.dequantize(),
            "weight": weight,
            **{f"part_{key}": part for key, part in tensor.parts.items() if key != "codes"},
        }
        offset, offsets, body = HEADER.size, {}, b""
        for key, array in arrays.items():
            offsets[key] = {
                "offset": offset + len(body),
                "dtype": array.dtype.name,
                "shape": list(array.shape),
            }
            body += array.tobytes() + bytes(-array.nbytes % 8)
        header = HEADER.pack(
            b"IRQV",
            1,
            list(CODEBOOKS).index(tensor.spec.codebook),
            tensor.spec.block_size,
            *tensor.shape,
            *(offsets[key]["offset"] for key in ("codes", "effective_scale", "effective_tau", "decoded")),
        )
        (directory / f"{name}.bin").write_bytes(header + body)
        index.append({"name": name, "spec": tensor.spec.to_dict(), "shape": tensor.shape, "arrays": offsets})
    (directory / "blocks.json").write_text(json.dumps(index, indent=1) + "\n")
    return len(index)

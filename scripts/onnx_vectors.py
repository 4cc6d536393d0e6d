"""Golden codes of ONNX: formats/vectors/onnx/codes.json, packed by plain loops (see make_vectors.py)."""

from __future__ import annotations

import json
import random
from pathlib import Path

BITS = {"nf4": 4, "nf3": 3, "nf2": 2, "int4": 4, "int3": 3, "int2": 2, "int8": 8}


def packed(operator: str, codes: list[int]) -> bytes:
    size = len(codes)
    quarter = size // 4
    if operator == "int8":
        return bytes(code ^ 0x80 for code in codes)
    if operator == "nf4":
        return bytes(codes[2 * j] << 4 | codes[2 * j + 1] for j in range(size // 2))
    if operator == "int4":
        return bytes(codes[2 * j] | codes[2 * j + 1] << 4 for j in range(size // 2))
    low = [sum((codes[j + p * quarter] & 3) << 2 * p for p in range(4)) for j in range(quarter)]
    high = [sum((codes[8 * j + bit] >> 2) << bit for bit in range(8)) for j in range(size // 8)]
    return bytes(low + (high if BITS[operator] == 3 else []))


def write_onnx(directory: Path) -> int:
    """Write codes.json; return how many vectors it has."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(5)
    vectors = []
    for codebook, bits in BITS.items():
        for size in (32,) if codebook == "int8" else (64, 32):
            codes = [rng.randrange(2**bits) for _ in range(size)]
            for operator in (codebook, "int4") if codebook in ("int3", "int2") else (codebook,):
                shift = 0 if operator == codebook else 8 - 2 ** (bits - 1)
                stored = packed(operator, [code + shift for code in codes])
                vectors.append(
                    {
                        "codebook": codebook,
                        "operator": operator,
                        "block_size": size,
                        "codes": codes,
                        "bytes": stored.hex(),
                    }
                )
    text = "[\n" + ",\n".join(json.dumps(vector) for vector in vectors) + "\n]\n"
    (directory / "codes.json").write_text(text, encoding="utf-8")
    return len(vectors)

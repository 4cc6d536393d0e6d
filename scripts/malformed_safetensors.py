"""Malformed safetensors files and shard indexes: small steps away from a good one."""

from __future__ import annotations

import json
import struct

from scripts.malformed import Case

INDEX = "model.safetensors.index.json"
Entry = dict[str, object]


def entry(dtype: object, shape: object, begin: object, end: object) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A = entry("F32", [2], 0, 8)
B = entry("U8", [4], 8, 12)
GOOD = {"a": A, "b": B}
DATA = bytes(12)


def encode(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def cases() -> list[Case]:
    """Return every safetensors case."""
    return [*headers(), *entries(), *indexes()]


def case(name: str, rule: str, message: str, data: bytes) -> Case:
    return Case(name, rule, message, {f"{name}.safetensors": data})


def headers() -> list[Case]:
    length = "the header has 2 to 100,000,000 bytes and lies in the file"
    strings = "__metadata__ maps strings to strings"
    good = encode(GOOD)

    def one(name: str, rule: str, message: str, header: object) -> Case:
        return case(f"header-{name}", rule, message, encode(header))

    duplicate = b'{"a":%s,"a":%s}' % (json.dumps(A).encode(), json.dumps(A).encode())
    return [
        case("empty", "a file has at least 8 bytes", "not a safetensors", b""),
        case("7-bytes", "a file has at least 8 bytes", "not a safetensors", good[:7]),
        case("length-0", length, "wrong header length", encode(GOOD, length=0)),
        case("length-over-100-mb", length, "wrong header length", encode(GOOD, length=100_000_001)),
        case("length-past-end", length, "wrong header length", encode(GOOD, length=4000)),
        case("length-2-63", length, "wrong header length", encode(GOOD, length=2**63)),
        case("truncated-header", length, "wrong header length", good[:40]),
        one("not-utf8", "the header is UTF-8", "not valid JSON", b'{"\xff":1}'),
        one("not-json", "the header is JSON", "not valid JSON", b'{"a":'),
        one("list", "the header is an object", "does not start", b"[]"),
        one("starts-with-space", "the header starts with {", "does not start", b" {}"),
        one("nan", "JSON has no NaN", "JSON has no NaN", b'{"a":NaN}'),
        one("depth-bomb", "the header is JSON", "not valid JSON", b'{"a":' + b"[" * 5000),
        one("duplicate-key", "a name stands once", "duplicate JSON key", duplicate),
        one(
            "duplicate-metadata",
            "a name stands once",
            "duplicate JSON key",
            b'{"__metadata__":{"k":"1","k":"2"}}',
        ),
        one("metadata-number", strings, "strings to strings", GOOD | {"__metadata__": {"k": 1}}),
        one("metadata-list", strings, "strings to strings", GOOD | {"__metadata__": []}),
    ]


def entries() -> list[Case]:
    cover = "data cover the rest of the file, in order, without holes"
    match = "shape and bytes agree"
    sizes = "sizes are integers from 0 to 2^63 - 1"
    keys = "an entry has exactly dtype, shape and data_offsets"

    def one(name: str, rule: str, message: str, first: object, second: object = B) -> Case:
        return case(name, rule, message, encode({"a": first, "b": second}))

    huge = entry("F32", [2**32, 2**32, 2], 0, 8)
    wrapped = entry("U8", [2**33, 2**31 + 1], 0, 8)
    return [
        one("overlap", cover, "hole or overlap", A, entry("U8", [8], 4, 12)),
        one("same-bytes", cover, "hole or overlap", A, entry("U8", [8], 0, 8)),
        one("hole", cover, "hole or overlap", A, entry("U8", [3], 9, 12)),
        one("first-not-0", cover, "hole or overlap", entry("F32", [1], 4, 8)),
        case("trailing-byte", cover, "do not end with", encode(GOOD, DATA + b"\0")),
        case("data-short-by-1", cover, "do not end with", encode(GOOD, DATA[:-1])),
        case("no-tensors-but-data", cover, "do not end with", encode({})),
        one("offset-past-end", cover, "do not end with", A, entry("U8", [40], 8, 48)),
        one("shape-overflow", match, "does not match", huge),
        one("shape-wraps", match, "does not match", wrapped),
        one("shape-zero-with-bytes", match, "does not match", entry("F32", [0], 0, 8)),
        one("shape-too-small", match, "does not match", entry("F32", [1], 0, 8)),
        one("bytes-not-whole-items", match, "do not match", entry("F32", [1], 0, 7)),
        one("offsets-reversed", match, "does not match", entry("F32", [2], 8, 0)),
        one("shape-negative", sizes, "wrong shape", entry("F32", [-2], 0, 8)),
        one("shape-float", sizes, "wrong shape", entry("F32", [2.0], 0, 8)),
        one("shape-bool", sizes, "wrong shape", entry("F32", [True, 2], 0, 8)),
        one("shape-string", sizes, "wrong shape", entry("F32", "2", 0, 8)),
        one("offset-2-64", sizes, "wrong shape", entry("F32", [2], 0, 2**64)),
        one("offset-string", sizes, "wrong shape", entry("F32", [2], "0", 8)),
        one("three-offsets", sizes, "wrong shape", A | {"data_offsets": [0, 8, 8]}),
        one("dtype-unknown", "dtypes are known", "unknown dtype", entry("F31", [2], 0, 8)),
        one("dtype-number", "dtypes are known", "unknown dtype", entry(1, [2], 0, 8)),
        one("entry-not-object", keys, "wrong entry", [1]),
        one("field-missing", keys, "wrong entry", {"dtype": "F32", "shape": [2]}),
        one("field-extra", keys, "wrong entry", A | {"path": "/etc/passwd"}),
    ]


def good_shards() -> dict[str, bytes]:
    """An index and two shards that open without complaint."""
    weight_map = {"a": "s1.safetensors", "b": "s2.safetensors"}
    return {
        INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "s1.safetensors": encode({"a": A}, bytes(8)),
        "s2.safetensors": encode({"b": entry("U8", [4], 0, 4)}, bytes(4)),
    }


def indexes() -> list[Case]:
    good = good_shards()
    plain = "a shard is a plain name in the same directory"
    agree = "index and shards name the same tensors"

    def mapped(name: str, rule: str, message: str, weight_map: object) -> Case:
        index = json.dumps({"weight_map": weight_map}).encode()
        return Case(f"index-{name}", rule, message, good | {INDEX: index})

    def points(name: str, shard: object) -> Case:
        return mapped(name, plain, "not a plain file name", {"a": "s1.safetensors", "b": shard})

    twice = good | {"s2.safetensors": encode({"a": A}, bytes(8))}
    extra = good | {
        "s2.safetensors": encode({"b": entry("U8", [4], 0, 4), "c": entry("U8", [1], 4, 5)}, bytes(5))
    }
    return [
        points("absolute", "/tmp/s2.safetensors"),
        points("parent", "../s2.safetensors"),
        points("subfolder", "sub/s2.safetensors"),
        points("dot-dot-inside", "sub/../s2.safetensors"),
        points("backslash", "..\\s2.safetensors"),
        points("nul", "s2.safetensors\0.safetensors"),
        points("hidden", ".s2.safetensors"),
        points("pickle", "pytorch_model.bin"),
        points("number", 2),
        mapped("empty", "weight_map names tensors", "no weight_map", {}),
        mapped("list", "weight_map names tensors", "no weight_map", ["a"]),
        mapped(
            "shard-missing", "all shards are there", "missing", {"a": "s1.safetensors", "b": "s3.safetensors"}
        ),
        mapped("wrong-shard", agree, "wrong shard", {"a": "s2.safetensors", "b": "s1.safetensors"}),
        mapped(
            "tensor-in-no-shard",
            agree,
            "in no shard",
            {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors"},
        ),
        Case("index-tensor-twice", agree, "wrong shard", twice),
        Case("index-tensor-extra", agree, "wrong shard", extra),
        Case(
            "index-duplicate-key",
            "a name stands once",
            "duplicate JSON key",
            good | {INDEX: b'{"weight_map":{"a":"s1.safetensors","a":"s2.safetensors"}}'},
        ),
        Case("index-not-json", "the index is JSON", "not valid JSON", good | {INDEX: b"{"}),
        Case("index-not-utf8", "the index is UTF-8", "not valid JSON", good | {INDEX: b'{"\xff":1}'}),
        Case(
            "index-metadata-differs",
            "metadata that two shards hold agree",
            "different exports",
            good
            | {
                "s1.safetensors": encode({"__metadata__": {"k": "1"}, "a": A}, bytes(8)),
                "s2.safetensors": encode({"__metadata__": {"k": "2"}, "b": entry("U8", [4], 0, 4)}, bytes(4)),
            },
        ),
    ]

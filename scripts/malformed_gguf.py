"""Malformed GGUF containers: every one a small step away from ``raw_gguf.GOOD``."""

from __future__ import annotations

from dataclasses import replace

from scripts.malformed import Case
from scripts.raw_gguf import (
    ARCHITECTURE,
    ARRAY,
    BOOL,
    DATA_A,
    DATA_B,
    GOOD,
    PAD_B,
    STR,
    TENSOR_F16,
    TENSOR_F32,
    TENSOR_I8,
    TENSOR_Q4_0,
    U8,
    U16,
    U32,
    U64,
    B,
    Fields,
    RawGguf,
    array,
    f32,
    info,
    pair,
    string,
    u8,
    u32,
    u64,
)


def case(name: str, rule: str, message: str, data: RawGguf | bytes) -> Case:
    raw = data if isinstance(data, bytes) else data.encode()
    return Case(name, rule, message, {f"{name}.gguf": raw})


def with_pair(*pairs: Fields) -> RawGguf:
    return replace(GOOD, pairs=(ARCHITECTURE, *pairs))


def with_infos(*infos: Fields, data: bytes = GOOD.data) -> RawGguf:
    return replace(GOOD, infos=infos, data=data)


def cases() -> list[Case]:
    """Return every GGUF case of the container level."""
    return [*head(), *keys(), *values(), *alignments(), *names(), *shapes(), *places(), *shards()]


def head() -> list[Case]:
    good = GOOD.encode()
    truncated_key = replace(GOOD, infos=(), data=b"").encode()[:40]
    truncated_info = RawGguf((ARCHITECTURE,), (info(b"n" * 40, (8,), 0, 0),), pad=False).encode()[:-6]
    count = "counts are bounded by a cap and by the bytes that are left"
    found = [
        case("empty", "a file has a header of 24 bytes", "ends inside the GGUF header", b""),
        case("four-bytes", "a file has a header of 24 bytes", "ends inside", good[:4]),
        case("23-bytes", "a file has a header of 24 bytes", "ends inside", good[:23]),
        case("magic", "starts with GGUF", "not a GGUF file", replace(GOOD, magic=b"GGML")),
        case("magic-swapped", "starts with GGUF", "not a GGUF", replace(GOOD, magic=b"FUGG")),
        case("big-endian", "little-endian only", "big-endian", replace(GOOD, version=3 << 24)),
        *(
            case(f"version-{v}", "version 2 or 3", "unsupported GGUF", replace(GOOD, version=v))
            for v in (0, 1, 99)
        ),
        case(
            "version-2-with-32-bit-counts",
            "version 2 has 64-bit counts",
            "too many",
            b"GGUF" + u32(2) + u32(2) + u32(1) + b"".join(ARCHITECTURE) + bytes(64),
        ),
        case("truncated-key", "a file is complete", "too long", truncated_key),
        case("truncated-info", "a file is complete", "ends inside", truncated_info),
    ]
    numbers = {"2-31": 2**31, "2-63": 2**63, "minus-1": -1, "does-not-fit": 100}
    for label, number in numbers.items():
        tensors, pairs = replace(GOOD, n_tensors=number), replace(GOOD, n_pairs=number)
        found.append(case(f"n-tensors-{label}", count, "too many tensors", tensors))
        found.append(case(f"n-pairs-{label}", count, "too many key-value pairs", pairs))
    return found


def keys() -> list[Case]:
    value = U32, u32(1)
    long = "a key has at most 65535 bytes"
    ascii_ = "a key is printable ASCII"
    return [
        case("key-empty", "a key is not empty", "key is empty", with_pair(pair(b"", *value))),
        case("key-2-63", long, "too long", with_pair(pair(b"k", *value, key_length=2**63))),
        case("key-past-end", long, "too long", with_pair(pair(b"k", *value, key_length=4000))),
        case("key-64-kib", long, "too long", with_pair(pair(b"k" * 65536, *value))),
        case("key-not-utf8", "strings are UTF-8", "not UTF-8", with_pair(pair(b"k\xff", *value))),
        case("key-not-ascii", ascii_, "printable", with_pair(pair("ké".encode(), *value))),
        case("key-nul", ascii_, "printable", with_pair(pair(b"k\0", *value))),
        case(
            "key-duplicate",
            "a key stands once",
            "duplicate key",
            with_pair(pair(b"k", *value), pair(b"k", *value)),
        ),
    ]


def values() -> list[Case]:
    def one(name: str, rule: str, message: str, kind: int, payload: bytes) -> Case:
        return case(name, rule, message, with_pair(pair(b"k", kind, payload)))

    def architecture(name: str, *pairs: Fields) -> Case:
        rule = "general.architecture is a non-empty string"
        return case(f"architecture-{name}", rule, "required key", replace(GOOD, pairs=pairs))

    key = b"general.architecture"
    bomb = array(ARRAY, 1) * 200 + array(U8, 0)
    fits = "an array fits the bytes that are left"
    return [
        one("value-type-13", "value types are 0 to 12", "unknown value type", 13, u32(1)),
        one("value-type-minus-1", "value types are 0 to 12", "unknown value type", 2**32 - 1, u32(1)),
        one("bool-2", "a bool is 0 or 1", "not a bool", BOOL, u8(2)),
        one("bool-in-array-2", "a bool is 0 or 1", "not a bool", ARRAY, array(BOOL, 2, b"\1\2")),
        one("string-past-end", "a string fits the file", "too long", STR, string(b"x", 4000)),
        one("string-2-63", "a string fits the file", "too long", STR, string(b"x", 2**63)),
        one("string-minus-1", "a string fits the file", "too long", STR, string(b"x", -1)),
        one("string-not-utf8", "strings are UTF-8", "not UTF-8", STR, string(b"\xc3(")),
        one("array-of-arrays", "no nested arrays", "array of arrays", ARRAY, array(ARRAY, 1)),
        one("array-depth-bomb", "no nested arrays", "array of arrays", ARRAY, bomb),
        one("array-type-99", "value types are 0 to 12", "unknown value type", ARRAY, array(99, 1)),
        one("array-2-29-bytes", fits, "too many elements", ARRAY, array(U8, 2**29)),
        one("array-2-29-strings", fits, "too many elements", ARRAY, array(STR, 2**29)),
        one("array-2-63", fits, "too many elements", ARRAY, array(U64, 2**63)),
        one("array-wraps", fits, "too many elements", ARRAY, array(U64, 2**61 + 1, u64(0))),
        one(
            "array-string-past-end",
            "a string fits the file",
            "too long",
            ARRAY,
            array(STR, 2, string(b"x") + string(b"y", 4000)),
        ),
        architecture("missing", pair(b"k", U32, u32(1))),
        architecture("not-a-string", pair(key, U32, u32(1))),
        architecture("array", pair(key, ARRAY, array(STR, 1, string(b"llama")))),
        architecture("empty", pair(key, STR, string(b""))),
    ]


def alignments() -> list[Case]:
    key = b"general.alignment"
    power = "alignment is a power of two from 8 to 2^20"
    typed = "alignment is U32"

    def one(name: str, rule: str, kind: int, payload: bytes) -> Case:
        return case(f"alignment-{name}", rule, "alignment is not", with_pair(pair(key, kind, payload)))

    return [
        *(one(str(n), power, U32, u32(n)) for n in (0, 1, 3, 4, 24)),
        one("2-31", power, U32, u32(2**31)),
        one("u64", typed, U64, u64(32)),
        one("string", typed, STR, string(b"32")),
        one("f32", typed, 6, f32(32)),
        one("array", typed, ARRAY, array(U32, 1, u32(32))),
        case(
            "alignment-inconsistent",
            "offsets follow the alignment",
            "not contiguous",
            replace(with_pair(pair(key, U32, u32(64))), alignment=64),
        ),
    ]


def names() -> list[Case]:
    def one(name: str, rule: str, message: str, tensor: bytes, length: int | None = None) -> Case:
        first = info(tensor, (8,), TENSOR_F32, 0, name_length=length)
        return case(f"name-{name}", rule, message, with_infos(first, B))

    short = "a tensor name has at most 63 bytes"
    return [
        one("empty", "a tensor name is not empty", "name is empty", b""),
        one("64-bytes", short, "too long", b"n" * 64),
        one("2-63", short, "too long", b"n", 2**63),
        one("nul", "a tensor name is printable", "unprintable", b"n\0x"),
        one("newline", "a tensor name is printable", "unprintable", b"n\n"),
        one("not-utf8", "strings are UTF-8", "not UTF-8", b"\xff\xfe"),
        one("duplicate", "a tensor name stands once", "duplicate tensor", b"b"),
        one("case", "tensor names differ by more than case", "differ only by case", b"B"),
    ]


def shapes() -> list[Case]:
    def one(
        name: str,
        rule: str,
        message: str,
        dims: tuple[int, ...],
        kind: int = TENSOR_F32,
        n_dims: int | None = None,
    ) -> Case:
        return case(name, rule, message, with_infos(info(b"a", dims, kind, 0, n_dims=n_dims), B))

    dims = "a tensor has 1 to 4 dimensions"
    fits = "a tensor is not larger than its file; checked before its size is computed"
    known = "tensor types are those of ggml that may stand in a file"
    removed = {4: "q4-2", 5: "q4-3", 9: "q8-1", 15: "q8-k", 31: "31", 32: "32", 33: "33", 38: "38"}
    return [
        one("n-dims-0", dims, "number of dimensions", (), n_dims=0),
        one("n-dims-5", dims, "number of dimensions", (8, 1, 1, 1, 1)),
        one("n-dims-million", dims, "number of dimensions", (8,), n_dims=10**6),
        one("n-dims-minus-1", dims, "number of dimensions", (8,), n_dims=-1),
        one("dim-0", "no dimension is empty", "empty dimension", (8, 0)),
        one("dim-minus-8", fits, "larger than the file", (-8,)),
        one("dim-2-63", fits, "larger than the file", (2**63,)),
        one("product-wraps-to-0", fits, "larger than the file", (2**32, 2**32)),
        one("product-wraps-to-8", fits, "larger than the file", (2**61 + 1, 8)),
        one("product-just-below-2-64", fits, "larger than the file", (2**60 - 1, 16), TENSOR_I8),
        one("bytes-wrap-to-32", fits, "larger than the file", (2**62 + 8,)),
        one("slightly-larger-than-the-file", fits, "larger than the file", (100,)),
        one("block-rows-wrap", fits, "larger than the file", (2**59, 32), TENSOR_Q4_0),
        case(
            "accumulated-size-wraps",
            fits,
            "larger than the file",
            with_infos(
                *(info(b"t%d" % i, (2**62,), TENSOR_I8, i * 2**62) for i in range(4)),
                info(b"t4", (64,), TENSOR_I8, 0),
            ),
        ),
        one("row-not-whole-blocks", "a row is whole blocks", "whole number", (8,), TENSOR_Q4_0),
        one("row-longer-than-blocks", "a row is whole blocks", "whole number", (33,), TENSOR_Q4_0),
        one("type-43", known, "unknown tensor type", (8,), 43),
        one("type-minus-1", known, "unknown tensor type", (8,), -1),
        *(
            one(f"type-{label}", known, "unknown tensor type", (32,), number)
            for number, label in removed.items()
        ),
    ]


def places() -> list[Case]:
    order = "each tensor starts where the padded one before it ends"
    whole = "the file ends with the last tensor, padded or not"

    def at(name: str, first: int, second: int) -> Case:
        infos = info(b"a", (8,), TENSOR_F32, first), info(b"b", (4, 2), TENSOR_F16, second)
        return case(f"offset-{name}", order, "not contiguous", with_infos(*infos))

    return [
        at("unaligned", 0, 37),
        at("past-end", 0, 2**20),
        at("near-2-64", 0, 2**64 - 32),
        at("first-near-2-64", 2**64 - 32, 0),
        at("overlap", 0, 0),
        at("out-of-order", 32, 0),
        at("hole", 0, 64),
        at("first-not-0", 32, 64),
        case("data-absent", whole, "ends inside the data of a", replace(GOOD, data=b"")),
        case(
            "data-short-by-1",
            whole,
            "ends inside the data of b",
            replace(GOOD, data=DATA_A + DATA_B[:-1]),
        ),
        case(
            "header-padding-absent",
            "data start aligned",
            "ends inside",
            replace(GOOD, pad=False, data=DATA_A + DATA_B),
        ),
        case(
            "trailing-byte-in-padding",
            whole,
            "bytes follow",
            replace(GOOD, data=DATA_A + DATA_B + PAD_B[:1]),
        ),
        case("trailing-bytes", whole, "bytes follow", replace(GOOD, data=GOOD.data + bytes(32))),
        case(
            "trailing-bytes-no-tensors",
            whole,
            "bytes follow",
            replace(GOOD, infos=(), data=bytes(32)),
        ),
        case(
            "header-padding-not-zero",
            "padding is zero",
            "padding is not zero",
            replace(GOOD, pad_byte=b"x"),
        ),
        case(
            "tensor-padding-not-zero",
            "padding is zero",
            "padding is not zero",
            replace(GOOD, data=DATA_A + DATA_B + b"x" * 16),
        ),
    ]


def shard(no: int, count: int, total: int, *tensors: str, extra: tuple[Fields, ...] = ()) -> RawGguf:
    split = (
        pair(b"split.no", U16, u32(no)[:2]),
        pair(b"split.count", U16, u32(count)[:2]),
        pair(b"split.tensors.count", 5, u32(total)),
    )
    infos = tuple(info(n.encode(), (8,), TENSOR_F32, 32 * i) for i, n in enumerate(tensors))
    first = (ARCHITECTURE,) if no == 0 else ()
    return RawGguf((*first, *split, *extra), infos, DATA_A * len(tensors))


def good_shards() -> dict[str, bytes]:
    """Two shards that open without complaint."""
    return {
        "m-00001-of-00002.gguf": shard(0, 2, 2, "a").encode(),
        "m-00002-of-00002.gguf": shard(1, 2, 2, "b").encode(),
    }


def shards() -> list[Case]:
    first, second = good_shards()
    total = "the shards hold split.tensors.count tensors together"
    numbers = "a shard knows its number and how many there are"

    def two(name: str, rule: str, message: str, one: RawGguf, other: RawGguf) -> Case:
        files = {first: one.encode(), second: other.encode()}
        return Case(f"shards-{name}", rule, message, files)

    def alone(name: str, rule: str, message: str, file: str, raw: RawGguf) -> Case:
        # a folder of its own, so that no other case's shard is beside it
        return Case(f"shards-{name}", rule, message, {file: raw.encode(), "note.txt": b"alone\n"})

    name = pair(b"general.name", STR, string(b"one"))
    other_name = pair(b"general.name", STR, string(b"other"))
    a, b = shard(0, 2, 2, "a"), shard(1, 2, 2, "b")
    return [
        alone("absent", "all shards are there", "a shard is missing", first, a),
        alone(
            "not-the-first",
            "the first shard is opened",
            "not the first",
            second,
            shard(1, 2, 2, "b", extra=(ARCHITECTURE,)),
        ),
        alone("name-lies", "names and split.count agree", "not the first", "m.gguf", a),
        alone("count-65535", "names and split.count agree", "not the first", first, shard(0, 65535, 2, "a")),
        alone("count-0", "names and split.count agree", "not the first", first, shard(0, 0, 2, "a")),
        alone(
            "count-not-integer",
            "split.count is an integer",
            "not an integer",
            first,
            replace(GOOD, pairs=(ARCHITECTURE, pair(b"split.count", STR, string(b"2")))),
        ),
        two("tensor-absent", total, "missing or left over", shard(0, 2, 3, "a"), shard(1, 2, 3, "b")),
        two("tensor-extra", total, "missing or left over", a, shard(1, 2, 2, "b", "c")),
        two("tensor-twice", "a tensor is in one shard", "in two shards", a, shard(1, 2, 2, "a")),
        two("number-lies", numbers, "wrong split.no", a, shard(0, 2, 2, "b")),
        two("count-lies", numbers, "wrong split.no", a, shard(1, 3, 2, "b")),
        two("no-split-keys", numbers, "not an integer", a, replace(GOOD, infos=(), data=b"")),
        two(
            "of-different-exports",
            "keys that two shards hold agree",
            "different exports",
            shard(0, 2, 2, "a", extra=(name,)),
            shard(1, 2, 2, "b", extra=(other_name,)),
        ),
        two("second-malformed", "every shard is checked", "not a GGUF", a, replace(b, magic=b"GGML")),
    ]

"""What parsing a graph may cost, and that nothing is parsed which would cost more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from tolerance import MALFORMED_MEMORY_BYTES, MALFORMED_SECONDS

from irq_formats.errors import MalformedFile
from irq_formats.onnx.data_file import DataTensor, data_offsets
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME
from irq_formats.onnx.wire import check_wire

MESSAGES, FIELDS = 1 << 17, 1 << 19


def field(number: int, content: bytes) -> bytes:
    """A field of bytes: text, a message, packed numbers."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


#: What every graph begins with: ONNX IR 10, opset 21, metadata.
HEAD = (
    b"\x08\x0a"
    + field(8, b"\x10\x15")
    + b"".join(
        field(14, field(1, f"irq.{key}".encode()) + field(2, value))
        for key, value in (
            ("version", b"1"),
            ("profile", b"irq"),
            ("attention", b"gqa"),
            ("base_hash", b"5e" * 32),
        )
    )
)
OP = field(4, b"A")  # its type: any name in ONNX's own domain may come
EXTERNAL = b"\x70\x01"  # where its data are
#: What fits the limits narrowly, and what does not; a kind of field each.
GRAPHS = {
    "nodes": field(7, field(1, OP + field(2, b"")) * (MESSAGES - 20)),
    "external initializers": field(7, field(5, EXTERNAL) * (MESSAGES - 20)),
    "attributes": field(
        7, field(1, OP + b"".join(field(5, field(1, b"%d" % i)) for i in range(MESSAGES - 20)))
    ),
    "inputs": field(7, field(1, OP + field(1, b"") * (FIELDS - 40))),
    "raw data": field(7, field(5, field(9, bytes((8 << 20) - 300)))),
    "metadata, more than fit": field(14, b"") * (3 << 20),
    "attributes, more than fit": field(7, field(1, field(5, b"") * (3 << 20))),
    "numbers, more than fit": field(7, field(1, field(5, field(8, bytes(7 << 20))))),
}

CHILD = """
import json, resource, sys, time
from irq_formats.errors import IrqError
from irq_formats.onnx.model_file import open_model
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
start = time.process_time()
try:
    open_model(sys.argv[2])
    said = "accepted"
except IrqError as error:
    said = error.message
print(json.dumps([time.process_time() - start, said]))
"""


def open_apart(folder: Path) -> tuple[float, str]:
    """Open a model in a process of its own, of limited address space: seconds, and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(MALFORMED_MEMORY_BYTES), str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, said = json.loads(done.stdout)
    return seconds, said


@pytest.mark.parametrize("name", GRAPHS)
def test_no_graph_costs_more_than_a_second_and_64_mib(name: str, tmp_path: Path) -> None:
    """Whether it is refused or not: address space of the process may grow by so much."""
    (tmp_path / MODEL_NAME).write_bytes(HEAD + GRAPHS[name])
    seconds, said = open_apart(tmp_path)
    assert seconds < MALFORMED_SECONDS
    assert (said == "more than a graph has") == ("more than fit" in name)


def test_many_tensors_cost_no_more(tmp_path: Path) -> None:
    """As many as a graph may have messages for, a gap of 4095 bytes behind each; the data file is sparse."""
    nbytes = (64 << 10) + 1
    data = [DataTensor(str(i), "uint8", (nbytes,), list) for i in range((MESSAGES - 20) // 4)]
    offsets, size = data_offsets(data)
    initializers = bytearray()
    for name, offset in offsets.items():
        entries = {"location": DATA_NAME, "offset": str(offset), "length": str(nbytes)}
        stored = (field(13, field(1, k.encode()) + field(2, v.encode())) for k, v in entries.items())
        tensor = b"\x08\x81\x80\x04\x10\x02" + field(8, name.encode()) + b"".join(stored)
        initializers += field(5, tensor + EXTERNAL)
    (tmp_path / MODEL_NAME).write_bytes(HEAD + field(7, bytes(initializers)))
    with (tmp_path / DATA_NAME).open("wb") as file:
        file.truncate(size)
    seconds, said = open_apart(tmp_path)
    assert said == "accepted"
    assert seconds < MALFORMED_SECONDS


@pytest.mark.parametrize(
    "data",
    [
        b"\x72",  # no length
        b"\x72\x80",
        b"\x72\x05ab",  # longer than the file
        field(7, b"\x0a\x02a"),  # longer than its message
        field(7, field(1, b"\x0d\x00\x00")),  # a fixed number cut short
        b"\x08" + b"\xff" * 10 + b"\x01",  # a number of eleven bytes
        b"\xff" * 1000,
        b"\x0b\x0c",  # a group
        b"\x0e",  # a wire type that does not exist
    ],
)
def test_what_is_no_protobuf_message_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedFile, match="not an ONNX model"):
        check_wire(data, onnx.ModelProto, where=Path("model"))


def test_the_count_is_that_of_the_schema() -> None:
    """The bytes of a text may look like messages; those of a number are numbers."""
    check_wire(field(2, field(1, b"") * FIELDS), onnx.ModelProto, where=Path("model"))
    check_wire(field(7, field(10, b"\n\0" * FIELDS)), onnx.ModelProto, where=Path("model"))
    with pytest.raises(MalformedFile, match="more than"):
        check_wire(field(7, field(5, field(1, bytes(FIELDS)))), onnx.ModelProto, where=Path("model"))

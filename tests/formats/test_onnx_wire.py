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
from irq_formats.onnx.model_file import MODEL_NAME
from irq_formats.onnx.wire import check_wire

MESSAGES, FIELDS = 1 << 17, 1 << 19


def field(number: int, content: bytes) -> bytes:
    """A field of bytes: text, a message, packed numbers."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


VERSION = field(14, field(1, b"irq.version") + field(2, b"1"))
OP = field(4, b"A")  # its type: any name in ONNX's own domain may come
EXTERNAL = b"\x70\x01"  # where its data are
#: What fits the limits narrowly, and what does not; a kind of field each.
GRAPHS = {
    "nodes": field(7, field(1, OP + field(2, b"")) * (MESSAGES - 10)),
    "external initializers": field(7, field(5, EXTERNAL) * (MESSAGES - 10)),
    "attributes": field(
        7, field(1, OP + b"".join(field(5, field(1, b"%d" % i)) for i in range(MESSAGES - 10)))
    ),
    "inputs": field(7, field(1, OP + field(1, b"") * (FIELDS - 30))),
    "raw data": field(7, field(5, field(9, bytes((8 << 20) - 100)))),
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


@pytest.mark.parametrize("name", GRAPHS)
def test_no_graph_costs_more_than_a_second_and_64_mib(name: str, tmp_path: Path) -> None:
    """Whether it is refused or not: address space of the process may grow by so much."""
    (tmp_path / MODEL_NAME).write_bytes(VERSION + GRAPHS[name])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(MALFORMED_MEMORY_BYTES), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seconds, said = json.loads(done.stdout)
    assert seconds < MALFORMED_SECONDS
    assert (said == "more than a graph has") == ("more than fit" in name)


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

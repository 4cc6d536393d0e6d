"""Malformed ONNX models: what external data, operators and attributes must never be.

A small model in ``formats/vectors/malformed/onnx``: one int4 matrix as operator and function, one matrix of
profile stock, a data file. Every case changes one thing. Links, pipes and directories are no files of a
repository: tests/formats/test_onnx_malformed.py makes them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from irq_formats.codecs import block_codec
from irq_formats.onnx.codes import to_onnx
from irq_formats.onnx.data_file import DataTensor, data_offsets
from irq_formats.onnx.model_file import DATA_NAME, MODEL_NAME
from irq_formats.onnx.operators import DOMAIN, IR_VERSION, OPSETS, VERSION, Operator, body, function
from irq_formats.onnx.ops import DTYPES, Ops
from scripts.malformed import Case

K, N, B = 128, 3, 64

Change = Callable[[onnx.ModelProto], None]


def well_formed() -> tuple[onnx.ModelProto, bytes]:
    """Return the model and its data file."""
    rng, arrays = np.random.default_rng(0), {}
    for codebook, module in (("int4", "linear"), ("nf4", "stock")):
        packed = block_codec(codebook, B).pack(rng.integers(0, 16, (N, K), dtype=np.uint8))
        arrays[f"{module}.codes"] = to_onnx(packed, codebook, codebook, B)
        for part in ("scale", "tau"):
            arrays[f"{module}.{part}"] = rng.uniform(0.5, 1.5, (N, K // B)).astype(np.float32)
    tensors = [DataTensor(name, a.dtype.name, a.shape, lambda a=a: [a]) for name, a in arrays.items()]
    offsets, size = data_offsets(tensors)
    data = bytearray(size)
    values = {}
    for tensor in tensors:
        start, dtype = offsets[tensor.name], DTYPES[tensor.dtype]
        data[start : start + tensor.nbytes] = arrays[tensor.name].tobytes()
        shape = ir.Shape(tensor.shape)
        stored = ir.ExternalTensor(DATA_NAME, start, tensor.nbytes, dtype, shape=shape, name=tensor.name)
        values[tensor.name] = ir.Value(
            name=tensor.name, shape=shape, type=ir.TensorType(dtype), const_value=stored
        )
    a = ir.Value(name="A", shape=ir.Shape(["batch", K]), type=ir.TensorType(DTYPES["float32"]))
    int4, nf4 = Operator("int4", B, has_tau=True), Operator("nf4", B, has_tau=True)
    ops = Ops()
    parts = [values[f"linear.{part}"] for part in ("codes", "scale", "tau")]
    attributes = {"codebook": "int4", "block_size": B, "K": K, "N": N}
    y = ops(int4.op_type, a, *parts, domain=DOMAIN, name="linear", **attributes)
    ops.scope("stock")
    z = body(nf4, ops, a, *(values[f"stock.{part}"] for part in ("codes", "scale", "tau")), n=N, k=K)
    out = ops("Add", y, z)
    out.name, out.shape, out.type = "Y", ir.Shape(["batch", N]), ir.TensorType(DTYPES["float32"])
    graph = ir.Graph(
        [a],
        [out],
        nodes=ops.nodes,
        initializers=list(values.values()),
        opset_imports={**OPSETS, DOMAIN: VERSION},
        name="irq",
    )
    metadata = {"irq.version": "1", "irq.profile": "irq", "irq.attention": "gqa", "irq.base_hash": "5e" * 32}
    model = ir.Model(graph, ir_version=IR_VERSION, functions=[function(int4)], metadata_props=metadata)
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto, bytes(data)


def cases() -> list[Case]:
    """Return every case."""
    found = [_changed(*entry) for entry in _CHANGES]
    proto, data = well_formed()
    graph = proto.SerializeToString(deterministic=True)
    for name, rule, message, files in (
        ("not-protobuf", "a model is an ONNX model", "not an ONNX model", {MODEL_NAME: b"\xff" * 64}),
        ("cut-short", "a model is complete", "not an ONNX model", {MODEL_NAME: graph[:-7], DATA_NAME: data}),
        (
            "data-short-by-1",
            "tensors lie in the file",
            "does not fit",
            {MODEL_NAME: graph, DATA_NAME: data[:-1]},
        ),
        ("data-missing", "the data file is there", "is missing", {MODEL_NAME: graph, "other": data[:1]}),
    ):
        found.append(Case(name, rule, message, files))
    # linear.scale ends at byte 216, linear.tau begins at 256; stock.tau lies last, bytes 576 to 600.
    last = data[576:]
    for name, message, offset, content in (
        ("gap-not-zero", "not zero", 576, data[:220] + b"\1" + data[221:]),
        ("data-follows", "bytes follow", 576, data + bytes(64)),
        ("offset-unaligned", "where none begins", 580, data[:576] + bytes(4) + last),
        ("offset-later", "where none begins", 640, data[:576] + bytes(64) + last),
    ):
        proto, _ = well_formed()
        _external("offset", str(offset), "stock.tau")(proto)
        files = {MODEL_NAME: proto.SerializeToString(deterministic=True), DATA_NAME: content}
        found.append(Case(name, "tensors lie one behind the other, aligned, zeros between", message, files))
    for name, rule, message, content in (
        ("field-past-its-message", "a field lies in its message", "not an ONNX model", b"\x3a\x02\x0a\x01A"),
        ("number-of-11-bytes", "numbers have ten bytes", "not an ONNX model", b"\x08" + b"\xff" * 10 + b"\1"),
        ("group", "protobuf's version 3 has no groups", "not an ONNX model", b"\x0b\x0c"),
    ):
        found.append(Case(name, rule, message, {MODEL_NAME: content, DATA_NAME: data}))
    return found


def _changed(name: str, rule: str, message: str, change: Change) -> Case:
    proto, data = well_formed()
    change(proto)
    files = {MODEL_NAME: proto.SerializeToString(deterministic=True), DATA_NAME: data}
    return Case(name, rule, message, files)


def _metadata(key: str, value: str | None) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        kept = [entry for entry in proto.metadata_props if entry.key != key]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        if value is not None:
            proto.metadata_props.add(key=key, value=value)

    return change


def _metadata_twice(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="irq.profile", value="irq")


def _all_locations(value: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            _entry(tensor, "location").value = value

    return change


def _external(key: str, value: str, name: str = "linear.scale") -> Change:
    def change(proto: onnx.ModelProto) -> None:
        _entry(_initializer(proto, name), key).value = value

    return change


def _again(key: str, value: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        _initializer(proto, "linear.scale").external_data.add(key=key, value=value)

    return change


def _attribute(name: str, value: int | str, node: str = "irq") -> Change:
    def change(proto: onnx.ModelProto) -> None:
        found = _node(proto, node)
        kept = [attribute for attribute in found.attribute if attribute.name != name]
        del found.attribute[:]
        found.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _dims(name: str, dims: list[int]) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        _initializer(proto, name).dims[:] = dims

    return change


def _initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def _entry(tensor: onnx.TensorProto, key: str) -> onnx.StringStringEntryProto:
    return next(entry for entry in tensor.external_data if entry.key == key)


def _node(proto: onnx.ModelProto, domain_or_op: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if domain_or_op in (node.domain, node.op_type))


def _constant(proto: onnx.ModelProto) -> onnx.TensorProto:
    return _node(proto, "Constant").attribute[0].t


def _constant_from_a_file(proto: onnx.ModelProto) -> None:
    tensor = _constant(proto)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")


def _function_constant_from_a_file(proto: onnx.ModelProto) -> None:
    constant = next(node for node in proto.functions[0].node if node.op_type == "Constant")
    constant.attribute[0].t.data_location = onnx.TensorProto.EXTERNAL
    constant.attribute[0].t.external_data.add(key="location", value="/etc/passwd")


def _subgraph(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("If", ["A"], ["B"], then_branch=onnx.GraphProto(name="g")))


def _recursive(proto: onnx.ModelProto) -> None:
    proto.functions[0].node.append(_node(proto, DOMAIN))
    proto.functions[0].opset_import.add(domain=DOMAIN, version=1)


def _body_of_another_size(proto: onnx.ModelProto) -> None:
    product = next(node for node in proto.functions[0].node if node.op_type == "MatMulNBits")
    attribute = next(attribute for attribute in product.attribute if attribute.name == "N")
    attribute.CopyFrom(helper.make_attribute("N", 1 << 30))


def _without_body(proto: onnx.ModelProto) -> None:
    del proto.functions[:]


def _function_of_onnx(proto: onnx.ModelProto) -> None:
    function = proto.functions.add()
    function.CopyFrom(proto.functions[0])
    function.domain, function.name = "", "Add"


def _twice(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(_initializer(proto, "linear.scale"))


def _opset(domain: str, version: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        kept = [entry for entry in proto.opset_import if entry.domain != domain]
        del proto.opset_import[:]
        proto.opset_import.extend([*kept, helper.make_opsetid(domain, version)])

    return change


def _not_imported(domain: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        kept = [entry for entry in proto.opset_import if entry.domain != domain]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)

    return change


def _of_ir(version: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        proto.ir_version = version

    return change


def _operator(domain: str, op_type: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        node = _node(proto, DOMAIN)
        node.domain, node.op_type = domain, op_type

    return change


def _long_constant(proto: onnx.ModelProto) -> None:
    _constant(proto).dims[:] = [1 << 40]


def _computed_codes(proto: onnx.ModelProto) -> None:
    _node(proto, DOMAIN).input[1] = "A"


_PLAIN = "the data file has a plain name in the model's folder"
_INSIDE = "tensors lie inside the data file, each with its bytes"
_SAME = "attributes and tensors of a matrix agree"
_KNOWN = "domains, versions and operators are those of the specification"
_TOLD = "the metadata say profile, attention and base"
_ONLY = "only initializers of the graph lie in the data file"

_CHANGES: list[tuple[str, str, str, Change]] = [
    ("location-parent", _PLAIN, "outside the model's folder", _all_locations("../model.onnx.data")),
    ("location-inner-parent", _PLAIN, "outside", _all_locations("a/../../model.onnx.data")),
    ("location-absolute", _PLAIN, "outside the model's folder", _all_locations("/etc/passwd")),
    ("location-folder", _PLAIN, "outside", _all_locations("sub/model.onnx.data")),
    ("location-backslash", _PLAIN, "outside", _all_locations("..\\model.onnx.data")),
    ("location-drive", _PLAIN, "outside", _all_locations("C:model.onnx.data")),
    ("location-dot", _PLAIN, "outside", _all_locations(".")),
    ("location-empty", _PLAIN, "outside", _all_locations("")),
    ("location-nul", _PLAIN, "outside", _all_locations("model.onnx.data\0.png")),
    ("location-memory", _PLAIN, "outside", _all_locations("*/_ORT_MEM_ADDR_/*")),
    ("location-device", _PLAIN, "outside", _all_locations("/dev/zero")),
    ("location-not-there", _PLAIN, "is missing", _all_locations("nothing.data")),
    ("location-two-files", _PLAIN, "several files", _external("location", "manifest.json")),
    ("location-twice", _PLAIN, "several files", _again("location", "/etc/passwd")),
    ("offset-past-end", _INSIDE, "does not fit", _external("offset", "1000000")),
    ("offset-negative", _INSIDE, "is no number", _external("offset", "-64")),
    ("offset-2-63", _INSIDE, "does not fit", _external("offset", str(2**63))),
    ("offset-wraps", _INSIDE, "is no number", _external("offset", str(2**64 - 64))),
    ("offset-hexadecimal", _INSIDE, "is no number", _external("offset", "0x40")),
    ("offset-4000-digits", _INSIDE, "is no number", _external("offset", "9" * 4000)),
    ("offset-twice", _INSIDE, "each once", _again("offset", "0")),
    ("offset-overlap", _INSIDE, "overlap", _external("offset", "0")),
    ("length-past-end", _INSIDE, "does not fit", _external("length", "1000000")),
    ("length-other", _INSIDE, "does not fit", _external("length", "20")),
    ("length-negative", _INSIDE, "is no number", _external("length", "-24")),
    ("dims-negative", _INSIDE, "dtype or shape", _dims("linear.scale", [-3, -2])),
    ("dims-product-wraps", _INSIDE, "does not fit", _dims("linear.scale", [1 << 32, 1 << 32])),
    ("dims-huge", _INSIDE, "does not fit", _dims("linear.codes", [1 << 40])),
    ("tensor-twice", _INSIDE, "two tensors", _twice),
    ("constant-from-a-file", _ONLY, "outside the initializers", _constant_from_a_file),
    ("body-constant-from-a-file", _ONLY, "outside the initializers", _function_constant_from_a_file),
    ("constant-longer-than-its-bytes", _INSIDE, "another size", _long_constant),
    ("domain-unknown", _KNOWN, "unknown domain", _opset("evil.ops", 1)),
    ("domain-version", _KNOWN, "unknown domain", _opset("irq", 2)),
    ("opset-version", _KNOWN, "unknown domain", _opset("", 99)),
    ("ir-version", _KNOWN, "unknown version of ONNX IR", _of_ir(99)),
    ("domain-not-imported", _KNOWN, "not imported", _not_imported("irq")),
    ("operator-unknown", _KNOWN, "unknown operator", _operator("irq", "RunCommand")),
    ("operator-of-another-domain", _KNOWN, "unknown operator", _operator("ai.onnx.contrib", "PyOp")),
    ("operator-of-onnxruntime", _KNOWN, "unknown operator", _operator("com.microsoft", "EPContext")),
    ("subgraph", _KNOWN, "subgraph", _subgraph),
    ("function-calls-itself", _KNOWN, "unknown operator", _recursive),
    ("function-over-onnx", _KNOWN, "unknown function", _function_of_onnx),
    ("function-missing", _KNOWN, "without a function body", _without_body),
    ("function-of-another-size", _SAME, "reads another matrix", _body_of_another_size),
    ("codebook-other", _SAME, "codebook", _attribute("codebook", "nf4")),
    ("codebook-number", _SAME, "codebook", _attribute("codebook", 4)),
    ("block-size-0", _SAME, "attributes", _attribute("block_size", 0)),
    ("block-size-16", _SAME, "attributes", _attribute("block_size", 16)),
    ("k-larger", _SAME, "of a matrix", _attribute("K", 2 * K)),
    ("k-negative", _SAME, "attributes", _attribute("K", -K)),
    ("k-string", _SAME, "attributes", _attribute("K", "128")),
    ("n-larger", _SAME, "of a matrix", _attribute("N", N + 1)),
    ("n-2-62", _SAME, "of a matrix", _attribute("N", 1 << 62)),
    ("stock-n-larger", _SAME, "of a matrix", _attribute("N", N + 1, "MatMulBnb4")),
    ("stock-k-0", _SAME, "attributes", _attribute("K", 0, "MatMulBnb4")),
    ("attribute-unknown", _SAME, "attributes", _attribute("custom_ops_library", "evil.so")),
    ("codes-computed", _SAME, "codes of a matrix", _computed_codes),
    ("profile-missing", _TOLD, "metadata", _metadata("irq.profile", None)),
    ("profile-unknown", _TOLD, "metadata", _metadata("irq.profile", "irq2")),
    ("profile-not-that-of-the-graph", _TOLD, "in profile stock", _metadata("irq.profile", "stock")),
    ("attention-missing", _TOLD, "metadata", _metadata("irq.attention", None)),
    ("attention-unknown", _TOLD, "metadata", _metadata("irq.attention", "gqa\n")),
    ("base-hash-missing", _TOLD, "key missing", _metadata("irq.base_hash", None)),
    ("base-hash-short", _TOLD, "not a hash", _metadata("irq.base_hash", "5e" * 31)),
    ("base-hash-upper-case", _TOLD, "not a hash", _metadata("irq.base_hash", "5E" * 32)),
    ("metadata-twice", _TOLD, "twice", _metadata_twice),
]

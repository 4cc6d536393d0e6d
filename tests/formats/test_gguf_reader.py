"""Reading GGUF: files of other writers, large vocabularies, shards, and files that change."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_strategies import ARCHITECTURE, source
from tolerance import HEADER_SECONDS

from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.gguf import F32, STR, GgmlType, TensorSource, ValueType, open_gguf, write_gguf
from scripts import raw_gguf


@pytest.fixture
def by_peer(tmp_path: Path) -> Path:
    """A file of gguf-py's writer."""
    path = tmp_path / "peer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list(["a", "ü", "c"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_add_bos_token(True)
    rng = np.random.default_rng(0)
    writer.add_tensor("f32", rng.standard_normal((3, 5)).astype(np.float32))
    writer.add_tensor("f16", rng.standard_normal((2, 3, 4)).astype(np.float16))
    x = rng.standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("q8", gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_file_of_another_writer(by_peer: Path) -> None:
    file = open_gguf(by_peer)
    assert file.path == by_peer
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 3
    assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == float(np.float32(1e-6))
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "ü", "c"]
    assert np.array_equal(file.metadata["tokenizer.ggml.scores"], [0.5, -1, 2])
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.values["llama.block_count"].type is ValueType.U32
    for tensor in gguf.GGUFReader(by_peer).tensors:
        ours = file.read(tensor.name)
        assert ours.shape == tensor.data.shape
        assert ours.tobytes() == tensor.data.tobytes()
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.read_f32(tensor.name), decoded.astype(np.float32))
    assert file.tensors["q8"].shape == (4, 64)


def test_a_large_vocabulary_parses_fast(tmp_path: Path) -> None:
    """49152 tokens and 48900 merges, as SmolLM2's."""
    tokens = [f"tök{i}" for i in range(49152)]
    metadata = {
        "tokenizer.ggml.tokens": STR.array(tokens),
        "tokenizer.ggml.merges": STR.array([f"{i} {i + 1}" for i in range(48900)]),
        "tokenizer.ggml.scores": F32.array(np.zeros(49152, np.float32)),
        "tokenizer.huggingface.json": STR("ü" * 2_000_000),
    }
    write_gguf(tmp_path / "x", ARCHITECTURE | metadata, [])
    start = time.process_time()
    file = open_gguf(tmp_path / "x")
    assert time.process_time() - start < HEADER_SECONDS
    assert file.metadata["tokenizer.ggml.tokens"] == tokens


@pytest.mark.parametrize("length", [0, 1, 4095, 262_135, 262_136, 262_137, 600_000])
def test_strings_across_the_reading_window(tmp_path: Path, length: int) -> None:
    """The header is read in windows of 256 KiB; strings may start, end or lie across anywhere."""
    strings = ["a", "ü" * length, "", "b" * length, *(str(i) for i in range(50_000)), "z"]
    write_gguf(tmp_path / "x", ARCHITECTURE | {"k": STR.array(strings)}, [])
    assert open_gguf(tmp_path / "x").metadata["k"] == strings


@pytest.mark.parametrize("pad", [True, False])
def test_last_padding_is_optional(tmp_path: Path, pad: bool) -> None:
    data = raw_gguf.DATA_A + raw_gguf.DATA_B + (raw_gguf.PAD_B if pad else b"")
    (tmp_path / "x").write_bytes(replace(raw_gguf.GOOD, data=data).encode())
    assert np.array_equal(open_gguf(tmp_path / "x").read_f32("b"), np.arange(8.0).reshape(2, 4))


@pytest.mark.parametrize("pad", [True, False])
def test_no_tensors(tmp_path: Path, pad: bool) -> None:
    (tmp_path / "x").write_bytes(replace(raw_gguf.GOOD, infos=(), data=b"", pad=pad).encode())
    assert open_gguf(tmp_path / "x").tensors == {}


def test_version_2(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(replace(raw_gguf.GOOD, version=2).encode())
    assert list(open_gguf(tmp_path / "x").tensors) == ["a", "b"]


def test_shards_of_another_writer(tmp_path: Path) -> None:
    """gguf-py splits after every tensor; opening the first shard opens them all."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    arrays = {name: np.arange(4, dtype=np.float32) + i for i, name in enumerate("abc")}
    for name, data in arrays.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert len(file.files) == 3
    assert [file.tensors[name].shard for name in "abc"] == [0, 1, 2]
    assert all(np.array_equal(file.read(name), data) for name, data in arrays.items())


class TestTensors:
    def test_unknown_name(self, by_peer: Path) -> None:
        with pytest.raises(UsageError, match="no such tensor"):
            open_gguf(by_peer).read("none")

    def test_type_without_decoder(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "x", ARCHITECTURE, [source("t", (2, 256), GgmlType.Q6_K)])
        file = open_gguf(tmp_path / "x")
        assert file.read("t").shape == (2, 210)
        with pytest.raises(UnsupportedModel, match="Q6_K"):
            file.read_f32("t")

    def test_bf16_is_the_upper_half(self, tmp_path: Path) -> None:
        raw = np.array([0x3F80, 0xC000, 0x7F80], np.uint16)
        write_gguf(tmp_path / "x", ARCHITECTURE, [TensorSource("t", (3,), GgmlType.BF16, lambda: raw)])
        assert open_gguf(tmp_path / "x").read_f32("t").tolist() == [1.0, -2.0, np.inf]

    def test_arrays_are_writable_copies(self, by_peer: Path) -> None:
        file = open_gguf(by_peer)
        file.read("f32")[:] = 0
        assert file.read("f32").any()


class TestChangingFile:
    """Data are read when asked for: what happens to the file meanwhile must not go unnoticed."""

    @pytest.mark.parametrize("keep", [0, 100, -1])
    def test_shrinks(self, by_peer: Path, keep: int) -> None:
        file = open_gguf(by_peer)
        os.truncate(by_peer, keep % by_peer.stat().st_size)
        with pytest.raises(MalformedFile, match="changed"):
            file.read("q8")

    def test_is_replaced(self, by_peer: Path) -> None:
        file = open_gguf(by_peer)
        copy = by_peer.with_name("copy")
        copy.write_bytes(by_peer.read_bytes())
        copy.replace(by_peer)
        with pytest.raises(MalformedFile, match="changed"):
            file.read("q8")

    def test_grows(self, by_peer: Path) -> None:
        file = open_gguf(by_peer)
        with by_peer.open("ab") as handle:
            handle.write(b"x")
        with pytest.raises(MalformedFile, match="changed"):
            file.read("q8")

    def test_shrinks_after_the_check(self, by_peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between fstat and read: a read returns less than was there."""
        file = open_gguf(by_peer)
        preadv = os.preadv

        def shrink(fd: int, buffers: list[memoryview], offset: int) -> int:
            os.truncate(by_peer, offset)
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", shrink)
        with pytest.raises(MalformedFile, match="changed"):
            file.read("q8")

    def test_read_error(self, by_peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = open_gguf(by_peer)

        def fail(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(MalformedFile, match="cannot be read"):
            file.read("q8")


class TestNoFile:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot be opened"):
            open_gguf(tmp_path / "none")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(MalformedFile, match="regular file"):
            open_gguf(tmp_path)

    def test_pipe_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(MalformedFile, match="regular file"):
            open_gguf(tmp_path / "pipe")

    def test_device(self) -> None:
        with pytest.raises(MalformedFile, match="regular file"):
            open_gguf("/dev/zero")


def test_sparse_giant_is_refused_soon(tmp_path: Path) -> None:
    """A hole of 1 TiB lets every count fit the file; the caps still hold."""
    key = raw_gguf.pair(b"k", raw_gguf.ARRAY, raw_gguf.array(raw_gguf.STR, 2**30))
    head = replace(raw_gguf.GOOD, pairs=(raw_gguf.ARCHITECTURE, key)).encode()
    (tmp_path / "x").write_bytes(head)
    os.truncate(tmp_path / "x", 2**40)
    with pytest.raises(MalformedFile, match="too many elements"):
        open_gguf(tmp_path / "x")

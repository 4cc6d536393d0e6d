"""Tokenizers out of files, and streaming of their text."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from irq_formats.errors import MalformedFile, UnsupportedModel
from irq_formats.gguf import BOOL, STR, U32, GgufValue, open_gguf, write_gguf
from irq_runtime.text_stream import TextStream
from irq_runtime.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import save_tiny_tokenizer

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve  spaces\n\ttab  'quotes' 1234 \u0000 end"


def byte_level() -> tokenizers.Tokenizer:
    """One token a byte, the smallest tokenizer that splits characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>"])
    return model


def in_file(path: Path, **keys: GgufValue) -> Tokenizer:
    metadata = {
        "general.architecture": STR("llama"),
        "tokenizer.huggingface.json": STR(byte_level().to_str()),
        "tokenizer.ggml.bos_token_id": U32(0),
        "tokenizer.ggml.eos_token_id": U32(1),
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    write_gguf(path, metadata, [], overwrite=True)
    return load_tokenizer(open_gguf(path))


def real_files(shared_data: Path) -> dict[str, Path]:
    models = shared_data / "models"
    return {"bpe": models / "smollm2-135m-instruct", "spm": models / "stories260k-fp32" / "hf"}


class TestLoad:
    def test_round_trip(self, tmp_path: Path) -> None:
        tokenizer = in_file(tmp_path / "t.gguf")
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.bos == 0
        assert tokenizer.stop_tokens == (1,)
        assert tokenizer.encode("a<s>")[-1] == 0

    def test_bos(self, tmp_path: Path) -> None:
        tokenizer = in_file(tmp_path / "t.gguf", tokenizer__ggml__add_bos_token=BOOL(True))
        assert tokenizer.encode("a")[0] == 0
        assert tokenizer.encode("<s>a").count(0) == 1
        assert tokenizer.encode("a", add_special=False)[0] != 0

    def test_several_stop_tokens(self, tmp_path: Path) -> None:
        keys = {"tokenizer__ggml__eot_token_id": U32(5), "tokenizer__ggml__eom_token_id": U32(1)}
        assert in_file(tmp_path / "t.gguf", **keys).stop_tokens == (1, 5)

    @pytest.mark.parametrize(
        "keys",
        [
            {"tokenizer__huggingface__json": STR("{}")},
            {"tokenizer__huggingface__json": STR("nonsense")},
            {"tokenizer__huggingface__json": U32(1)},
            {"tokenizer__ggml__bos_token_id": U32(10**6)},
            {"tokenizer__ggml__eos_token_id": STR("</s>")},
            {"tokenizer__chat_template": U32(1)},
        ],
        ids=str,
    )
    def test_malformed(self, keys: dict[str, GgufValue], tmp_path: Path) -> None:
        with pytest.raises(MalformedFile):
            in_file(tmp_path / "t.gguf", **keys)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "t.gguf", {"general.architecture": STR("llama")}, [])
        with pytest.raises(UnsupportedModel):
            load_tokenizer(open_gguf(tmp_path / "t.gguf"))

    @pytest.mark.parametrize("kind", ["bpe", "spm"])
    def test_equals_transformers(self, kind: str, shared_data: Path, tmp_path: Path) -> None:
        folder = real_files(shared_data)[kind]
        text = (folder / "tokenizer.json").read_text()
        tokenizer = in_file(tmp_path / "t.gguf", tokenizer__huggingface__json=STR(text))
        expected = AutoTokenizer.from_pretrained(folder)
        for sample in (TEXT, "Once upon a time", " leading", "a<|im_end|>b</s>", ""):
            assert tokenizer.encode(sample) == expected.encode(sample)


class TestStream:
    @pytest.mark.parametrize("kind", ["bytes", "bpe", "spm"])
    def test_pieces_are_whole_characters(self, kind: str, request: pytest.FixtureRequest) -> None:
        if kind == "bytes":
            model = byte_level()
        else:
            folder = real_files(request.getfixturevalue("shared_data"))[kind]
            model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = Tokenizer(model)
        ids = tokenizer.encode(TEXT)
        whole = tokenizer.decode(ids)
        for split in (0, 1, len(ids) // 2):
            stream = TextStream(tokenizer, ids[:split])
            pieces = [stream.push(token) for token in ids[split:]]
            assert not any("\ufffd" in piece for piece in pieces)
            if split == 0:
                assert "".join(pieces) + stream.finish() == whole

    def test_a_space_after_the_prompt_is_kept(self, shared_data: Path) -> None:
        path = real_files(shared_data)["spm"] / "tokenizer.json"
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        prompt = tokenizer.encode("Once")
        stream = TextStream(tokenizer, prompt)
        rest = tokenizer.encode("Once upon a")[len(prompt) :]
        assert "".join(stream.push(token) for token in rest) + stream.finish() == " upon a"

    @pytest.mark.parametrize(("cut", "expected"), [(0, "字x"), (1, "字x"), (2, "字x"), (3, "x"), (4, "")])
    def test_a_character_begun_in_the_prompt(self, cut: int, expected: str) -> None:
        tokenizer = Tokenizer(byte_level())
        ids = tokenizer.encode("字x")
        stream = TextStream(tokenizer, ids[:cut])
        assert "".join(stream.push(token) for token in ids[cut:]) + stream.finish() == expected

    def test_a_character_begun_after_one_that_is_broken(self) -> None:
        tokenizer = Tokenizer(byte_level())
        ids = tokenizer.encode("\ufffd字")
        stream = TextStream(tokenizer, ids[:-1])
        assert stream.push(ids[-1]) == "字"

    def test_what_never_becomes_a_character_is_the_prompt_s(self) -> None:
        tokenizer = Tokenizer(byte_level())
        ids = tokenizer.encode("a字")[:-1]
        for prompt in (ids, tokenizer.encode("a\ufffd")):
            stream = TextStream(tokenizer, prompt)
            assert [stream.push(token) for token in tokenizer.encode("xy")] == ["x", "y"]

    def test_unfinished_character_at_the_end(self) -> None:
        tokenizer = Tokenizer(byte_level())
        stream = TextStream(tokenizer)
        ids = tokenizer.encode("aé")[:-1]
        assert [stream.push(token) for token in ids] == ["a", ""]
        assert stream.finish() == "\ufffd"

    def test_unfinished_character_after_one_of_byte_tokens(self, tmp_path: Path) -> None:
        """Tokenizers' ByteFallback then gives U+FFFD for every byte of both."""
        model = save_tiny_tokenizer(tmp_path, "sentencepiece", bos=False)
        stream = TextStream(Tokenizer(model))
        ids = [model.token_to_id(f"<0x{byte:02X}>") for byte in "字字".encode()[:-1]]
        assert "".join(stream.push(token) for token in ids) + stream.finish() == "字\ufffd"

    @pytest.mark.parametrize(
        ("text", "stop", "expected", "stopped"),
        [
            ("one END two", ["END"], "one ", True),
            ("one EN two", ["END"], "one EN two", False),
            ("one EN", ["END"], "one EN", False),
            ("aab", ["ab"], "a", True),
            ("x</a>y", ["</b>", "</a>"], "x", True),
            ("x", [""], "x", False),
            ("é!", ["!"], "é", True),
        ],
    )
    def test_stop_strings(self, text: str, stop: list[str], expected: str, stopped: bool) -> None:
        tokenizer = Tokenizer(byte_level())
        stream = TextStream(tokenizer, stop=stop)
        pieces = [stream.push(token) for token in tokenizer.encode(text)]
        assert "".join(pieces) + stream.finish() == expected
        assert stream.stopped == stopped

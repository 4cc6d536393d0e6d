"""--tokenizer: stock files of others, which carry no tokenizer.json."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tokenizers
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from irq_export.cli import main
from irq_formats.errors import MalformedFile, UnsupportedModel, UsageError
from irq_formats.gguf import BOOL, STR, U32, GgufValue, open_gguf, write_gguf
from irq_runtime.completion import complete
from irq_runtime.tokenizer import load_tokenizer
from tests.tiny_files import write_stock

PROMPT = "Once upon a time"
OPENING = ", there was a little girl named Lily."


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260k-fp32" / "hf"


@pytest.fixture(scope="module")
def listed(folder: Path) -> dict[str, GgufValue]:
    """What a converter writes: tokens, special ones, the chat template, but no tokenizer.json."""
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [model.id_to_token(i) for i in range(model.get_vocab_size())]
    tokens[300:310] = [f"renamed {i}" for i in range(10)]  # converters normalise a few
    return {
        "tokenizer.ggml.tokens": STR.array(tokens),
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
        "tokenizer.ggml.add_bos_token": BOOL(True),
        "tokenizer.chat_template": STR("{{ messages[0].content }}"),
    }


@pytest.fixture(scope="module")
def hub(folder: Path, listed: dict[str, GgufValue], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "stories.gguf"
    write_stock(path, AutoModelForCausalLM.from_pretrained(folder), metadata=listed)
    return path


def header_only(path: Path, values: dict[str, GgufValue]) -> Path:
    write_gguf(path, {"general.architecture": STR("llama"), **values}, [])
    return path


class TestVerbs:
    def test_run(self, hub: Path, folder: Path) -> None:
        for source in (folder, folder / "tokenizer.json"):
            assert complete(model=hub, prompt=PROMPT, tokenizer=source).text.startswith(OPENING)
        command = ["run", str(hub), "-p", PROMPT, "--tokenizer", str(folder), "--chat", "-n", "12"]
        assert CliRunner().invoke(main, command).stdout.startswith(OPENING)

    def test_perplexity(self, hub: Path, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "t.txt").write_text((PROMPT + OPENING) * 10)
        command = ["perplexity", str(hub), str(tmp_path / "t.txt"), "-c", "32", "--json"]
        result = CliRunner().invoke(main, [*command, "--tokenizer", str(folder / "tokenizer.json")])
        assert 1 < json.loads(result.stdout)["perplexity"] < 20
        refused = CliRunner().invoke(main, command)
        assert (refused.exit_code, "--tokenizer" in refused.stderr) == (3, True)

    def test_serve(self, hub: Path, folder: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "irq_export",
            "serve",
            hub,
            "--tokenizer",
            folder,
            "--port",
            "0",
            "--json",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                ready = ""
                while not ready.endswith("\n}\n"):
                    ready += process.stdout.readline()
                url = json.loads(ready)["url"]
                body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                reply = httpx.post(f"{url}/completions", json=body, timeout=60).json()
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
            finally:
                process.kill()
        assert reply["choices"][0]["text"].startswith(OPENING)


class TestSource:
    def test_a_file_has_no_say_about_special_tokens(self, hub: Path, folder: Path) -> None:
        tokenizer = load_tokenizer(open_gguf(hub), folder / "tokenizer.json")
        assert (tokenizer.bos, tokenizer.stop_tokens) == (1, (2,))
        assert tokenizer.chat_template == "{{ messages[0].content }}"
        assert tokenizer.encode("Once")[0] == 1

    def test_a_directory_decides(self, hub: Path, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "<s>"}))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
        (tmp_path / "chat_template.jinja").write_text("mine")
        tokenizer = load_tokenizer(open_gguf(hub), tmp_path)
        assert (tokenizer.bos, tokenizer.stop_tokens, tokenizer.chat_template) == (2, (1, 5), "mine")

    def test_an_absurd_file_is_refused_unread(self, hub: Path, tmp_path: Path) -> None:
        with (tmp_path / "tokenizer.json").open("wb") as file:
            file.truncate(1 << 36)
        with pytest.raises(MalformedFile, match="too large"):
            load_tokenizer(open_gguf(hub), tmp_path)

    def test_the_hint_names_it(self, hub: Path) -> None:
        with pytest.raises(UnsupportedModel, match="--tokenizer"):
            load_tokenizer(open_gguf(hub))

    def test_another_model_s(self, hub: Path, shared_data: Path) -> None:
        with pytest.raises(UsageError, match="another model's"):
            load_tokenizer(open_gguf(hub), shared_data / "models" / "smollm2-135m-instruct")

    def test_a_file_without_a_list(self, folder: Path, tmp_path: Path) -> None:
        path = header_only(tmp_path / "t.gguf", {"tokenizer.ggml.bos_token_id": U32(1)})
        assert load_tokenizer(open_gguf(path), folder / "tokenizer.json").bos == 1

    @pytest.mark.parametrize("content", [b"{}", b"nonsense", b"\xff", b"[]"])
    def test_malformed(self, content: bytes, hub: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        for source in (tmp_path, tmp_path / "tokenizer.json"):
            with pytest.raises(MalformedFile, match="tokenizer"):
                load_tokenizer(open_gguf(hub), source)

    def test_missing(self, hub: Path, tmp_path: Path) -> None:
        for source in (tmp_path, tmp_path / "nowhere.json"):
            with pytest.raises(UsageError, match="cannot be opened"):
                load_tokenizer(open_gguf(hub), source)

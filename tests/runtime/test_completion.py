"""From a file to text: stories260K, through the library and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel

from irq_export.cli import main
from irq_formats.errors import UsageError
from irq_formats.gguf import BOOL, STR, U32
from irq_runtime.completion import complete
from irq_runtime.reference import load_model
from tests.tiny_files import write_stock
from tests.tolerance import NMSE_FLOAT64

PROMPT = "Once upon a time"
OPENING = ", there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> PreTrainedModel:
    folder = shared_data / "models" / "stories260k-fp32" / "hf"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def stories_gguf(
    stories: PreTrainedModel, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = shared_data / "models" / "stories260k-fp32" / "hf"
    path = tmp_path_factory.mktemp("stories") / "stories.gguf"
    metadata = {
        "tokenizer.huggingface.json": STR((folder / "tokenizer.json").read_text()),
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
        "tokenizer.ggml.add_bos_token": BOOL(True),
    }
    write_stock(path, stories, metadata=metadata)
    return path


def test_greedy_text(stories_gguf: Path) -> None:
    pieces: list[str] = []
    result = complete(model=stories_gguf, prompt=PROMPT, max_tokens=40, on_text=pieces.append)
    assert result.text.startswith(OPENING)
    assert "".join(pieces) == result.text
    assert (len(result.tokens), result.finish_reason) == (40, "length")


@pytest.mark.parametrize("runtime", ["reference", "native"])
def test_greedy_tokens_are_those_of_transformers(
    stories: PreTrainedModel, stories_gguf: Path, runtime: str
) -> None:
    result = complete(model=stories_gguf, prompt=PROMPT, max_tokens=200, runtime=runtime, dtype="float64")
    ids = torch.tensor([result.prompt_tokens])
    with torch.no_grad():
        expected = stories.double().generate(ids, max_new_tokens=200, do_sample=False)
    assert result.tokens == expected[0, ids.shape[1] :].tolist()


def test_logits_are_those_of_transformers(stories: PreTrainedModel, stories_gguf: Path) -> None:
    tokens = np.random.default_rng(0).integers(512, size=300).tolist()
    with torch.no_grad():
        expected = stories.double()(torch.tensor([tokens])).logits[0].numpy()
    got = load_model(stories_gguf).logits(tokens)
    assert np.mean((got - expected) ** 2) / np.var(expected) < NMSE_FLOAT64


def test_stop_string(stories_gguf: Path) -> None:
    result = complete(model=stories_gguf, prompt=PROMPT, stop=["Lily"])
    assert result.text == ", there was a little girl named "
    assert result.finish_reason == "stop"


def test_seeds_repeat(stories_gguf: Path) -> None:
    def run(seed: int) -> str:
        return complete(
            model=stories_gguf, prompt=PROMPT, max_tokens=20, temperature=1.0, top_p=0.9, seed=seed
        ).text

    assert run(3) == run(3)
    assert len({run(seed) for seed in range(4)}) > 1


def test_chat_without_a_template_is_refused(stories_gguf: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        complete(model=stories_gguf, prompt=PROMPT, chat=True)


class TestCommand:
    def test_text(self, stories_gguf: Path) -> None:
        run = CliRunner().invoke(main, ["run", str(stories_gguf), "-p", PROMPT, "-n", "40"])
        assert run.exit_code == 0
        assert run.stdout.startswith(OPENING)

    def test_json(self, stories_gguf: Path) -> None:
        arguments = ["run", str(stories_gguf), "-p", PROMPT, "-n", "8", "--json", "--stop", "girl"]
        run = CliRunner().invoke(main, arguments)
        document = json.loads(run.stdout)
        assert document["text"] == ", there was a little "
        assert document["finish_reason"] == "stop"

    def test_prompt_from_a_file(self, stories_gguf: Path, tmp_path: Path) -> None:
        (tmp_path / "prompt.txt").write_text(PROMPT)
        expected = CliRunner().invoke(main, ["run", str(stories_gguf), "-p", PROMPT, "-n", "8"]).stdout
        for name, stdin in ((str(tmp_path / "prompt.txt"), None), ("-", PROMPT)):
            run = CliRunner().invoke(main, ["run", str(stories_gguf), "-f", name, "-n", "8"], input=stdin)
            assert (run.exit_code, run.stdout) == (0, expected)
        (tmp_path / "prompt.txt").write_bytes(b"\xff")
        run = CliRunner().invoke(main, ["run", str(stories_gguf), "-f", str(tmp_path / "prompt.txt")])
        assert run.exit_code == 2

    def test_system_message(self, demo: Path) -> None:
        user = ["run", str(demo), "-p", "Hello", "--chat", "-n", "1", "--json"]
        alone, both = (
            json.loads(CliRunner().invoke(main, [*user, *more]).stdout)["prompt_tokens"]
            for more in ([], ["--system", "Be brief."])
        )
        assert both != alone
        assert CliRunner().invoke(main, ["run", str(demo), "-p", "x", "--system", "y"]).exit_code == 2

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["nowhere.gguf", "-p", "x"], 2),
            (["FILE", "-p", "x", "--top-p", "2"], 2),
            (["FILE", "-p", "x", "--chat"], 2),
            (["FILE"], 2),
            (["FILE", "-p", "x", "-f", "-"], 2),
            (["FILE", "-f", "nowhere.txt"], 2),
            (["FILE", "-p", "x", "--adapter", "FILE"], 3),
        ],
    )
    def test_exit_codes(self, arguments: list[str], code: int, stories_gguf: Path) -> None:
        given = [str(stories_gguf) if argument == "FILE" else argument for argument in arguments]
        assert CliRunner().invoke(main, ["run", *given]).exit_code == code

    def test_imports_neither_torch_nor_transformers(self, stories_gguf: Path) -> None:
        program = (
            "import sys; from irq_export.cli import main\n"
            f"try: main(['run', {str(stories_gguf)!r}, '-p', 'Once', '-n', '2'])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

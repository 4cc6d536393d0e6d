"""From a file to text: stories260K, through the library and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel

from irq_export.cli import main
from irq_formats.errors import UnsupportedModel, UsageError
from irq_formats.gguf import BOOL, STR, U32, GgmlType, TensorSource, open_gguf, write_gguf
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
    dtype = "float64" if runtime == "reference" else "float32"
    result = complete(model=stories_gguf, prompt=PROMPT, max_tokens=200, runtime=runtime, dtype=dtype)
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


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64"},
        {"dtype": "float64", "runtime": "native"},
        {"runtime": "reference", "mode": "fast"},
        {"runtime": "reference", "half_cache": True},
    ],
    ids=str,
)
def test_options_of_the_other_runtime_are_refused(stories_gguf: Path, options: dict[str, object]) -> None:
    """Rather than ignored."""
    with pytest.raises(UsageError, match="reference"):
        complete(model=stories_gguf, prompt=PROMPT, **options)


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
    assert len({run(-1) for _ in range(4)}) > 1


def test_chat_without_a_template_is_refused(stories_gguf: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        complete(model=stories_gguf, prompt=PROMPT, chat=True)


@pytest.fixture(scope="module")
def odd_gguf(stories: PreTrainedModel, stories_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stories with the last norm in Q2_0, all 2: the reference decodes it, the engine does not."""
    path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    source = open_gguf(stories_gguf)
    twos = np.frombuffer(np.float16(2).tobytes() + b"\xaa" * 16, np.uint8)  # d, then 64 codes 2: d (2 - 1)
    write_gguf(
        path,
        source.values,
        [
            TensorSource(name, tensor.shape, GgmlType.Q2_0, lambda: twos)
            if name == "output_norm.weight"
            else TensorSource(name, tensor.shape, tensor.type, partial(source.read, name))
            for name, tensor in source.tensors.items()
        ],
    )
    return path


class TestRuntimes:
    def test_auto_says_that_it_is_slow(self, odd_gguf: Path) -> None:
        notes: list[str] = []
        result = complete(model=odd_gguf, prompt=PROMPT, max_tokens=3, on_note=notes.append)
        assert len(result.tokens) == 3
        [note] = notes
        assert "output_norm.weight" in note
        assert "numpy" in note
        run = CliRunner().invoke(main, ["run", str(odd_gguf), "-p", PROMPT, "-n", "1", "--json"])
        assert "numpy" in run.stderr
        assert json.loads(run.stdout)["text"]

    def test_native_refuses_what_it_lacks(self, odd_gguf: Path) -> None:
        with pytest.raises(UnsupportedModel, match="output_norm"):
            complete(model=odd_gguf, prompt=PROMPT, runtime="native")

    def test_nothing_is_said_where_native_runs(self, stories_gguf: Path) -> None:
        notes: list[str] = []
        complete(model=stories_gguf, prompt=PROMPT, max_tokens=1, on_note=notes.append)
        assert not notes

    def test_unknown(self, stories_gguf: Path) -> None:
        with pytest.raises(UsageError, match="unknown runtime"):
            complete(model=stories_gguf, prompt=PROMPT, runtime="torch")


class TestContext:
    """stories260K was trained for 512 positions."""

    @pytest.mark.parametrize("max_tokens", [-1, 200_000_000])
    @pytest.mark.parametrize("runtime", ["native", "reference"])
    def test_a_text_ends_with_the_context(self, max_tokens: int, runtime: str, stories_gguf: Path) -> None:
        options = {"model": stories_gguf, "prompt": PROMPT, "runtime": runtime, "max_tokens": max_tokens}
        result = complete(context=20, **options)
        assert len(result.prompt_tokens) + len(result.tokens) == 20
        assert result.finish_reason == "length"

    def test_the_default_is_the_model_s(self, stories_gguf: Path) -> None:
        result = complete(model=stories_gguf, prompt=PROMPT, max_tokens=10**9, temperature=1.5)
        assert len(result.prompt_tokens) + len(result.tokens) <= 512

    def test_an_absurd_length_costs_no_memory(self, stories_gguf: Path) -> None:
        code = (
            "from irq_runtime.completion import complete; from irq_runtime.machine import peak_rss\n"
            f"run = lambda n: complete(model={str(stories_gguf)!r}, prompt='x', max_tokens=n, stop=['e'])\n"
            "run(1); before = peak_rss(); run(200_000_000); grown = (peak_rss() - before) >> 20\n"
            "assert grown < 64, grown"  # MiB; 1.6 GB when scores for every position were made
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"context": 513}, "no such context"),
            ({"context": 0}, "no such context"),
            ({"context": 5}, "fills the context"),
            ({"prompt": PROMPT * 200}, "fills the context"),
            ({"max_tokens": -2}, "max_tokens"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str, stories_gguf: Path) -> None:
        with pytest.raises(UsageError, match=message):
            complete(**{"model": stories_gguf, "prompt": PROMPT, "runtime": "reference", **options})


@pytest.mark.parametrize("option", ["--repetition-penalty", "--frequency-penalty", "--presence-penalty"])
def test_penalties(option: str, stories_gguf: Path) -> None:
    """So strong a penalty lets no token come again; without one they do."""
    command = ["run", str(stories_gguf), "-p", PROMPT, "-n", "60", "--json"]
    plain, penalised = (
        json.loads(CliRunner().invoke(main, [*command, *more]).stdout)["tokens"]
        for more in ([], [option, "90"])
    )
    assert len(set(plain)) < 60
    assert len(set(penalised)) == len(penalised) > 20


def test_half_cache(stories_gguf: Path) -> None:
    texts = {complete(model=stories_gguf, prompt=PROMPT, half_cache=half).text[:70] for half in (False, True)}
    assert texts == {OPENING[:70]}


def test_rates(stories_gguf: Path) -> None:
    result = complete(model=stories_gguf, prompt=PROMPT, max_tokens=8)
    start, first, *_, last = result.times
    assert result.prompt_rate == pytest.approx(len(result.prompt_tokens) / (first - start))
    assert result.decode_rate == pytest.approx(7 / (last - first))
    one = complete(model=stories_gguf, prompt=PROMPT, max_tokens=1)
    assert one.prompt_rate is not None
    assert one.decode_rate is None
    none = complete(model=stories_gguf, prompt=PROMPT, max_tokens=0)
    assert (none.prompt_rate, none.decode_rate) == (None, None)


class TestCommand:
    def test_speed_is_on_stderr(self, stories_gguf: Path) -> None:
        run = CliRunner().invoke(main, ["run", str(stories_gguf), "-p", PROMPT, "-n", "8"])
        pattern = r"prompt: 5 tokens, [\d.]+ tokens/s; reply: 8 tokens, [\d.]+ tokens/s\n"
        assert re.fullmatch(pattern, run.stderr), run.stderr
        assert "tokens/s" not in run.stdout
        run = CliRunner().invoke(main, ["run", str(stories_gguf), "-p", PROMPT, "-n", "8", "--json"])
        assert run.stderr == ""
        assert json.loads(run.stdout)["tokens_per_second"] > 0

    def test_context_options(self, stories_gguf: Path) -> None:
        command = ["run", str(stories_gguf), "-p", PROMPT, "-n", "-1", "-c", "16", "--half-cache", "--json"]
        document = json.loads(CliRunner().invoke(main, command).stdout)
        assert len(document["prompt_tokens"]) + len(document["tokens"]) == 16

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
        for name, stdin in ((str(tmp_path / "prompt.txt"), None), ("-", PROMPT + "\n")):
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

    def test_variables_of_the_template(self, stories_gguf: Path, tmp_path: Path) -> None:
        source = open_gguf(stories_gguf)
        template = STR("{% if think %}think{% endif %}{{ messages[0].content }}")
        write_gguf(
            tmp_path / "m.gguf",
            {**source.values, "tokenizer.chat_template": template},
            [
                TensorSource(name, tensor.shape, tensor.type, partial(source.read, name))
                for name, tensor in source.tensors.items()
            ],
        )
        command = ["run", str(tmp_path / "m.gguf"), "-p", PROMPT, "-n", "1", "--json"]
        plain, given = (
            json.loads(CliRunner().invoke(main, [*command, "--chat", *more]).stdout)["prompt_tokens"]
            for more in ([], ["--chat-template-kwargs", '{"think": true}'])
        )
        assert len(given) > len(plain)
        for wrong in ("[]", "{", "\udcff", '{"messages": []}'):
            result = CliRunner().invoke(main, [*command, "--chat", "--chat-template-kwargs", wrong])
            assert result.exit_code == 2, result.output
        assert CliRunner().invoke(main, [*command, "--chat-template-kwargs", '{"a": 1}']).exit_code == 2

    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            (["nowhere.gguf", "-p", "x"], 2),
            (["FILE", "-p", "x", "--top-p", "2"], 2),
            (["FILE", "-p", "x", "--chat"], 2),
            (["FILE", "-p", "\udcff"], 2),  # what Python makes of an argument that is not UTF-8
            (["FILE", "-p", "x", "-n", "-2"], 2),
            (["FILE", "-p", "x", "-c", "513"], 2),
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

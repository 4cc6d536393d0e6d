"""The command line: speed of --help, streams, exit codes, schemas."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import jsonschema
import pytest
from click.testing import CliRunner

from irq_export.cli import _VERBS, LazyGroup, main
from irq_export.cli.common import emit, force_option, json_option, verb
from irq_formats import errors

HEAVY = ("torch", "transformers", "peft", "onnx", "gguf", "xllamacpp", "jinja2")


def imported_by(arguments: list[str]) -> set[str]:
    """Heavy packages that a call of the command line imports."""
    code = (
        "import sys\nfrom irq_export.cli import main\n"
        f"try:\n    main({arguments!r}, standalone_mode=False)\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_help_is_fast_and_light() -> None:
    best = min(timed_help() for _ in range(3))
    assert best < 0.5, f"irq-export --help took {best:.2f} s"
    assert not imported_by(["--help"])


def timed_help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "irq_export", "--help"], capture_output=True, check=True)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["run", "inspect"])
def test_runtime_verbs_need_no_torch(name: str) -> None:
    assert not imported_by([name, "--help"]) & {"torch", "transformers", "peft"}


@pytest.mark.parametrize("name", list(_VERBS))
def test_every_verb_has_help(name: str) -> None:
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "--json" in result.output or name == "demo"


def test_unknown_verb_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["nonsense"]).exit_code == 2


@pytest.mark.parametrize(
    "kind",
    [
        errors.UsageError,
        errors.MalformedFile,
        errors.UnsupportedModel,
        errors.WrongBase,
        errors.ParityFailed,
        errors.PreflightRefused,
        errors.OutputExists,
    ],
)
def test_errors_become_exit_codes_and_json(kind: type[errors.IrqError], repo: Path) -> None:
    @click.group(cls=LazyGroup)
    def group() -> None: ...

    @click.command("fail")
    @json_option
    @force_option
    @verb
    def fail(as_json: bool, overwrite: bool) -> None:
        raise kind("went wrong", where="tensor x", expected=1, got=2, hint="do y")

    result = CliRunner().invoke(fail, ["--json"])
    assert result.exit_code == kind.exit_code
    document = json.loads(result.stdout)
    schema = json.loads((repo / "formats" / "schema" / "error.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert document["error"]["where"] == "tensor x"
    assert "error: tensor x: went wrong; expected 1, got 2. do y" in result.stderr.replace("\n", " ")
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["nonsense", "--json"], ["run", "--json"], ["quantize", "x", "--json", "--codebook", "nf5"]]
)
def test_refused_calls_are_json_too(arguments: list[str], repo: Path) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    document = json.loads(result.stdout)
    schema = json.loads((repo / "formats" / "schema" / "error.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert document["error"]["code"] == "usage"
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (PermissionError(13, "Permission denied", "secret"), 1, "error: secret: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, 'pip install "irq-export[train]"'),
    ],
)
def test_failures_of_the_machine_have_no_traceback(error: Exception, exit_code: int, message: str) -> None:
    @click.command("fail")
    @json_option
    @verb
    def fail(as_json: bool) -> None:
        raise error

    result = CliRunner().invoke(fail, ["--json"])
    assert result.exit_code == exit_code
    assert message in result.stderr.replace("\n", " ")
    assert isinstance(result.exception, SystemExit)
    assert json.loads(result.stdout)["error"]["message"]


def test_bugs_keep_their_traceback() -> None:
    @click.command("fail")
    @json_option
    @verb
    def fail(as_json: bool) -> None:
        raise ZeroDivisionError("oops")

    result = CliRunner().invoke(fail, ["--json"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
    assert json.loads(result.stdout)["error"]["code"] == "internal"


def test_interrupt_is_130() -> None:
    @click.command("stop")
    @verb
    def stop() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(stop).exit_code == 130


def test_results_are_one_json_document() -> None:
    @click.command("good")
    @json_option
    @verb
    def good(as_json: bool) -> None:
        emit({"answer": 1}, "the answer is 1", as_json=as_json)

    assert json.loads(CliRunner().invoke(good, ["--json"]).stdout) == {"schema": "irq.export/1", "answer": 1}
    assert CliRunner().invoke(good).stdout == "the answer is 1\n"

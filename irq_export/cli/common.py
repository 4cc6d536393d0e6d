"""What every verb of the command line shares: streams, JSON, exit codes.

stdout carries the result only (with ``--json`` one document, errors too); progress and messages go
to stderr, without ANSI when that is not a terminal or NO_COLOR is set. Exit codes: 0 ok, 1 bug,
2 usage, 3 bad or unsupported input, 4 parity failed, 5 refused by preflight, 6 output exists,
130 interrupted.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click
from rich.console import Console

from irq_formats.errors import IrqError, UsageError
from irq_runtime.machine import default_threads

__all__ = [
    "console",
    "emit",
    "force_option",
    "json_option",
    "progress",
    "threads_option",
    "tokenizer_option",
    "verb",
]

F = TypeVar("F", bound=Callable[..., Any])

#: Schema name of every JSON document on stdout.
SCHEMA = "irq.export/1"

#: Packages that the base install does not have, and the extra that brings them.
_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate"), "train"),
    **dict.fromkeys(("bitsandbytes", "datasets", "yaml"), "train"),
    **dict.fromkeys(("onnx", "onnx_ir", "onnxruntime"), "onnx"),
    "onnxruntime_genai": "genai",
    "xllamacpp": "llamacpp",
    "lm_eval": "evaluate",
}

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
threads_option = click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 256),
    default=default_threads,
    show_default="the cores of this machine",
    help="Of the native engine.",
)
tokenizer_option = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json, or the model's Hugging Face directory, for a file that carries none.",
)
force_option = click.option("--force", "overwrite", is_flag=True, help="Replace an existing output.")


def console() -> Console:
    """Return the console on stderr."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def emit(result: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result of a verb: ``text`` for people, or ``result`` as one JSON document."""
    click.echo(json.dumps({"schema": SCHEMA, **result}, indent=2, allow_nan=False) if as_json else text)


def verb(function: F) -> F:
    """Turn errors of a verb into its exit code, on stderr and, with ``--json``, on stdout."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        as_json = bool(kwargs.get("as_json"))
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return function(*args, **kwargs)
        except IrqError as error:
            _fail(error, as_json=as_json)
        except KeyboardInterrupt:
            console().print("interrupted; unfinished outputs were removed", markup=False)
            sys.exit(130)
        except BrokenPipeError:  # the reader of stdout has seen enough: click's affair
            raise
        except OSError as error:
            message = error.strerror or str(error)
            _fail(IrqError(message, where=error.filename), as_json=as_json)
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            hint = f'Install it with: pip install "irq-export[{_EXTRAS[error.name]}]"'
            _fail(UsageError(f"this needs {error.name}, which is not installed", hint=hint), as_json=as_json)
        except Exception as error:  # a bug: the traceback is for its report
            if as_json:
                text = f"{type(error).__name__}: {error}"
                emit({"error": IrqError(text, hint="Please report this bug").to_dict()}, "", as_json=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)

    return run  # type: ignore[return-value]


def _fail(error: IrqError, *, as_json: bool) -> NoReturn:
    """Say what went wrong and exit."""
    if as_json:
        emit({"error": error.to_dict()}, "", as_json=True)
    console().print(f"error: {error}", style="red", markup=False)
    sys.exit(error.exit_code)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on Ctrl-C: through the handlers that remove partial files."""
    raise KeyboardInterrupt


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on stderr if that is a terminal; yield ``update(done, total, label)``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    screen = console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bars:
        task = bars.add_task(title, total=None)

        def update(done: int, total: int, label: str) -> None:
            bars.update(task, completed=done, total=total, description=f"{title}: {label}")

        yield update

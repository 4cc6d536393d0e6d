"""The command line. Verbs live in modules of their own, imported only when called."""

from __future__ import annotations

from importlib import import_module

import click

from irq_export import __version__

__all__ = ["main"]

#: verb -> (module, one line of help). The module's ``command`` is the click command.
_VERBS = {
    "demo": ("demo", "Quantise, export, run and prove the model that ships in this package."),
    "import": ("import_checkpoint", "Turn a bitsandbytes or released IR-QLoRA model into a checkpoint."),
    "calibrate": ("calibrate", "Measure on a text what each input of every linear carries."),
    "quantize": ("quantize", "Quantise a Hugging Face model to 2-4 bits."),
    "train": ("train", "Fine-tune a model with IR-QLoRA."),
    "fold-adapter": ("fold_adapter", "Turn an IR-QLoRA adapter into a plain PEFT adapter, exactly."),
    "to-gguf": ("to_gguf", "Pack a checkpoint into GGUF, bit for bit."),
    "to-onnx": ("to_onnx", "Write a checkpoint as an ONNX model, bit for bit."),
    "inspect": ("inspect", "Show what a GGUF file or a checkpoint holds."),
    "run": ("run", "Generate text from a GGUF file."),
    "bench": ("bench", "Measure the speed of a GGUF file."),
    "perplexity": ("perplexity", "Measure how well a GGUF file predicts a text."),
    "serve": ("serve", "Serve a GGUF file over OpenAI's protocol."),
    "evaluate": ("evaluate", "Run benchmarks on one model, or on two side by side."),
    "verify": ("verify", "Prove that an exported file computes what the checkpoint computes."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use, so that ``--help`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of a user's work."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one verb."""
        if cmd_name not in _VERBS:
            return None
        command = import_module(f"irq_export.cli.{_VERBS[cmd_name][0]}").command
        return command if isinstance(command, click.Command) else None

    def invoke(self, ctx: click.Context) -> object:
        """Run a verb; with ``--json``, a call that click refuses is a JSON document on stdout too."""
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if as_json:
                from irq_export.cli.common import emit

                emit({"error": {"code": "usage", "message": error.format_message()}}, "", as_json=True)
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 unexpected, 2 usage, 3 bad or unsupported input, 4 parity failed, "
    "5 refused by preflight, 6 output exists, 130 interrupted.",
)
@click.version_option(__version__, prog_name="irq-export")
def main() -> None:
    """What you fine-tuned in 2-4 bits is exactly what runs on the device."""

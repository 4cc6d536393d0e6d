"""The options of ``to-onnx``, checked against each other before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from irq_formats.errors import UsageError

__all__ = ["DTYPES", "OnnxOptions"]

_PROFILES = ("irq", "stock")
_ATTENTIONS = ("gqa", "standard")
DTYPES = {"f32": "float32", "f16": "float16"}

#: A file name on every system: no device of Windows, whatever its suffix, and no dot at an end.
_PLAIN_NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))\w([\w.-]{0,98}[\w-])?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """What to make of a checkpoint.

    Attributes:
        profile: ``irq`` (operators of our domain with function bodies) or ``stock`` (the bodies alone).
        attention: ``gqa`` (onnxruntime's GroupQueryAttention) or ``standard`` (plain ONNX operators; the
            matrices of nf4 and int4 are products of onnxruntime's own nevertheless).
        dtype: ``f32`` or ``f16``, of activations and of everything that is not a code, a norm or an adapter.
        adapters: PEFT directories; none takes the checkpoint's own, if it has one.
        bake_adapter: Put the one adapter into the model, as side branches that cannot be swapped.
        adapter_slots: Give every linear layer inputs for an adapter.
        int_bits: ``4``: int3 and int2 are carried in 4-bit integers, which stock onnxruntime multiplies
            fast; ``own``: they keep their 3 and 2 bits.
        context: Positions the model is exported for; None takes those it was made for.
        library: Put our library, built for this machine, beside the model: onnxruntime-genai loads it.

    Raises:
        UsageError: An unknown value, or options that contradict each other.
    """

    profile: str = "irq"
    attention: str = "gqa"
    dtype: str = "f32"
    adapters: Sequence[str | Path] = ()
    bake_adapter: bool = False
    adapter_slots: bool = True
    int_bits: str = "4"
    context: int | None = None
    library: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("profile", _PROFILES),
            ("attention", _ATTENTIONS),
            ("dtype", tuple(DTYPES)),
            ("int_bits", ("4", "own")),
        ):
            if (got := getattr(self, name)) not in allowed:
                raise UsageError(f"unknown {name}", expected=" | ".join(allowed), got=got)
        if self.bake_adapter and len(self.adapters) > 1:
            raise UsageError("one adapter can be baked in", expected=1, got=len(self.adapters))
        if self.adapters and not (self.adapter_slots or self.bake_adapter):
            raise UsageError("a model without adapter inputs takes no adapter", got=str(self.adapters[0]))
        names = [self.adapter_name(path) for path in self.adapters]
        if len({name.casefold() for name in names}) < len(names):  # the same file on many systems
            raise UsageError("two adapters of one name", got=", ".join(names))
        if self.library and self.profile != "irq":
            raise UsageError("profile stock has no nodes for the library", expected="irq", got=self.profile)
        if self.context is not None and self.context < 1:
            raise UsageError("context out of range", expected=">= 1", got=self.context)

    @staticmethod
    def adapter_name(path: str | Path) -> str:
        """Return the name of an adapter's file, without suffix: that of its directory.

        Raises:
            UsageError: The directory's name is no plain file name.
        """
        name = Path(path).resolve().name
        if not _PLAIN_NAME.fullmatch(name):
            raise UsageError(
                "the adapter's directory needs a plain name",
                where=path,
                expected="letters, digits, _, - and dots, none at an end, and no device of Windows",
            )
        return name

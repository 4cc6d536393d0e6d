"""The options of ``to-gguf``, checked against each other before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from irq_export.export.gguf.pre_tokenizer import LLAMACPP_NAMES
from irq_formats.errors import UsageError
from irq_formats.gguf import GgmlType

__all__ = ["ADAPTER_MODES", "INT2_TYPES", "MERGE_TYPES", "NF_TYPES", "PROFILES", "GgufOptions"]

PROFILES = ("irq", "stock")
ADAPTER_MODES = ("keep", "fold", "merge", "drop")
INT2_TYPES = ("auto", "q2_0", "q4_0")
NF_TYPES = ("q8_0", "bf16")
MERGE_TYPES = {"f16": GgmlType.F16, "bf16": GgmlType.BF16, "f32": GgmlType.F32}


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """What to make of a checkpoint.

    Attributes:
        profile: ``irq`` (our runtime, bit for bit) or ``stock`` (unmodified llama.cpp).
        adapter_dir: PEFT directory of the adapter; None takes the checkpoint's own, if it has one.
        adapter: ``keep``; ``fold`` its elastic connections; ``merge`` it into the weights (with a merge
            type); ``drop``. In stock files it is always folded, in merged ones always merged.
        separate_adapter: Profile irq: write the adapter to ``STEM.adapter.gguf`` beside the model.
        merge: ``f16``, ``bf16`` or ``f32``: one stock file of floating-point weights.
        int2_type: Profile stock, int2: ``q2_0``, ``q4_0`` or ``auto`` (q2_0 where blocks are 64), as None.
        nf_type: Profile stock, nf codebooks: ``q8_0`` (codes; tau in the adapter), as None, or ``bf16``
            (decoded weights, tau inside).
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, if it is not recognised.

    Raises:
        UsageError: An unknown value, or options that contradict each other or do nothing together.
    """

    profile: str = "irq"
    adapter_dir: str | Path | None = None
    adapter: str = "keep"
    separate_adapter: bool = False
    merge: str | None = None
    int2_type: str | None = None
    nf_type: str | None = None
    pre_tokenizer: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("profile", PROFILES),
            ("adapter", ADAPTER_MODES),
            ("merge", (None, *MERGE_TYPES)),
            ("int2_type", (None, *INT2_TYPES)),
            ("nf_type", (None, *NF_TYPES)),
        ):
            if (got := getattr(self, name)) not in allowed:
                raise UsageError(f"unknown {name}", expected=" | ".join(filter(None, allowed)), got=got)
        if self.adapter == "merge" and self.merge is None:
            raise UsageError(
                "merging the adapter into 2-4 bits quantises it again: that is not what was trained",
                hint="Use --adapter keep, or --merge bf16 for one floating-point file",
            )
        if self.separate_adapter and (self.is_stock or self.adapter == "drop"):
            raise UsageError("a separate adapter file belongs to profile irq, with an adapter")
        if self.merge is not None and self.profile == "stock":
            raise UsageError(
                "--merge writes one file, profile stock a pair", hint="Leave out --profile, or --merge"
            )
        for option, value in (("--int2-type", self.int2_type), ("--nf-type", self.nf_type)):
            if value is not None and not self.is_pair:
                raise UsageError(f"{option} is for the pair of files of profile stock", got=value)
        if self.pre_tokenizer is not None and self.pre_tokenizer not in LLAMACPP_NAMES:
            near = get_close_matches(self.pre_tokenizer, sorted(LLAMACPP_NAMES))
            raise UsageError(
                "llama.cpp has no such pre-tokenizer",
                expected=", ".join(near) or "a name of llama-vocab.cpp, such as gpt-2, llama-bpe, qwen2",
                got=self.pre_tokenizer,
            )

    @property
    def is_stock(self) -> bool:
        """Whether llama.cpp must be able to read the result."""
        return self.profile == "stock" or self.merge is not None

    @property
    def is_pair(self) -> bool:
        """Whether the result is the directory of a stock pair."""
        return self.profile == "stock" and self.merge is None

"""``to-gguf``: a checkpoint as GGUF, in profile irq (bit for bit), stock (a pair) or merged (floats).

:func:`plan_gguf` says what would be written; :func:`to_gguf` writes it and reads it back.
"""

from __future__ import annotations

from irq_export.export.gguf.convert import ExportResult, OutputFile, plan_gguf, to_gguf
from irq_export.export.gguf.plan import Plan

__all__ = ["ExportResult", "OutputFile", "Plan", "plan_gguf", "to_gguf"]

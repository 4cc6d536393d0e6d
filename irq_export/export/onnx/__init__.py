"""``to-onnx``: a checkpoint as an ONNX model with its adapters beside it (spec/irq-onnx.md).

:func:`plan_onnx` says what would be written; :func:`to_onnx` writes it and reads it back.
"""

from __future__ import annotations

from irq_export.export.onnx.convert import OnnxResult, plan_onnx, to_onnx
from irq_export.export.onnx.plan import OnnxPlan

__all__ = ["OnnxPlan", "OnnxResult", "plan_onnx", "to_onnx"]

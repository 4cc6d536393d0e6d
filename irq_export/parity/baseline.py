"""Comparing a report with an earlier one, for CI: what held must hold, what was measured must not get worse.

Gates say what is right; a baseline says what was reached. A change that makes a comparison a thousand times
noisier and still passes its gate fails here. Figures and how much each may grow are in :data:`FIGURES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from irq_export.parity.gates import FLOAT64_NMSE
from irq_export.parity.report import REPORT_SCHEMA, Check, ParityReport
from irq_formats.errors import MalformedFile, UsageError
from irq_formats.strict_json import parse_object

__all__ = ["FIGURES", "Figure", "compare_with_baseline", "read_baseline"]


@dataclass(frozen=True)
class Figure:
    """A number of a report, and how far it may move for the worse.

    Attributes:
        factor: Times its old value...
        slack: ... plus this. A share (higher is better) may fall by ``slack`` instead.
        higher_is_better: Whether it is a share of agreement.
        sampled: How many positions must agree anyway: a share may fall by as many of them.
    """

    factor: float = 1.0
    slack: float = 0.0
    higher_is_better: bool = False
    sampled: int = 0

    def limit(self, before: float, positions: float | None) -> float:
        """Return the worst value that passes."""
        if not self.higher_is_better:
            return self.factor * before + self.slack
        return before - max(self.slack, self.sampled / positions if positions else 0.0)

    def holds(self, now: float, limit: float) -> bool:
        """Return whether a value is within its limit."""
        return now >= limit if self.higher_is_better else now <= limit


#: Rounding noise depends on the order of sums, so on the processor: another machine moves NMSE and mean KL by
#: tens of percent (two builds of llama.cpp are further from each other on SmolLM2, 1.8e-3, than from their
#: float32 evaluation, 1.0e-3), the tail of a few hundred positions by more. Below ``FLOAT64_NMSE`` all is
#: float64 rounding. Weights repeat exactly; the perplexity of noisy kernels moves in the third digit.
FIGURES: dict[str, Figure] = {
    "nmse": Figure(factor=2.0, slack=FLOAT64_NMSE),
    "kl_mean": Figure(factor=2.0, slack=FLOAT64_NMSE),
    "kl_p999": Figure(factor=4.0, slack=10 * FLOAT64_NMSE),
    "top1": Figure(slack=0.01, higher_is_better=True, sampled=2),
    "top10": Figure(slack=0.01, higher_is_better=True, sampled=2),
    "perplexity": Figure(factor=1.005),
    "weight_nmse": Figure(factor=1.001, slack=1e-14),
}


def read_baseline(path: str | Path) -> dict[str, Any]:
    """Read an earlier JSON report.

    Raises:
        UsageError: There is no such file.
        MalformedFile: It is not a report of ``irq-export verify``.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UsageError("the baseline cannot be read", where=path, got=error.strerror) from error
    document = parse_object(text, where=path)
    checks = document.get("checks")
    if document.get("schema") != REPORT_SCHEMA or not isinstance(checks, list):
        raise MalformedFile(
            "not a report of verify",
            where=path,
            expected=REPORT_SCHEMA,
            got=document.get("schema"),
            hint="Write one with: irq-export verify FILE --against CHECKPOINT --report REPORT.json",
        )
    for check in checks:
        complete = isinstance(check, Mapping) and {"level", "name", "passed", "values"} <= check.keys()
        kinds = {"level": str, "name": str, "values": Mapping}
        if not complete or not all(isinstance(check[key], kind) for key, kind in kinds.items()):
            raise MalformedFile("a check of the report is not complete", where=path)
    return dict(document)


def compare_with_baseline(report: ParityReport, baseline: Mapping[str, Any]) -> ParityReport:
    """Return the report with one more check, of level ``baseline``, for every check of the earlier one.

    Args:
        report: The new one.
        baseline: From :func:`read_baseline`.
    """
    now = {(check.level, check.name): check for check in report.checks}
    found = [
        _compare(old, now.get((old["level"], old["name"])))
        for old in baseline["checks"]
        if old["level"] != "baseline"
    ]
    return replace(report, checks=(*report.checks, *found))


def _compare(old: Mapping[str, Any], new: Check | None) -> Check:
    name = f"{old['level']}: {old['name']}"
    if new is None:
        return Check("baseline", name, False, "was checked before and is not now", gate="the same checks")
    if old["passed"] and not new.passed:
        return Check("baseline", name, False, "held before and does not now", gate="what held holds")
    positions = old["values"].get("positions")
    if positions != new.values.get("positions"):
        detail = f"measured over {positions} positions before, {new.values.get('positions')} now"
        return Check("baseline", name, False, detail, gate="the same text and positions")
    values = {
        key: _figure(figure, old["values"][key], new.values.get(key, math.nan), positions)
        for key, figure in FIGURES.items()
        if _is_number(old["values"].get(key))  # null: it was not finite, so nothing can have got worse
    }
    worse = [key for key, value in values.items() if not value["holds"]]
    shown = worse or list(values)[:1]
    detail = ", ".join(
        f"{key} {values[key]['before']:.3g} before, {values[key]['now']:.3g} now" for key in shown
    )
    gate = ", ".join(f"{key} {_sign(key)} {values[key]['limit']:.3g}" for key in shown)
    return Check("baseline", name, not worse, detail or "holds as before", values, gate or "what held holds")


def _figure(figure: Figure, before: float, now: float, positions: float | None) -> dict[str, Any]:
    limit = figure.limit(before, positions)
    return {"before": before, "now": now, "limit": limit, "holds": figure.holds(now, limit)}


def _sign(key: str) -> str:
    return ">=" if FIGURES[key].higher_is_better else "<="


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

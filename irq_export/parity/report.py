"""What a verification found: checks, gates, and the forms a report is written in."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from irq_export.parity.metrics import LogitMetrics

__all__ = ["REPORT_SCHEMA", "Check", "ParityReport", "nmse_check"]

#: Version of the JSON report (formats/schema/parity-report.schema.json).
REPORT_SCHEMA = "irq.parity/1"


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        level: ``container``, ``tensors``, ``tokenizer``, ``memory``, ``kernels``, ``logits``, ``greedy`` or
            ``baseline``.
        name: What was compared with what.
        passed: The verdict; None if it is only reported, without a gate.
        detail: What was measured, in one line.
        values: The numbers behind it.
        gate: The bound that decided, as text.
    """

    level: str
    name: str
    passed: bool | None
    detail: str
    values: dict[str, Any] = field(default_factory=dict)
    gate: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return {
            "level": self.level,
            "name": self.name,
            "passed": self.passed,
            "detail": self.detail,
            "gate": self.gate,
            "values": _plain(self.values),
        }


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def nmse_check(name: str, metrics: LogitMetrics, bound: float) -> Check:
    """Return the check that log-probabilities are apart by at most ``bound`` in NMSE."""
    return Check(
        "logits",
        name,
        metrics.nmse <= bound,
        f"NMSE {metrics.nmse:.2e}, KL {metrics.kl_mean:.2e}, top-1 {metrics.top1:.1%}, "
        f"perplexity {metrics.perplexity:.4f} ({metrics.perplexity_reference:.4f}), "
        f"{metrics.positions} positions",
        {**metrics.to_dict(), "nmse_bound": bound},
        f"NMSE <= {bound:g}",
    )


@dataclass(frozen=True)
class ParityReport:
    """All checks of one run.

    Attributes:
        file: The exported file or directory.
        checkpoint: What it was compared with.
        checks: In the order they were made.
        environment: Versions of what took part.
        wall_s: Seconds the verification took.
    """

    file: str
    checkpoint: str
    checks: tuple[Check, ...]
    environment: dict[str, str]
    wall_s: float

    @property
    def passed(self) -> bool:
        """True if no gate failed and at least one decided."""
        verdicts = [check.passed for check in self.checks if check.passed is not None]
        return bool(verdicts) and all(verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as its JSON document."""
        return {
            "schema": REPORT_SCHEMA,
            "file": self.file,
            "checkpoint": self.checkpoint,
            "passed": self.passed,
            "wall_s": round(self.wall_s, 3),
            "environment": self.environment,
            "checks": [check.to_dict() for check in self.checks],
        }

    def to_json(self) -> str:
        """Return the JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_junit(self) -> str:
        """Return JUnit XML, one test case per gated check, for CI systems."""
        gated = [check for check in self.checks if check.passed is not None]
        suite = ElementTree.Element(
            "testsuite",
            name="irq-export verify",
            tests=str(len(gated)),
            failures=str(sum(not check.passed for check in gated)),
            time=f"{self.wall_s:.3f}",
        )
        for check in gated:
            case = ElementTree.SubElement(suite, "testcase", classname=check.level, name=check.name)
            if not check.passed:
                failure = ElementTree.SubElement(case, "failure", message=check.gate or "failed")
                failure.text = check.detail
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"

    def to_text(self) -> str:
        """Return the table for people."""
        mark = {True: "ok  ", False: "FAIL", None: "    "}
        lines = [
            f"{mark[check.passed]} {check.level:<10} {check.name}: {check.detail}"
            + (f"  [{check.gate}]" if check.gate else "")
            for check in self.checks
        ]
        verdict = "equal" if self.passed else "NOT EQUAL"
        return "\n".join([*lines, f"{self.file} and {self.checkpoint}: {verdict} ({self.wall_s:.1f} s)"])

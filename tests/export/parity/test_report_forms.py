"""Reports against a baseline, and as a page: made by hand, so that every verdict is reached."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from irq_export.parity.baseline import FIGURES, compare_with_baseline, read_baseline
from irq_export.parity.html import to_html
from irq_export.parity.report import Check, ParityReport
from irq_formats.errors import MalformedFile, UsageError

LOGITS = {
    "positions": 256,
    "nmse": 1e-10,
    "max_abs": 1e-4,
    "kl_mean": 1e-9,
    "kl_p999": 1e-8,
    "top1": 0.98,
    "top10": 0.99,
    "perplexity_reference": 20.0,
    "perplexity": 20.0,
    "nmse_bound": 1e-9,
}


def report(passed: bool | None = True, **values: Any) -> ParityReport:
    """A tensor check and a logits check with some values changed."""
    tensors = Check("tensors", "file against checkpoint", True, "equal", {"weight_nmse": 0.0}, "bit-equal")
    logits = Check("logits", "native exact", passed, "NMSE", {**LOGITS, **values}, "NMSE <= 1e-9")
    return ParityReport("m.gguf", "checkpoint", (tensors, logits), {"numpy": "2"}, 1.0)


def against(new: ParityReport, old: ParityReport) -> list[Check]:
    """The checks of level baseline."""
    found = compare_with_baseline(new, json.loads(old.to_json()))
    assert found.checks[: len(new.checks)] == new.checks
    return [check for check in found.checks if check.level == "baseline"]


def test_an_equal_report_holds(repo: Path) -> None:
    found = compare_with_baseline(report(), json.loads(report().to_json()))
    assert found.passed
    assert len(found.checks) == 4
    schema = json.loads((repo / "formats" / "schema" / "parity-report.schema.json").read_text())
    jsonschema.validate(json.loads(found.to_json()), schema)
    again = compare_with_baseline(report(), json.loads(found.to_json()))
    assert len(again.checks) == 4  # a baseline's own comparison is not compared


@pytest.mark.parametrize("figure", sorted(FIGURES))
def test_every_figure_fails_just_beyond_its_tolerance(figure: str) -> None:
    name = "tensors" if figure == "weight_nmse" else "logits"
    old = report()
    index = 0 if name == "tensors" else 1
    before = old.checks[index].values[figure]
    limit = FIGURES[figure].limit(before, 256)
    for factor, holds in ((1 - 1e-9, True), (1 + 1e-9, False)):
        sign = -1 if FIGURES[figure].higher_is_better else 1
        values = {**old.checks[index].values, figure: limit * (1 + sign * (factor - 1))}
        checks = list(old.checks)
        checks[index] = replace(checks[index], values=values)
        verdicts = {c.name.split(":")[0]: c for c in against(replace(old, checks=tuple(checks)), old)}
        assert verdicts[name].passed is holds, verdicts[name]
        if not holds:
            assert figure in verdicts[name].detail


def test_better_figures_hold() -> None:
    assert all(c.passed for c in against(report(nmse=0.0, kl_mean=0.0, top1=1.0, perplexity=10.0), report()))


def test_what_held_must_hold_and_be_checked() -> None:
    lost = against(report(passed=False), report())
    assert [check.passed for check in lost] == [True, False]
    assert "does not now" in lost[1].detail
    shorter = replace(report(), checks=report().checks[:1])
    assert "is not now" in against(shorter, report())[1].detail
    assert all(check.passed for check in against(report(), shorter))
    assert all(check.passed for check in against(report(passed=True), report(passed=False)))
    other_text = against(report(positions=128), report())
    assert other_text[1].passed is False
    assert "256 positions before, 128 now" in other_text[1].detail


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_figure_that_is_no_longer_a_number_fails(value: float | None, repo: Path) -> None:
    """Also one that is not measured any more; every form of the report can be written."""
    lost = report(passed=True, nmse=value)
    if value is None:
        del lost.checks[1].values["nmse"]
    found = compare_with_baseline(lost, json.loads(report().to_json()))
    assert [check.passed for check in found.checks[2:]] == [True, False]
    document = json.loads(found.to_json())
    schema = json.loads((repo / "formats" / "schema" / "parity-report.schema.json").read_text())
    jsonschema.validate(document, schema)
    assert document["checks"][1]["values"].get("nmse") is None
    assert ElementTree.fromstring(found.to_junit()).get("failures") == "1"
    for plot in to_html(found).split("<svg")[1:]:
        for shape in ElementTree.fromstring("<svg" + plot.split("</svg>")[0] + "</svg>").iter("rect"):
            assert 330 <= float(shape.get("x", "nan")) <= 900


def test_a_baseline_that_was_not_finite_asks_nothing() -> None:
    old = json.loads(report(passed=False, nmse=math.nan).to_json())
    assert compare_with_baseline(report(), old).passed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": "irq.parity/1", "checks": [{}]}',
        '{"schema": "irq.parity/1", "checks": [{"level": [], "name": "", "passed": true, "values": {}}]}',
    ],
)
def test_what_is_no_baseline(text: str, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(MalformedFile):
        read_baseline(tmp_path / "old.json")
    with pytest.raises(UsageError):
        read_baseline(tmp_path / "none.json")


class Page(HTMLParser):
    """Tags, attributes that load something, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_all_and_loads_nothing() -> None:
    found = compare_with_baseline(report(nmse=9e-10), json.loads(report().to_json()))
    page = Page(to_html(found))
    assert not page.loads
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 3
    assert "NOT EQUAL" in page.text  # nine times the baseline's NMSE
    for check in found.checks:
        assert check.name in page.text
        assert check.detail in page.text


def test_the_plots_are_well_formed() -> None:
    page = to_html(compare_with_baseline(report(), json.loads(report(nmse=0.0).to_json())))
    plots = page.split("<svg")[1:]
    assert len(plots) == 3
    for plot in plots:
        svg = ElementTree.fromstring("<svg" + plot.split("</svg>")[0] + "</svg>")
        for shape in svg.iter("rect"):
            assert float(shape.get("width", "nan")) >= 2
            assert 330 <= float(shape.get("x", "nan")) <= 900


def test_names_from_files_are_escaped() -> None:
    name = "<script>alert('x')</script>&"
    page = to_html(replace(report(), file=name, environment={name: name}))
    assert "<script" not in page
    assert Page(page).text.count(name) >= 2


def test_a_report_without_numbers_has_no_plots() -> None:
    bare = ParityReport("f", "c", (Check("container", "x", True, "fine"),), {}, 0.0)
    assert "<svg" not in to_html(bare)

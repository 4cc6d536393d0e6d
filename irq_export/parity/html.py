"""A report as one HTML page that loads nothing: tables, and plots as inline SVG.

Everything that comes from files or users is escaped, and the page forbids scripts and connections itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from irq_export.parity.report import Check, ParityReport

__all__ = ["to_html"]

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --dim: #666; --line: #ccc;
  --ok: #1a7f37; --bad: #c62828; --bar: #4a78b5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --dim: #999; --line: #444; --ok: #57ab5a; --bad: #ff6b6b; --bar: #79a6dc } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
code { overflow-wrap: anywhere }
.ok { color: var(--ok); font-weight: 600 } .bad { color: var(--bad); font-weight: 600 }
.dim { color: var(--dim) }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif } svg .dim { fill: var(--dim) }
svg .bar { fill: var(--bar) } svg .over { fill: var(--bad) } svg .tick { stroke: var(--line) }
svg .gate { stroke: var(--ink); stroke-width: 2 }
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_LEFT, _WIDTH, _ROW = 330, 900, 26  # pixels: of labels, of a plot, of one of its rows


@dataclass(frozen=True)
class _Bar:
    """A row of a plot: a range of values on a logarithmic axis, and a mark."""

    label: str
    low: float
    high: float
    mark: float | None
    is_over: bool


def to_html(report: ParityReport) -> str:
    """Return the page, UTF-8 text."""
    verdict = '<span class="ok">equal</span>' if report.passed else '<span class="bad">NOT EQUAL</span>'
    logits = [check for check in report.checks if "nmse" in check.values]
    history = [check for check in report.checks if check.level == "baseline" and "nmse" in check.values]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>irq-export verify: {escape(report.file)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{verdict}: {_code(report.file)} and {_code(report.checkpoint)}</h1>",
        f'<p class="dim">{report.wall_s:.1f} s; '
        + ", ".join(f"{escape(name)} {escape(version)}" for name, version in report.environment.items())
        + "</p>",
        _table(report.checks),
        _plot(
            "NMSE of log-probabilities",
            "mark: the most that passes",
            [_nmse(check) for check in logits if check.level == "logits"],
        ),
        _plot(
            "KL divergence from the trained model, nats a position",
            "from the mean to the 99.9th percentile",
            [_kl(check) for check in logits if check.level == "logits"],
        ),
        _plot(
            "NMSE against the baseline",
            "from the lower to the higher of before and now; mark: the most that passes",
            [_change(check) for check in history],
        ),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(checks: Iterable[Check]) -> str:
    rows = []
    for check in checks:
        kind, word = {True: ("ok", "ok"), False: ("bad", "FAIL"), None: ("dim", "reported")}[check.passed]
        cells = (check.level, check.name, check.detail, check.gate or "")
        rows.append(f'<tr><td class="{kind}">{word}</td>' + "".join(f"<td>{escape(c)}</td>" for c in cells))
    head = "".join(f"<th>{title}</th>" for title in ("", "Level", "Check", "Found", "Gate"))
    return f"<h2>Checks</h2>\n<table><tr>{head}</tr>\n" + "</tr>\n".join(rows) + "</tr></table>"


def _nmse(check: Check) -> _Bar:
    bound = check.values.get("nmse_bound")
    return _Bar(check.name, 0.0, check.values["nmse"], bound, check.passed is False)


def _kl(check: Check) -> _Bar:
    return _Bar(check.name, check.values["kl_mean"], check.values["kl_p999"], None, check.passed is False)


def _change(check: Check) -> _Bar:
    figure = check.values["nmse"]
    low, high = sorted((figure["before"], figure["now"]))
    return _Bar(check.name, low, high, figure["limit"], not figure["holds"])


def _plot(title: str, note: str, bars: Sequence[_Bar]) -> str:
    """Draw bars over powers of ten; those from 0 begin at the left edge. Nothing to draw: no plot."""
    values = [v for bar in bars for v in (bar.low, bar.high, bar.mark) if v is not None and 0 < v < math.inf]
    if not values:
        return ""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    last = max(last, first + 1)

    def x(value: float) -> float:
        if value <= 0:
            return _LEFT
        exponent = min(max(math.log10(value), first), last) if math.isfinite(value) else last
        return _LEFT + (exponent - first) / (last - first) * (_WIDTH - _LEFT - 90)

    height = _ROW * len(bars) + 30
    step = max(1, (last - first) // 8)
    lines = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for exponent in range(first, last + 1, step):
        at = x(10.0**exponent)
        lines.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height - 22}"/>')
        lines.append(
            f'<text class="dim" x="{at:.1f}" y="{height - 6}" text-anchor="middle">1e{exponent}</text>'
        )
    for row, bar in enumerate(bars):
        y, begin, end = row * _ROW + 6, x(bar.low), x(bar.high)
        label = bar.label if len(bar.label) <= 50 else bar.label[:49] + "…"
        shape = "over" if bar.is_over else "bar"
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        lines.append(
            f'<rect class="{shape}" x="{begin:.1f}" y="{y}" width="{max(end - begin, 2):.1f}" height="14">'
            f"<title>{escape(bar.label)}: {bar.low:.3g} to {bar.high:.3g}</title></rect>"
        )
        if bar.mark is not None:
            at = x(bar.mark)
            lines.append(f'<line class="gate" x1="{at:.1f}" x2="{at:.1f}" y1="{y - 3}" y2="{y + 17}"/>')
        right = max(end, begin, x(bar.mark) if bar.mark is not None else 0.0) + 6
        lines.append(f'<text class="dim" x="{right:.1f}" y="{y + 12}">{bar.high:.2g}</text>')
    return f'<h2>{escape(title)}</h2>\n<p class="dim">{escape(note)}</p>\n' + "\n".join([*lines, "</svg>"])

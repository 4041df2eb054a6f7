"""Writes results as an HTML page with inline plots, or as Markdown. Neither loads anything over a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from surfw.bench.compare import Change, Comparison
from surfw.bench.result import Result, Row
from surfw.config import printable
from surfw.errors import ConfigurationError

_WIDTH, _BAR, _GAP, _NAMES = 720, 16, 8, 260
_BLOCKS = 24
_STYLE = """\
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667;--bar:#3b78c2;--base:#9aa7b5;--bad:#c0392b;
--good:#2e8b57;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--dim:#98a2b0;--bar:#6ea8e8;--base:#5d6875;--bad:#ff8a7a;
--good:#7fd6a4;--page:#14181d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:2rem auto;
padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.2rem .8rem .2rem 0;text-align:right}
td:first-child,th:first-child{text-align:left}.dim{color:var(--dim)}.worse{color:var(--bad)}.better{color:var(--good)}
svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
"""


def write_report(path: Path, results: Sequence[Result], comparisons: Sequence[Comparison] = ()) -> None:
    """Write a page: HTML if the file's suffix is `.html`, otherwise Markdown.

    Args:
        path: the file to write.
        results: the results to show.
        comparisons: the comparison of each result with an earlier one; or empty.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    page = (html_page if path.suffix == ".html" else markdown_page)(results, comparisons)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be written: {exc.strerror or exc}; name another file") from exc


def html_page(results: Sequence[Result], comparisons: Sequence[Comparison] = ()) -> str:
    """Make the HTML page, with one plot per unit."""
    head = (
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\n"
        f"<title>surfw bench</title>\n<style>{_STYLE}</style>\n<h1>surfw bench</h1>\n"
    )
    parts = [head]
    for place, result in enumerate(results):
        parts.append(f"<h2>{_text(result.benchmark)}</h2>\n")
        parts += [_plot(rows) for rows in _by_unit(result.rows)]
        parts.append(_html_table(_HEADINGS, [_cells(row) for row in result.rows]))
        for one in comparisons[place : place + 1]:
            parts.append(f"<h3>against {_text(one.file)}</h3>\n")
            rows = [_change_cells(change) for change in one.changes]
            parts.append(_html_table(_CHANGES, rows, [change.verdict for change in one.changes]))
            parts.append(f"<p class=dim>{_text(one.verdict_from)}\n")
        parts += [f"<p class=dim>{_text(row.name)}: {_text(row.note)}\n" for row in result.rows if row.note]
        parts.append(f"<p class=dim>on {_text(_machine(result))}\n")
    return "".join(parts) + "</html>\n"


def markdown_page(results: Sequence[Result], comparisons: Sequence[Comparison] = ()) -> str:
    """Make the Markdown page, with bars of block characters."""
    lines = ["# surfw bench", ""]
    for place, result in enumerate(results):
        most = {row.unit: max(one.value for one in result.rows if one.unit == row.unit) for row in result.rows}
        bars = ["█" * round(_BLOCKS * row.value / most[row.unit]) if most[row.unit] > 0 else "" for row in result.rows]
        rows = [(*_cells(row), bar) for row, bar in zip(result.rows, bars, strict=True)]
        lines += [f"## {_cell(result.benchmark)}", "", *_markdown_table((*_HEADINGS, ""), rows), ""]
        for one in comparisons[place : place + 1]:
            changes = [_change_cells(change) for change in one.changes]
            lines += [f"Against {_cell(one.file)}:", "", *_markdown_table(_CHANGES, changes), ""]
            lines += [f"- {_cell(one.verdict_from)}"]
        lines += [f"- {_cell(row.name)}: {_cell(row.note)}" for row in result.rows if row.note]
        lines += ["", f"On {_cell(_machine(result))}", ""]
    return "\n".join(lines)


_HEADINGS = ("", "value", "low–high", "baseline", "ratio", "ceiling", "share")
_CHANGES = ("", "ratio before", "now", "change", "95 % interval", "")


def _cells(row: Row) -> tuple[str, ...]:
    spread = f"{row.low:.3g}–{row.high:.3g}" if row.low is not None and row.high is not None else ""
    others = ("" if one is None else f"{one:.3g}" for one in (row.baseline, row.ratio, row.ceiling, row.share))
    return row.name, f"{row.value:.3g} {row.unit}", spread, *others


def _change_cells(one: Change) -> tuple[str, ...]:
    shown = ["" if value is None else f"{value:.3g}" for value in (one.before, one.now)]
    return one.name, *shown, percent_of(one.change), interval_of(one), one.verdict


def percent_of(change: float | None) -> str:
    """Format a change: `-18 %`."""
    return "" if change is None else f"{change * 100:+.0f} %"


def interval_of(one: Change) -> str:
    """Format the interval of a change: `-20 % … -16 %`."""
    return "" if one.low is None or one.high is None else f"{percent_of(one.low)} … {percent_of(one.high)}"


def _machine(result: Result) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.machine.items())


def _text(value: str) -> str:
    return escape(printable(value))


def _cell(value: str) -> str:
    return escape(printable(value), quote=False).replace("|", "\\|")


def _by_unit(rows: Sequence[Row]) -> list[list[Row]]:
    return [[row for row in rows if row.unit == unit] for unit in dict.fromkeys(row.unit for row in rows)]


def _plot(rows: Sequence[Row]) -> str:
    """Draw bars as SVG, each with a line from the worst to the best round and a mark for the ceiling."""
    most = max(max(row.value, row.high or 0.0, row.ceiling or 0.0) for row in rows)
    if most <= 0:
        return ""
    scale = (_WIDTH - _NAMES - 80) / most
    height = len(rows) * (_BAR + _GAP)
    parts = [f"<svg viewBox='0 0 {_WIDTH} {height}' width={_WIDTH} role=img>"]
    for place, row in enumerate(rows):
        top = place * (_BAR + _GAP)
        middle, color = top + _BAR / 2, "var(--base)" if row.baseline is None else "var(--bar)"
        length = max(1.0, row.value * scale)
        parts.append(f"<text x={_NAMES - 8} y={top + 12} text-anchor=end>{_text(row.name[:40])}</text>")
        parts.append(f"<rect x={_NAMES} y={top} width={length:.1f} height={_BAR} fill='{color}'/>")
        if row.low is not None and row.high is not None:
            ends = f"x1={_NAMES + row.low * scale:.1f} x2={_NAMES + row.high * scale:.1f}"
            parts.append(f"<line {ends} y1={middle} y2={middle} stroke='var(--ink)'/>")
        if row.ceiling is not None:
            at = f"{_NAMES + row.ceiling * scale:.1f}"
            parts.append(f"<line x1={at} x2={at} y1={top} y2={top + _BAR} stroke='var(--dim)' stroke-dasharray=2 />")
        end = _NAMES + max(length, (row.high or 0) * scale) + 6
        parts.append(f"<text x={end:.1f} y={top + 12}>{_text(f'{row.value:.3g} {row.unit}')}</text>")
    return "".join(parts) + "</svg>\n"


def _html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    head = "".join(f"<th>{_text(one)}" for one in headings)
    body = "".join(
        f"<tr class={kinds[place] if kinds else 'row'}>" + "".join(f"<td>{_text(one)}" for one in row) + "\n"
        for place, row in enumerate(rows)
    )
    return f"<table><tr>{head}\n{body}</table>\n"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *([_cell(one) for one in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]

"""Output that several commands share: consoles, tables, JSON. Untrusted text cannot control the terminal."""

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from surfw.cli import signals
from surfw.cli.screen import has_styles
from surfw.cli.streams import can_draw, one_line
from surfw.config import escape_json, printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_GAP = 2
"""Columns between two cells of a table."""
_PIECES = re.compile(r"[^\s/]*/\s*|[^\s/]+\s*")
"""The pieces of a cell that are never broken: words, and parts of a path."""
_FULL_BAR_COLUMNS = 72


class _CleanConsole(Console):
    """A console that cleans all text; rich's own control codes pass."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, with all text cleaned."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(printable(piece.text, lines=True), piece.style)

    @property
    def file(self) -> IO[str]:
        """The stream beneath the cleaning, and beneath a live view's proxy."""
        file = super().file
        while (inner := getattr(file, "rich_proxied_file", file)) is not file:
            file = inner
        return file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


def make_console(**options: Any) -> Console:
    """Make a console; the options are those of rich."""
    # with None, rich sends no codes for bold and dim text either
    styles: Literal["auto"] | None = "auto" if has_styles() else None
    return _CleanConsole(highlight=False, markup=False, emoji=False, color_system=styles, **options)


out, err = make_console(), make_console(stderr=True)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(escape_json(json.dumps(value, ensure_ascii=False, allow_nan=False)) + "\n")
    sys.stdout.flush()


def show(result: T, view: Callable[[T], None], *, json: bool) -> None:
    """Show a result: as one JSON object of its fields, or with `view`."""
    if json:
        print_json(asdict(result))
    else:
        view(result)


def say(text: str) -> None:
    """Print a text on stdout as one line; on a narrow terminal, it is wrapped between words."""
    out.print(one_line(text), soft_wrap=not out.is_terminal)


def pair_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Make a table of names and values."""
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> Table:
    """Make a table. The columns in `numbers` are right-aligned; cells that do not fit are cut."""
    made = Table(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
    for heading in headings:
        made.add_column(heading, justify="right" if heading in numbers else "left", overflow="ellipsis")
    for row in rows:
        made.add_row(*row)
    return made


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table on stdout without cutting any cell. In a pipe, each row is one line.

    On a terminal, cells are wrapped between words and after the slashes of paths. If even that does not fit, the first
    cell of each row is printed as a line, with the other cells below it.
    """
    body = [tuple(row) for row in rows]
    columns = list(zip(headings, *body, strict=True))
    full = [max(map(cell_len, cells)) for cells in columns]
    made = table(headings, body, numbers=numbers)
    if not out.is_terminal:
        made.width = sum(full) + _GAP * len(columns)
        out.print(made, crop=False)
        return
    least = [
        most if cells[0] in numbers else max(map(_longest_piece, cells))
        for cells, most in zip(columns, full, strict=True)
    ]
    room = out.width - _GAP * len(columns) - sum(least)
    if room < 0:
        _print_stacked(headings, body)
        return
    widths = []
    for most, width in zip(full, least, strict=True):
        widths.append(min(most, width + room))
        room -= widths[-1] - width
    folded = ([_fold(cell, width) for cell, width in zip(row, widths, strict=True)] for row in body)
    made = table(headings, folded, numbers=numbers)
    for column, width in zip(made.columns, widths, strict=True):
        column.width, column.overflow = width, "fold"
    out.print(made)


def _longest_piece(cell: str) -> int:
    """Return the width of a cell's longest piece."""
    return max((cell_len(piece.rstrip()) for piece in _PIECES.findall(cell)), default=0)


def _fold(cell: str, width: int) -> str:
    """Wrap a cell between its pieces; a piece wider than `width` stays whole."""
    folded = [""]
    for piece in _PIECES.findall(cell):
        if folded[-1] and cell_len(folded[-1] + piece.rstrip()) > width:
            folded.append("")
        folded[-1] += piece
    return "\n".join(line.rstrip() for line in folded)


def _print_stacked(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row's first cell as a line, and the others below it; if there are several, after their headings."""
    is_pair = len(headings) == 2
    for first, *rest in [headings, *rows] if is_pair else rows:
        named = rest if is_pair else [f"{name} {cell}" for name, cell in zip(headings[1:], rest, strict=True) if cell]
        out.print(Text(_fold(first, out.width), "bold", overflow="fold"))
        below = _fold(", ".join(named), out.width - _GAP)
        out.print(Padding(Text(below, overflow="fold"), (0, 0, 0, _GAP)))


@contextmanager
def byte_bar(what: str, total_bytes: int | None = None, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """Draw a progress bar in bytes on stderr, if that is a terminal and `quiet` is not set.

    Yields:
        A function that takes `advance` or `completed` and `total`, in bytes, and a new `description`.
    """
    whole: dict[str, Any] = {"table_column": Column(no_wrap=True)}
    figures: list[ProgressColumn] = [DownloadColumn(**whole), TimeRemainingColumn(**whole), TextColumn("left", **whole)]
    if err.width >= _FULL_BAR_COLUMNS:
        figures = [BarColumn(), figures[0], TransferSpeedColumn(**whole), *figures[1:]]
    name = TextColumn("{task.description}", table_column=Column(overflow="ellipsis"))
    is_off = quiet or not can_draw(sys.stderr)
    with Progress(name, *figures, console=err, disable=is_off, transient=True) as progress:
        yield partial(progress.update, progress.add_task(what, total=total_bytes))


@contextmanager
def count_bar(what: str, total: int | None, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """Draw a progress bar of `total` prompts, if stderr is a terminal and `quiet` is not set.

    If stdout is a terminal as well, the bar and the notes go to stdout, too, so that lines appear above the bar.

    Yields:
        A function that takes `advance`, the number of prompts just done; `tokens`, the total generated so far; and, to
        print above the bar, even if no bar is drawn, `note`, a line for people, and `line`, one for stdout. It may be
        called from any thread.
    """
    whole: dict[str, Any] = {"table_column": Column(no_wrap=True)}
    figures: list[ProgressColumn] = [
        MofNCompleteColumn(**whole), TextColumn("{task.fields[speed]}", **whole), TimeRemainingColumn(**whole)
    ]  # fmt: skip
    if err.width >= _FULL_BAR_COLUMNS:
        figures.insert(0, BarColumn())
    start, is_off = time.perf_counter(), quiet or not can_draw(sys.stderr)
    is_one = not is_off and can_draw(sys.stdout)  # the bar has to make room for what is written to stdout
    console, stdout = out if is_one else err, sys.stdout  # which rich replaces while it draws
    with Progress(TextColumn(what), *figures, console=console, disable=is_off, transient=True) as progress:
        task = progress.add_task(what, total=total, speed="")

        def update(*, advance: int = 0, tokens: int | None = None, note: str = "", line: str = "") -> None:
            if note:
                console.print(Text(note), soft_wrap=True)
            if line and is_one:
                console.print(Text(line), soft_wrap=True)
            elif line:
                stdout.write(f"{line}\n")
                stdout.flush()
            if tokens is None:
                progress.update(task, advance=advance)
            else:
                progress.update(task, speed=f"{tokens / (time.perf_counter() - start):.0f} tok/s")

        yield update


@contextmanager
def busy(what: str, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show the current step with a spinner on stderr, if that is a terminal and `quiet` is not set.

    Args:
        what: the first step; empty to show none yet.
        quiet: show nothing.

    Yields:
        A function that shows the next step; an empty text removes the spinner. It raises a Ctrl-C that was deferred by
        an import.
    """
    if quiet or not can_draw(sys.stderr):
        yield lambda _: signals.check()
        return
    status = err.status("")

    def step(now: str) -> None:
        signals.check()
        if now:
            status.update(Text(one_line(now)))
            status.start()
        else:
            status.stop()

    try:
        step(what)
        yield step
    finally:
        status.stop()


def lines(renderable: RenderableType, width: int) -> list[str]:
    """Render for a terminal of this width, as lines with style codes."""
    console = _CleanConsole(
        file=io.StringIO(), width=width, force_terminal=True, color_system="standard" if has_styles() else None
    )
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().splitlines()


def list_names(names: Sequence[str], most: int = 10) -> str:
    """List the first names, and say how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def seconds(value: float) -> str:
    """Format a time: `1.20 s`, `34.0 ms`."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def latencies(percentiles: Mapping[str, float]) -> str:
    """Format percentiles; a dash stands for zero, which means no samples."""
    return " / ".join(seconds(value) if value else "–" for value in percentiles.values())


def time_of_day(since_1970: float) -> str:
    """Format a Unix time as local time: `20:14:03`."""
    return time.strftime("%H:%M:%S", time.localtime(since_1970))

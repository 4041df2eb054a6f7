"""The output of `infer` for people: a status below the text on a terminal, lines on stderr elsewhere."""

from __future__ import annotations  # modules that import torch are named in type hints only

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Literal, Self

from surfw.cli import signals
from surfw.cli.column import BETWEEN, TextColumn
from surfw.cli.infer_summary import Report, encoder_text, place_of, summary
from surfw.cli.screen import Screen, dimmed
from surfw.cli.status import MOST_LINES, duration, run_parts, spinner, status_lines
from surfw.cli.streams import OutputError, break_lines, can_draw, one_line
from surfw.cli.traced import note_phase
from surfw.models.progress import Pace

if TYPE_CHECKING:
    from surfw.models.explain import Explanation
    from surfw.models.inference import InferenceResult
    from surfw.models.streaming import StreamingModel
    from surfw.settings import SettingOrigin

_SLOW_SECONDS = 10.0
"""If no status can be drawn, a phase that takes longer gets a line."""

_SHOWN_PROMPT = 600
_SIDE_ROWS = 4
_UNTIMED_SECONDS = 2.0
_WIDE_COLUMNS, _TABLE_COLUMNS = 120, 64


class View:
    """The base of all views: prints the answer on stdout as it arrives, and nothing else."""

    def __init__(self, answer: Literal["text", "ids", "nothing"]) -> None:
        self._answer = answer
        self._pace = Pace(0)
        self._tokens: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop drawing. Closing twice is safe."""

    def result_so_far(self, prompt_tokens: int) -> InferenceResult:
        """Return the result of a generation that was stopped."""
        from surfw.models.inference import InferenceResult

        times = self._pace.times
        return InferenceResult(
            token_ids=self._tokens,
            prompt_tokens=prompt_tokens,
            ttft_seconds=times[0] if times else None,
            tpot_seconds=self._pace.seconds_per_token,
        )

    def phase(self, text: str) -> None:
        """Show the current phase; a Ctrl-C that was deferred by an import is raised here."""
        signals.check()
        note_phase(text)

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the next run."""

    def heading(self, text: str) -> None:
        """Print the name of the model whose answer follows, if there are several."""
        if self._answer != "nothing":
            self._print(f"{one_line(text)}:\n")

    def prompt(self, text: str, space: Callable[[int], str]) -> None:
        """Show the prompt that the answer continues.

        Args:
            text: the prompt.
            space: returns the space between the prompt and a given first token.
        """

    @contextmanager
    def running(self, streaming: StreamingModel, source: str, most_tokens: int, *, has_text: bool) -> Iterator[None]:
        """Follow a model while it runs.

        Args:
            streaming: the model.
            source: where its weights come from.
            most_tokens: the most tokens it generates; 0 for a model that does not generate.
            has_text: whether there will be text; if not, token ids are printed.
        """
        self._pace = Pace(most_tokens)
        if self._answer == "text" and not has_text:
            self._answer = "ids"
        yield

    def on_text(self, text: str) -> None:
        """Print a piece of the answer."""
        if self._answer == "text":
            self._print(text)

    def on_token(self, token: int, seconds: float) -> None:
        """Record a new token, and print its id if ids are the answer."""
        self._pace.add_token(seconds)
        self._tokens.append(token)
        if self._answer == "ids":
            self._print(f"{' ' if len(self._tokens) > 1 else ''}{token}")

    def end_text(self) -> None:
        """End the answer's last line, if there is one."""
        if self._tokens and self._answer != "nothing":
            print(flush=True)

    def done(self, report: Report) -> None:
        """End the answer, or print an encoder's output; subclasses add a summary."""
        if self._answer == "nothing":
            return
        print(encoder_text(report.result) or "", flush=True)

    def stopped(self, report: Report) -> None:
        """End the answer of a run that was interrupted or failed; subclasses add a summary."""
        with suppress(OutputError):  # Ctrl-C also ends the reader of a pipe; `streams.finish` reports other failures
            self.end_text()

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class PlainView(View):
    """Prints lines on stderr: the source of the weights, slow phases, and a summary."""

    def __init__(self, answer: Literal["text", "ids", "nothing"]) -> None:
        super().__init__(answer)
        self._timer: threading.Timer | None = None

    def close(self) -> None:
        """Cancel the pending line about a slow phase."""
        if self._timer is not None:
            self._timer.cancel()

    def phase(self, text: str) -> None:
        """Print the current phase once it has taken long."""
        super().phase(text)
        self.close()
        self._timer = threading.Timer(_SLOW_SECONDS, self.note, [text])
        self._timer.daemon = True
        self._timer.start()

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        print(f"surfw: {text}\n", end="", file=sys.stderr, flush=True)

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the next run."""
        from surfw.cli import explain_view, render

        explain_view.show(explanation, origins, render.err)

    @contextmanager
    def running(self, streaming: StreamingModel, source: str, most_tokens: int, *, has_text: bool) -> Iterator[None]:
        """Show nothing but the text while the model runs."""
        self.close()
        with super().running(streaming, source, most_tokens, has_text=has_text):
            yield

    def done(self, report: Report) -> None:
        """End the answer, and print a summary."""
        super().done(report)
        self.note(summary(report))

    def stopped(self, report: Report) -> None:
        """End the answer; print a summary if there were tokens."""
        super().stopped(report)
        if report.result.token_ids:
            self.note(summary(report))


class LiveView(View):
    """Draws a status on the terminal, from start to end; the text runs above it if stdout is a terminal, too."""

    def __init__(self, answer: Literal["text", "ids", "nothing"], *, table: bool) -> None:
        """Prepare the status; nothing is drawn yet.

        Args:
            answer: what is printed on stdout as it arrives.
            table: show a table of figures below the status.
        """
        super().__init__(answer)
        self._is_one = can_draw(sys.stdout) and answer != "nothing"
        self._screen = Screen(sys.stdout if self._is_one else sys.stderr, self._below)
        self._shows_table = table
        self._phase, self._phase_began = "starting", time.monotonic()
        self._model: StreamingModel | None = None
        self._place = ""
        self._space: Callable[[int], str] | None = None
        self._column: TextColumn | None = None
        self._text_columns = 0
        self._table_rows: int | None = None  # how many rows of the table were drawn beside the text

    def __enter__(self) -> Self:
        try:
            self._screen.open()
        except BaseException:  # such as an interruption by a signal
            self._screen.close()
            raise
        return self

    def close(self) -> None:
        """Erase the status, and print the rest of the text."""
        if self._column is not None:
            self._screen.change(self._end_column)
        self._screen.close()

    def phase(self, text: str) -> None:
        """Show the current phase beside the spinner."""
        super().phase(text)
        self._phase, self._phase_began = text, time.monotonic()

    def note(self, text: str) -> None:
        """Print a line above the status, where it stays."""
        from rich.text import Text

        from surfw.cli import render

        with self._screen.stepping_aside("\n"):
            render.err.print(Text(break_lines(f"surfw: {one_line(text)}", render.err.width)), style="dim")

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the next run."""
        from surfw.cli import explain_view, render

        with self._screen.stepping_aside("\n"):
            explain_view.show(explanation, origins, render.err)
            render.err.print()

    def prompt(self, text: str, space: Callable[[int], str]) -> None:
        """Show the end of the prompt, dimmed."""
        if self._is_one and self._answer == "text":
            self._begin_column()
            shown = text if len(text) <= _SHOWN_PROMPT else f"…{text[-_SHOWN_PROMPT:]}"
            self._write(shown, dim=True)
            self._space = space

    @contextmanager
    def running(self, streaming: StreamingModel, source: str, most_tokens: int, *, has_text: bool) -> Iterator[None]:
        """Follow the model in the status, unless the text goes to a pipe, which may lead back to the terminal."""
        with super().running(streaming, source, most_tokens, has_text=has_text):
            self.phase("reading the prompt" if most_tokens else "running")
            self._model, self._place = streaming, place_of(source)
            self._begin_column()
            if self._answer != "nothing" and not self._is_one and not _is_kept(sys.stdout.fileno()):
                self._screen.close()
            try:
                yield
            finally:
                self._model = None
                self.phase("closing the model")

    def on_token(self, token: int, seconds: float) -> None:
        """Record a new token; the first one determines the space after the prompt."""
        if self._space is not None:
            self._write(self._space(token))
            self._space = None
        super().on_token(token, seconds)

    def end_text(self) -> None:
        """Stop drawing; end the answer's last line if it is not on the screen."""
        self.close()
        if not self._is_one:
            super().end_text()

    def done(self, report: Report) -> None:
        """End the answer, or print an encoder's output; then the table, if it is shown, and a summary."""
        self.close()
        if not (self._is_one and self._tokens):  # else the screen has ended its last line
            super().done(report)
        self._conclude(report)

    def stopped(self, report: Report) -> None:
        """End the answer, which stays; print the table and a summary if there were tokens."""
        super().stopped(report)
        if report.result.token_ids:
            self._conclude(report)

    def _conclude(self, report: Report) -> None:
        if self._shows_table:
            from surfw.cli import figures, render

            result, generates = report.result, bool(self._tokens)
            first, each = result.ttft_seconds, result.tpot_seconds
            render.err.print(figures.run_table(report.statistics, first, each, generates=generates))
        self.note(summary(report))

    def _print(self, text: str) -> None:
        if self._is_one:
            self._write(text)
        else:
            super()._print(text)

    def _write(self, text: str, *, dim: bool = False) -> None:
        """Write to the terminal. If there is a column, the text goes there, and rows that leave it are printed."""

        def add(column: TextColumn) -> str:
            column.add(text, dim=dim)
            if self._table_rows is None:  # nothing was drawn yet
                return ""
            if self._table_rows and self._screen.size.columns >= _WIDE_COLUMNS:
                return column.give_up(self._text_columns, self._table_rows)
            self._column = None
            return column.end()

        if (column := self._column) is not None:
            self._screen.change(lambda: add(column))
        else:
            self._screen.write(text, dim=dim)

    def _begin_column(self) -> None:
        """Show the text beside the table from now on, if there is a table and the window is wide."""
        if self._shows_table and self._is_one and self._screen.size.columns >= _WIDE_COLUMNS:
            self._column = self._column or TextColumn()

    def _end_column(self) -> str:
        """Remove the column, if there is one; return the rest of its text."""
        column, self._column = self._column, None
        return column.end() if column is not None else ""

    def _below(self, size: os.terminal_size) -> list[str]:
        """Return the status, in at most a third of the window, and as much of the table as fits."""
        from surfw.cli import figures, render

        model, now = self._model, time.monotonic()
        parts = self._phase_parts(now) if model is None else self._run_parts(model, now)
        most = max(1, min(MOST_LINES, size.lines // 3))
        lines = [dimmed(line) for line in status_lines(parts, size.columns, most=most)]
        if model is None or not self._shows_table:
            return lines
        times, generates = self._pace.times, model.model.can_generate()
        first = times[0] if times else None
        table = figures.run_table(model.statistics(), first, self._pace.seconds_per_token, generates=generates)
        room = max(0, size.lines - len(lines) - _SIDE_ROWS)
        rows = render.lines(table, min(_TABLE_COLUMNS, size.columns - 1))[:room]
        if self._column is None:
            return lines + rows
        if size.columns < _WIDE_COLUMNS:  # too narrow; the next token removes the column
            return [styled for _, styled in self._column.rows(size.columns - 1)] + lines
        self._text_columns, self._table_rows = size.columns - _TABLE_COLUMNS - len(BETWEEN) - 1, len(rows)
        return self._column.beside(rows, self._text_columns) + lines

    def _phase_parts(self, now: float) -> list[str]:
        took = now - self._phase_began
        return [f"{spinner(now)} {self._phase}", *([duration(took)] if took >= _UNTIMED_SECONDS else [])]

    def _run_parts(self, model: StreamingModel, now: float) -> list[str]:
        parts = run_parts(self._pace.figures(model.progress(), now), self._place)
        if not self._tokens:
            return [f"{spinner(now)} {self._phase}", *parts]
        return [f"{spinner(now)} {parts[0]}", *parts[1:]]


def choose_view(
    answer: Literal["text", "ids"], *, live: bool | Literal["full"] | None, json: bool, quiet: bool
) -> View:
    """Choose the view.

    Args:
        answer: what is printed as it arrives: text or token ids. A live view on a terminal prints text if there is any.
        live: the setting.
        json: print nothing on stdout.
        quiet: print nothing on stderr.
    """
    shown: Literal["text", "ids", "nothing"] = "nothing" if json else answer
    if quiet:
        return View(shown)
    if live is False or not can_draw(sys.stderr):
        return PlainView(shown)
    return LiveView("text" if shown == "ids" and sys.stdout.isatty() else shown, table=live == "full")


def _is_kept(number: int) -> bool:
    """Whether a descriptor is a file or a device, rather than a pipe, which may lead back to the terminal."""
    mode = os.fstat(number).st_mode
    return stat.S_ISREG(mode) or stat.S_ISCHR(mode)

"""What `infer` shows people: a status below the text on a terminal, and elsewhere lines on stderr."""

from __future__ import annotations  # what comes from torch's rooms is named in types only

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
"""Where no status can be drawn, a phase that takes longer gets a line."""

_SHOWN_PROMPT = 600
_SIDE_ROWS = 4
_UNTIMED_SECONDS = 2.0
_WIDE_COLUMNS, _TABLE_COLUMNS = 120, 64


class View:
    """What all views do: print the answer on stdout as it comes. This one says nothing else."""

    def __init__(self, answer: Literal["text", "ids", "nothing"]) -> None:
        """Choose what is printed as it comes."""
        self._answer = answer
        self._pace = Pace(0)
        self._tokens: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End what is drawn."""
        self.close()

    def close(self) -> None:
        """End what is drawn; a second time does nothing."""

    def result_so_far(self, prompt_tokens: int) -> InferenceResult:
        """Return what a generation has come to that did not end."""
        from surfw.models.inference import InferenceResult

        times = self._pace.times
        return InferenceResult(
            token_ids=self._tokens,
            prompt_tokens=prompt_tokens,
            ttft_seconds=times[0] if times else None,
            tpot_seconds=self._pace.seconds_per_token,
        )

    def phase(self, text: str) -> None:
        """Say what is going on, which may take a while; a Ctrl-C that has waited for an import ends it here."""
        signals.check()
        note_phase(text)

    def note(self, text: str) -> None:
        """Say something, in a line that stays."""

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the run that comes now."""

    def heading(self, text: str) -> None:
        """Print whose answer comes now, where there are several."""
        if self._answer != "nothing":
            self._print(f"{one_line(text)}:\n")

    def prompt(self, text: str, space: Callable[[int], str]) -> None:
        """Show the prompt before what continues it.

        Args:
            text: the prompt.
            space: returns what is to stand between it and a first token.
        """

    @contextmanager
    def running(self, streaming: StreamingModel, source: str, most_tokens: int, *, has_text: bool) -> Iterator[None]:
        """Follow a model while it runs.

        Args:
            streaming: the model.
            source: where its weights come from.
            most_tokens: how many it generates at most; 0 for a model that does not.
            has_text: whether there will be text: token ids are printed if not.
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
        """Note a new token, and print its id if that is the answer."""
        self._pace.add_token(seconds)
        self._tokens.append(token)
        if self._answer == "ids":
            self._print(f"{' ' if len(self._tokens) > 1 else ''}{token}")

    def end_text(self) -> None:
        """End the answer's last line, if there is one."""
        if self._tokens and self._answer != "nothing":
            print(flush=True)

    def done(self, report: Report) -> None:
        """End the answer, or print what an encoder gives; and say what the run came to."""
        if self._answer == "nothing":
            return
        print(encoder_text(report.result) or "", flush=True)

    def stopped(self, report: Report) -> None:
        """End the answer of a run that was interrupted, or failed, and say what it came to."""
        with suppress(OutputError):  # Ctrl-C has ended the reader of a pipe too; `streams.finish` tells of the rest
            self.end_text()

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class PlainView(View):
    """Lines on stderr: where the weights come from, what takes long, and a summary."""

    def __init__(self, answer: Literal["text", "ids", "nothing"]) -> None:
        """Choose what is printed as it comes."""
        super().__init__(answer)
        self._timer: threading.Timer | None = None

    def close(self) -> None:
        """Say nothing any more of what takes long."""
        if self._timer is not None:
            self._timer.cancel()

    def phase(self, text: str) -> None:
        """Say what is going on, once it has taken long."""
        super().phase(text)
        self.close()
        self._timer = threading.Timer(_SLOW_SECONDS, self.note, [text])
        self._timer.daemon = True
        self._timer.start()

    def note(self, text: str) -> None:
        """Say something in a line."""
        print(f"surfw: {text}\n", end="", file=sys.stderr, flush=True)

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the run that comes now."""
        from surfw.cli import explain_view, render

        explain_view.show(explanation, origins, render.err)

    @contextmanager
    def running(self, streaming: StreamingModel, source: str, most_tokens: int, *, has_text: bool) -> Iterator[None]:
        """Follow nothing; the text says it all."""
        self.close()
        with super().running(streaming, source, most_tokens, has_text=has_text):
            yield

    def done(self, report: Report) -> None:
        """End the answer, and print a summary."""
        super().done(report)
        self.note(summary(report))

    def stopped(self, report: Report) -> None:
        """Print a summary of what there was."""
        super().stopped(report)
        if report.result.token_ids:
            self.note(summary(report))


class LiveView(View):
    """A status on the terminal, from the first moment to the last; the text runs above it, if it goes there too."""

    def __init__(self, answer: Literal["text", "ids", "nothing"], *, table: bool) -> None:
        """Begin with no model.

        Args:
            answer: what is printed on stdout as it comes.
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
        except BaseException:  # a signal
            self._screen.close()
            raise
        return self

    def close(self) -> None:
        """Erase the status, and show what is left of the text."""
        if self._column is not None:
            self._screen.change(self._end_column)
        self._screen.close()

    def phase(self, text: str) -> None:
        """Say what is going on, beside the spinner."""
        super().phase(text)
        self._phase, self._phase_began = text, time.monotonic()

    def note(self, text: str) -> None:
        """Say something in a line that stays, above the status."""
        from rich.text import Text

        from surfw.cli import render

        with self._screen.stepping_aside("\n"):
            render.err.print(Text(break_lines(f"surfw: {one_line(text)}", render.err.width)), style="dim")

    def explain(self, explanation: Explanation, origins: Mapping[str, SettingOrigin]) -> None:
        """Show what limits the run that comes now."""
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
        """Follow the model in the status, unless a pipe takes the text, which may lead back to the terminal."""
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
        """Note a new token; the first one tells how it follows the prompt."""
        if self._space is not None:
            self._write(self._space(token))
            self._space = None
        super().on_token(token, seconds)

    def end_text(self) -> None:
        """End what is drawn, and the answer's last line, if it is elsewhere."""
        self.close()
        if not self._is_one:
            super().end_text()

    def done(self, report: Report) -> None:
        """End the answer, or print what there is instead; then the table, if it is shown, and a summary."""
        self.close()
        if not (self._is_one and self._tokens):  # else the screen has ended its last line
            super().done(report)
        self._conclude(report)

    def stopped(self, report: Report) -> None:
        """Say what a run came to; what it has said stays."""
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
        """Write to the terminal: into the column, where there is one, and what leaves it for good."""

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
        """Show the text beside the table from now on, if that is shown and the window is wide."""
        if self._shows_table and self._is_one and self._screen.size.columns >= _WIDE_COLUMNS:
            self._column = self._column or TextColumn()

    def _end_column(self) -> str:
        """Leave the column, if there is one; returns what is left of its text."""
        column, self._column = self._column, None
        return column.end() if column is not None else ""

    def _below(self, size: os.terminal_size) -> list[str]:
        """The status, in at most a third of the window, and the table, as far as there is room."""
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
        if size.columns < _WIDE_COLUMNS:  # until the next token comes
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
        answer: what a pipe gets as it comes: text, or token ids. A terminal always gets text, where there is any.
        live: the setting.
        json: nothing goes to stdout as it comes.
        quiet: nothing goes to stderr.
    """
    shown: Literal["text", "ids", "nothing"] = "nothing" if json else answer
    if quiet:
        return View(shown)
    if live is False or not can_draw(sys.stderr):
        return PlainView(shown)
    return LiveView("text" if shown == "ids" and sys.stdout.isatty() else shown, table=live == "full")


def _is_kept(number: int) -> bool:
    """Whether an open file is one that keeps what is written, or drops it: no pipe, which may lead to the terminal."""
    mode = os.fstat(number).st_mode
    return stat.S_ISREG(mode) or stat.S_ISCHR(mode)

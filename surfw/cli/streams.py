"""The output streams of a command, cleaned so that untrusted text cannot control the terminal.

A stream may be closed, full, or a pipe without a reader. If stdout cannot be written to, the command ends with one line
on stderr and exit code 1; if its reader has left, it ends silently with exit code 141, as other tools do. Failed writes
to stderr are ignored.

Every text is cleaned here, as it is written, so that no command can forget to: always on stderr, and on stdout if that
is a terminal; a file or a pipe gets the text unchanged. Code that controls the terminal on purpose, such as rich,
progress bars and `surfw.cli.screen`, writes to the stream's `rich_proxied_file`, which cleans nothing. Untrusted text
is cleaned before it is passed to such code.

On a terminal, long lines of stderr are wrapped between words.
"""

import io
import logging
import os
import re
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from surfw.cli import signals
from surfw.config import printable
from surfw.errors import ConfigurationError

_UNSEEN = re.compile(r"\x1b7.*?\x1b8|\x1b\[[0-9;?]*[A-Za-z]|\x1b[^\[]| (\x1b\[J)?\x08", re.DOTALL)
"""Sequences of `surfw.cli.screen` and rich that leave the cursor in its column."""
_BEFORE_UNIT = re.compile(r"(?<=[0-9]) (?=(?:%|s|ms|min|h|d|tok/s|[kMGT]?B(?:/s)?)(?![A-Za-z]))")
_HELD = "\0"
"""Stands for a space at which lines are not broken."""

if TYPE_CHECKING:
    from surfw.cli.screen import Screen


class OutputError(Exception):
    """Stdout cannot be written to.

    Attributes:
        is_unread: whether stdout is a pipe whose reader has left, as `head` does when it has seen enough.
    """

    def __init__(self, message: str, *, is_unread: bool) -> None:
        super().__init__(message)
        self.is_unread = is_unread


_screens: list["Screen"] = []


class Output(io.TextIOWrapper):
    """A standard stream of the process; replaces Python's own, and writes to the same file.

    Attributes:
        failure: the error of a failed write, after which nothing more is written; None before.
        rich_proxied_file: the same stream without the cleaning; rich looks for this name.
    """

    def __init__(self, stream: io.TextIOWrapper, *, is_stdout: bool) -> None:
        """Replace `stream`, which is detached and cannot be used afterwards."""
        self.failure: OutputError | None = None
        self._is_stdout = is_stdout
        self._cleans = not is_stdout or stream.isatty()
        self._is_terminal = stream.isatty()
        encoding, line_buffering, write_through = stream.encoding, stream.line_buffering, stream.write_through
        super().__init__(
            stream.detach(),
            encoding=encoding,
            errors="backslashreplace",
            line_buffering=line_buffering,
            write_through=write_through,
        )
        self.rich_proxied_file = _Verbatim(self)

    def write(self, text: str) -> int:
        """Write a text, cleaned if it may reach a terminal.

        Raises:
            OutputError: it cannot be written to stdout.
        """
        text = printable(text, lines=True) if self._cleans else text
        if self._is_terminal and not self._is_stdout:
            text = break_lines(text, self._columns)
        with self._stepping_aside(text):
            return self.write_verbatim(text)

    @contextmanager
    def _stepping_aside(self, text: str) -> Iterator[None]:
        """Have the screen, if there is one, step aside for a text on the terminal."""
        screen = next(iter(_screens), None) if self._is_terminal and text else None
        if screen is None:
            yield
            return
        with screen.stepping_aside(text):
            yield
            self.flush()

    @property
    def _columns(self) -> int:
        """The width of the terminal's window; 0 if unknown."""
        with suppress(OSError):
            return os.get_terminal_size(self.fileno()).columns
        return 0

    def write_verbatim(self, text: str) -> int:
        """Write a text unchanged.

        Raises:
            OutputError: it cannot be written to stdout.
        """
        with self._no_further():
            super().write(text)
        if self._is_terminal and (seen := _UNSEEN.sub("", text)):
            signals.is_line_open = not seen.endswith(("\n", "\r"))
        return len(text)

    def flush(self) -> None:
        """Write everything that was buffered.

        Raises:
            OutputError: it cannot be written to stdout.
        """
        with self._no_further():
            super().flush()

    @contextmanager
    def _no_further(self) -> Iterator[None]:
        """After a failure, redirect to /dev/null, so that flushing at exit does not fail again."""
        try:
            yield
        except OSError as exc:
            text = f"stdout cannot be written to: {exc.strerror}; what was printed is not complete"
            self.failure = OutputError(text, is_unread=isinstance(exc, BrokenPipeError))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._is_stdout and threading.current_thread() is threading.main_thread():
                raise self.failure from exc  # in other threads, which draw, `finish` raises it


class _Verbatim:
    """An `Output` without its cleaning."""

    def __init__(self, stream: Output) -> None:
        self._stream = stream
        self.write = stream.write_verbatim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class OneLine(logging.Formatter):
    """Formats every record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Format as `Formatter` does, as one line."""
        return one_line(super().format(record))


def set_screen(screen: "Screen | None") -> None:
    """Set the screen that steps aside for whatever is written to a terminal; None for no screen."""
    _screens[:] = [] if screen is None else [screen]


def one_line(text: str) -> str:
    """Return a text as one line that cannot control a terminal."""
    return printable(" ".join(text.split()))


def break_lines(text: str, columns: int) -> str:
    """Wrap lines between words; a word that is too long stays whole, and so does a quantity with its unit.

    Args:
        text: whole lines.
        columns: the width of the window; 0 wraps nothing.
    """
    longest = max(map(len, text.split("\n")))
    wrapper = textwrap.TextWrapper(max(columns, 1), break_long_words=False, break_on_hyphens=False)
    if not 0 < columns < longest:
        return text
    lines = _BEFORE_UNIT.sub(_HELD, text).split("\n")
    return "\n".join(map(wrapper.fill, lines)).replace(_HELD, " ")


def expect_utf8(text: str, what: str) -> None:
    """Refuse input with bytes that were not UTF-8; Python keeps those as surrogates.

    Raises:
        ConfigurationError: there are such bytes.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigurationError(f"{what} is not valid UTF-8; write it in that encoding")


def can_draw(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal that can be drawn on in place, with this process in the foreground."""
    if stream is None or not stream.isatty() or os.environ.get("TERM", "") in {"", "dumb", "unknown"}:
        return False
    with suppress(OSError):  # it is not the controlling terminal
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()  # else this process is a shell's background job
    return True


def set_up() -> None:
    """Replace the standard streams. A second call does nothing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: take the number, so that no file opened later gets it
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # makes every write to stdout fail
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.dup(1 if name == "stdout" else 2), "w", encoding="utf-8")  # noqa: PTH123, SIM115 - no path
        if type(stream) is io.TextIOWrapper:
            setattr(sys, name, Output(stream, is_stdout=name == "stdout"))


def finish() -> None:
    """Write everything that is still buffered.

    Raises:
        OutputError: something could not be written to stdout.
    """
    for stream in (sys.stderr, sys.stdout):
        if isinstance(stream, Output):
            with suppress(ValueError):  # it was closed
                stream.flush()
    if isinstance(sys.stdout, Output) and sys.stdout.failure is not None:
        raise sys.stdout.failure

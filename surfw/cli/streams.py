"""The streams that a command prints to; no text from outside can steer a terminal through them.

A stream may be closed, full, or a pipe that nobody reads. If stdout cannot be written to, the command ends with one
line on stderr and exit code 1; if nobody reads it any more, in silence and with exit code 141, as other tools do. What
cannot be written to stderr is lost, and changes nothing.

Every text is cleaned here, on its way out, so that no command can forget to: on stderr always, on stdout if that is a
terminal; a file or a pipe gets what is written. What steers a terminal on purpose, as rich, progress bars and
`surfw.cli.screen` do, writes to the stream's `rich_proxied_file`, where nothing is cleaned. Texts from outside are
cleaned before they are given to those.

On a terminal, long lines of stderr are broken between words.
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
"""What `surfw.cli.screen` and rich send that leaves the cursor where it was, or moves it up and down."""
_BEFORE_UNIT = re.compile(r"(?<=[0-9]) (?=(?:%|s|ms|min|h|d|tok/s|[kMGT]?B(?:/s)?)(?![A-Za-z]))")
_HELD = "\0"
"""Stands for a space that no line ends at."""

if TYPE_CHECKING:
    from surfw.cli.screen import Screen


class OutputError(Exception):
    """Something cannot be written to stdout.

    Attributes:
        is_unread: whether stdout is a pipe whose reader has left, as `head` does when it has seen enough.
    """

    def __init__(self, message: str, *, is_unread: bool) -> None:
        """Keep beside the text whether somebody has left."""
        super().__init__(message)
        self.is_unread = is_unread


_screens: list["Screen"] = []


class Output(io.TextIOWrapper):
    """A standard stream of the process; replaces Python's own, and writes to the same file.

    Attributes:
        failure: why nothing can be written any more, once something could not.
        rich_proxied_file: the same stream without the cleaning; rich takes it by this name, if it is there.
    """

    def __init__(self, stream: io.TextIOWrapper, *, is_stdout: bool) -> None:
        """Replace a stream, which cannot be used any more."""
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
        """Write a text, cleaned where it may come to a terminal.

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
        """Have the screen step aside for a text, if there is one and this is a terminal."""
        screen = next(iter(_screens), None) if self._is_terminal and text else None
        if screen is None:
            yield
            return
        with screen.stepping_aside(text):
            yield
            self.flush()

    @property
    def _columns(self) -> int:
        """The width of the terminal's window; 0 if that is not known."""
        with suppress(OSError):
            return os.get_terminal_size(self.fileno()).columns
        return 0

    def write_verbatim(self, text: str) -> int:
        """Write a text as it is.

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
        """Write to nowhere after a failure, so that no buffer fails again when the interpreter ends."""
        try:
            yield
        except OSError as exc:
            text = f"stdout cannot be written to: {exc.strerror}; what was printed is not complete"
            self.failure = OutputError(text, is_unread=isinstance(exc, BrokenPipeError))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._is_stdout and threading.current_thread() is threading.main_thread():
                raise self.failure from exc  # a thread that draws says nothing: `finish` does


class _Verbatim:
    """A stream without its cleaning."""

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
    """Have a screen step aside for whatever is written to a terminal from now on; None for no screen."""
    _screens[:] = [] if screen is None else [screen]


def one_line(text: str) -> str:
    """Return a text as one line that cannot steer a terminal."""
    return printable(" ".join(text.split()))


def break_lines(text: str, columns: int) -> str:
    """Break lines that are longer than a window between words; a word that is longer stays whole, as a quantity does.

    Args:
        text: whole lines.
        columns: of the window; 0 breaks nothing.
    """
    longest = max(map(len, text.split("\n")))
    wrapper = textwrap.TextWrapper(max(columns, 1), break_long_words=False, break_on_hyphens=False)
    if not 0 < columns < longest:
        return text
    lines = _BEFORE_UNIT.sub(_HELD, text).split("\n")
    return "\n".join(map(wrapper.fill, lines)).replace(_HELD, " ")


def expect_utf8(text: str, what: str) -> None:
    """Refuse a text that was read or typed, if bytes of it were not UTF-8: Python keeps those as surrogates.

    Raises:
        ConfigurationError: some were not.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigurationError(f"{what} is not valid UTF-8; write it in that encoding")


def can_draw(stream: IO[str] | None) -> bool:
    """Whether a stream is a terminal on which something can be drawn in place, and that is this process's own now."""
    if stream is None or not stream.isatty() or os.environ.get("TERM", "") in {"", "dumb", "unknown"}:
        return False
    with suppress(OSError):  # it is not the terminal that this process is controlled from
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()  # else it runs in the background of a shell
    return True


def set_up() -> None:
    """Replace the standard streams. A second call does nothing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed; no file that is opened later may come to lie here
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # to stdout, every write fails
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
            with suppress(ValueError):  # somebody closed it
                stream.flush()
    if isinstance(sys.stdout, Output) and sys.stdout.failure is not None:
        raise sys.stdout.failure

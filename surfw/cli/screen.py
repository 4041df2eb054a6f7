"""Text that scrolls through a terminal as ordinary output, with temporary lines below it.

The cursor rests at the end of the text. Before each write, everything below the cursor is erased; so nothing that was
drawn has to be found again, even after a resize has rewrapped it. Text is written once and never moved.

If the text ends in the last column, a terminal keeps the cursor on the last letter with the wrap pending, and forgets
the wrap if the cursor is moved. There, a space forces the cursor to the next row first, as shells do for their prompts.
Elsewhere, too, a space is left under the cursor: if a resize makes the text end in the last column, the space moves the
cursor to the next row.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from surfw.cli import streams
from surfw.config import printable

Below = Callable[[os.terminal_size], Sequence[str]]
"""Returns the lines below the text: each narrower than the window, and fewer than the window has rows."""

_ERASE_BELOW, _SAVE, _RESTORE, _ERASE_LINE, _DOWN = "\x1b[J", "\x1b7", "\x1b8", "\x1b[2K", "\x1bD"
_SPACE, _SPACE_AT_EDGE = " \b", f"{_SAVE} {_RESTORE}"  # in the last column, terminals disagree on where \b leads
_ERASE_BELOW_EMPTY = f" {_ERASE_BELOW}\b"  # the space keeps tmux from treating an erased window as scrolled away
_CUT_LINES, _WRAP_LINES = "\x1b[?7l", "\x1b[?7h"  # the window may have been narrowed just now
_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"
_TAB_CELLS = 8
_FALLBACK = os.terminal_size((80, 24))


def has_styles() -> bool:
    """Whether text may be dimmed and coloured: unless `NO_COLOR` is set (https://no-color.org)."""
    return not os.environ.get("NO_COLOR")


class Screen:
    """Writes text to a terminal, and keeps lines below it up to date from a thread of its own.

    Other output to the standard streams, such as warnings, appears above these lines. The methods are thread-safe; a
    process may have one open screen at a time.
    """

    def __init__(self, stream: TextIO, below: Below, *, seconds: float = 0.1) -> None:
        """Prepare the screen; `open` begins to draw.

        Args:
            stream: the terminal.
            below: returns the lines below the text.
            seconds: the interval at which they are redrawn.
        """
        self._stream: Any = getattr(stream, "rich_proxied_file", stream)  # without the cleaning
        self._below = below
        self._seconds = seconds
        self._making, self._lock = threading.RLock(), threading.RLock()  # always taken in this order
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_drawing, name="surfw-screen", daemon=True)
        self._columns = 0
        self._row = ""  # the text in the cursor's row
        self._is_wrapped = False  # the cursor's row is empty, since the text fills the row above
        self._is_interrupted = False  # other output has begun a line
        self._made: tuple[os.terminal_size, Sequence[str]] = (_FALLBACK, ())

    def open(self) -> None:
        """Begin to draw."""
        streams.set_screen(self)
        self.write("")
        self._thread.start()

    def close(self) -> None:
        """Erase the lines below the text, and leave the cursor at the start of a row. Closing twice is safe."""
        if self._ended.is_set():
            return
        self._ended.set()
        streams.set_screen(None)
        with self._lock:
            self._end_line()
        if self._thread.is_alive():
            self._thread.join()

    def write(self, text: str, *, dim: bool = False) -> None:
        """Append text."""
        self.change(lambda: text, dim=dim)

    def change(self, work: Callable[[], str], *, dim: bool = False) -> None:
        """Call `work`, which may change the lines below, and write the text it returns; both appear at once."""
        with self._making:
            text = work()
            made = self._make()
            with self._lock:
                self._made = made
                self._draw(printable(text, lines=True), dim=dim and has_styles())

    @contextmanager
    def stepping_aside(self, text: str) -> Iterator[None]:
        """Let other code write a text to the terminal, in its own rows; nothing is drawn until its last line ends."""
        with self._lock:
            if self._ended.is_set():
                yield
                return
            if not self._is_interrupted:
                self._end_line()
            try:
                yield
            finally:
                self._is_interrupted = not text.endswith("\n")
                self._draw()

    def _keep_drawing(self) -> None:
        while not self._ended.wait(self._seconds):
            self.write("")

    def _make(self) -> tuple[os.terminal_size, Sequence[str]]:
        """Make the lines below again. `_lock` must not be held: `below` may wait for a thread that prints."""
        size = self.size
        return size, () if self._ended.is_set() else self._below(size)

    def _end_line(self, *, is_certain: bool = True) -> None:
        """Move to an empty row, unless the cursor is certainly in one."""
        is_needed = self._row or (self._is_wrapped and not is_certain)
        self._put(self._erase() + ("\n" if is_needed else ""))
        self._row, self._is_wrapped = "", False

    def _erase(self) -> str:
        return _ERASE_BELOW if self._row else _ERASE_BELOW_EMPTY

    def _draw(self, text: str = "", *, dim: bool = False) -> None:
        """Write text and redraw the lines below it, in one write, so that nothing flickers."""
        if self._is_interrupted and text:
            text, self._is_interrupted = f"\n{text}", False
        if self._is_interrupted:
            return
        size = self.size
        if size.columns != self._columns:
            if self._columns:  # some terminals rewrap lines, some do not: the cursor may be anywhere
                self._end_line(is_certain=False)
            self._columns = size.columns
        erase, shown = self._erase(), self._flow(text)
        shown = f"{_DIM}{shown}{_PLAIN}" if dim else shown
        self._put(erase + shown + ("" if self._ended.is_set() else self._under(size)))

    def _flow(self, text: str) -> str:
        """Return the text as it is sent, and track the cursor; the terminal wraps lines itself."""
        sent = []
        for letter in text:
            if letter == "\n":
                if not self._is_wrapped:  # else the cursor is there already
                    sent.append("\n")
                self._row, self._is_wrapped = "", False
                continue
            piece = " " * (_TAB_CELLS - _cells(self._row) % _TAB_CELLS) if letter == "\t" else letter
            sent.append(piece)
            for one in piece:
                longer = self._row + one
                self._row = longer if _cells(longer) <= self._columns else one
            self._is_wrapped = False
        if (left := self._columns - _cells(self._row)) <= 0:
            self._row, self._is_wrapped = "", True
        if sent:
            sent.append(_SPACE_AT_EDGE if left == 1 else _SPACE)
        return "".join(sent)

    def _under(self, size: os.terminal_size) -> str:
        """Return the codes that draw the lines below and move the cursor back to the end of the text."""
        made_for, lines = self._made
        if made_for != size or not lines:
            return ""
        room = _DOWN * len(lines) + f"\x1b[{len(lines)}A"  # scrolls if there are too few rows
        drawn = "".join(f"\r\n{_ERASE_LINE}{line}" for line in lines)
        return room + _SAVE + _CUT_LINES + drawn + _WRAP_LINES + _RESTORE

    @property
    def size(self) -> os.terminal_size:
        """The size of the window, in cells."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return _FALLBACK
        return size if size.columns > 0 and size.lines > 0 else _FALLBACK

    def _put(self, codes: str) -> None:
        self._stream.write(codes)
        self._stream.flush()


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def dimmed(text: str) -> str:
    """Return a line dimmed, if styles are allowed."""
    return f"{_DIM}{text}{_PLAIN}" if has_styles() else text

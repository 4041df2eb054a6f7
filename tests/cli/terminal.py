"""A terminal for tests: a pty, and pyte, which emulates the screen."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyte
from rich.cells import cell_len

from tests.cli.run import environment, imports
from tests.services import warm

CTRL_C, CTRL_D = "\x03", "\x04"

_SECONDS = 60.0
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Display(pyte.HistoryScreen):
    """Pyte's terminal with two missing features added; rows that scroll out at the top are kept."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, history=1000, ratio=0.5)
        self.set_mode(pyte.modes.LNM)  # as a terminal's driver does it

    def window(self) -> list[str]:
        """The rows in the window."""
        return [row.rstrip() for row in self.display]

    def rows(self) -> list[str]:
        """All rows, from the oldest that has scrolled out to the last one that is not empty."""
        rows = ["".join(row[at].data for at in sorted(row)).rstrip() for row in self.history.top] + self.window()
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def draw(self, data: str) -> None:
        """Show text; a wide letter that does not fit at the end of a row moves to the next row."""
        for letter in data:
            if cell_len(letter) == 2 and self.cursor.x == self.columns - 1:
                self.linefeed()
            super().draw(letter)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """Resize the window without rewrapping lines; rows above the window go into its history."""
        rows, columns = lines or self.lines, columns or self.columns
        below = self.cursor.y - (rows - 1)
        for _ in range(below):
            self.cursor.y = self.lines - 1
            self.index()
        self.cursor.y = min(self.cursor.y, rows - 1) if below > 0 else self.cursor.y
        for y, row in list(self.buffer.items()):
            for x in [x for x in row if x >= columns]:
                del row[x]
            if y >= rows:
                del self.buffer[y]
        self.lines, self.columns = rows, columns
        self.cursor.x = min(self.cursor.x, columns - 1)
        self.dirty.update(range(rows))


class Terminal:
    """A window in which a process runs.

    Attributes:
        seen: everything that the process has written.
        screen: the emulated screen.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.screen = Display(columns, rows)
        self.seen = b""
        self._read = 0
        self._stream = pyte.ByteStream(self.screen)
        self._changed = threading.Condition()
        self.ours, self.theirs = pty.openpty()
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """Resize the window, as a terminal that does not rewrap its lines."""
        with self._changed:
            fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            self.screen.resize(rows, columns)

    def rows(self) -> list[str]:
        """All rows, from the oldest that has scrolled out to the last one that is not empty."""
        with self._changed:
            return self.screen.rows()

    def shows(self, text: str) -> bool:
        """Whether a text is visible, or has scrolled out."""
        return any(text in row for row in self.rows())

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until the process has written something that satisfies the condition."""
        with self._changed:
            assert self._changed.wait_for(is_so, _SECONDS), self.rows()

    def wait_for(self, is_so: Callable[[list[str]], bool]) -> list[str]:
        """Wait until the window satisfies the condition; returns its rows, without those that have scrolled out."""
        with self._changed:
            self.wait_until(lambda: is_so(self.screen.window()))
            return self.screen.window()

    def wait_for_text(self, text: str) -> list[str]:
        """Wait until the window shows a text; returns its rows."""
        return self.wait_for(lambda rows: any(text in row for row in rows))

    def read_to(self, text: str) -> None:
        """Wait until the process has written this, even with codes in between; earlier output no longer counts."""
        wanted = text.encode()
        self.wait_until(lambda: wanted in self.seen[self._read :])
        self._read = self.seen.index(wanted, self._read) + len(wanted)

    def type(self, keys: str) -> None:
        """Type a text."""
        os.write(self.ours, keys.encode())

    def follow(self) -> None:
        """Update the screen with the output until the process ends."""
        try:
            while piece := os.read(self.ours, 1 << 16):
                with self._changed:
                    self.seen += piece
                    self._stream.feed(piece)
                    self._changed.notify_all()
        except OSError:  # how Linux reports that the other end is closed
            pass


@contextmanager
def terminal(
    home: Path, command: Sequence[str], *, columns: int = 80, rows: int = 24, stdout: IO[bytes] | None = None,
    controls: bool = False, cold: bool = False, **extra: str,
) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes] | warm.Process"]]:  # fmt: skip
    """Run a command in a window of its own; it has ended afterwards.

    Args:
        home: the command's home.
        command: it runs in a process that has its imports done.
        columns: the window's width.
        rows: the window's height.
        stdout: where its stdout goes, if not to the window.
        controls: whether the window is its controlling terminal, from which it gets Ctrl-C.
        cold: start a new process, which does its imports itself; the window is its controlling terminal.
        **extra: variables of its environment.
    """
    window = Terminal(columns, rows)
    out = window.theirs if stdout is None else stdout.fileno()
    own = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}  # no one answers its query for the cursor's position
    variables = environment(home, **own | extra)
    process: subprocess.Popen[bytes] | warm.Process
    if not cold:
        process = warm.start(
            command, modules=imports(command), stdin=window.theirs, stdout=out, stderr=window.theirs, env=variables,
            controls=controls,
        )  # fmt: skip
    else:
        process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command], stdin=window.theirs, stdout=out, stderr=window.theirs,
            env=variables, start_new_session=True,
        )  # fmt: skip
    following = threading.Thread(target=window.follow)
    following.start()
    try:
        yield window, process
        process.wait(_SECONDS)
    finally:
        process.kill()
        process.wait()
        os.close(window.theirs)
        following.join()
        os.close(window.ours)

"""A command on a terminal: what stands on its screen, at any size, and keys that are pressed there."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyte

from tests.cli.run import environment

_PATIENCE_SECONDS = 20


def _take_terminal() -> None:
    """Make stdin the terminal that Ctrl-C comes from."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A terminal, and the command that runs on it.

    Attributes:
        process: the command.
        seen: everything that it wrote.
    """

    def __init__(self, home: Path, command: Sequence[str], columns: int, lines: int, **extra: str) -> None:
        self._ours, theirs = pty.openpty()
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()
        self.seen = b""
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            command, env=environment(home, TERM="xterm-256color") | extra, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=_take_terminal,  # noqa: PLW1509 - it is one system call
        )  # fmt: skip
        os.close(theirs)
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._ours, 1 << 16):
                with self._lock:
                    self.seen += piece
                    self._stream.feed(piece)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    @property
    def lines(self) -> list[str]:
        """What stands on the screen."""
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    def resize(self, columns: int, lines: int) -> None:
        """Give the window another size."""
        with self._lock:
            self._screen.resize(lines, columns)
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Press keys: `\\x03` is Ctrl-C."""
        os.write(self._ours, keys.encode())

    def wait_for(self, is_so: Callable[[list[str]], bool]) -> list[str]:
        """Wait until the screen is as it should be, and return its lines."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not is_so(lines := self.lines):
            assert time.monotonic() < deadline, "\n".join(lines)
            time.sleep(0.02)
        return lines

    def wait_for_text(self, text: str) -> list[str]:
        """Wait until a text stands on the screen, and return its lines."""
        return self.wait_for(lambda lines: any(text in line for line in lines))

    def end(self) -> int:
        """Wait for the command's end, and return its exit code; what it wrote is read to the end."""
        code = self.process.wait(_PATIENCE_SECONDS)
        self._reading.join(_PATIENCE_SECONDS)
        return code

    def close(self) -> None:
        """End the command, if it still runs."""
        self.process.kill()
        self.end()
        os.close(self._ours)


@contextmanager
def on_terminal(home: Path, *command: str, columns: int = 80, lines: int = 24, **extra: str) -> Iterator[Terminal]:
    """Run a command on a terminal of its own."""
    terminal = Terminal(home, command, columns, lines, **extra)
    try:
        yield terminal
    finally:
        terminal.close()

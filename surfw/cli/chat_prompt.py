"""The input line of `chat`: editing, history with the arrow keys, completion of commands.

It uses prompt_toolkit and draws on stderr. The history file is our own, since prompt_toolkit's is readable by others
and grows without bound; if it cannot be read or written, the history lasts for the session only.
"""

import errno
import json
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import History
from prompt_toolkit.output import create_output

from surfw.cli.screen import has_styles
from surfw.files import read_regular

_PROMPT = "> "
_KEPT_ENTRIES = 1000
_MOST_ENTRY_BYTES = 64_000
_MOST_BYTES = 4_000_000
"""A larger file is cut to its last entries when it is read; one of more than twice this size is emptied."""


class LineEditor:
    """Reads a person's messages, one at a time."""

    def __init__(self, history: Path, commands: Sequence[str]) -> None:
        """Prepare the terminal.

        Args:
            history: the file that keeps the messages.
            commands: words that Tab completes at the beginning of a line.
        """
        self._session: PromptSession[str] = PromptSession(
            history=PrivateHistory(history),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str:
        """Wait for a message; a text of several lines can be pasted.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
            EOFError: Ctrl-D was pressed in an empty line, or the terminal is gone.
        """
        sign: StyleAndTextTuples = [("bold" if has_styles() else "", _PROMPT)]
        return self._session.prompt(sign, handle_sigint=False)


class PrivateHistory(History):
    """The last entries, in a file that only its owner can read, as one JSON string per line."""

    def __init__(self, path: Path) -> None:
        """The file need not exist."""
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """Return the entries, the newest first."""
        try:
            data = read_regular(self._path, 2 * _MOST_BYTES)
        except OSError as exc:
            if exc.errno == errno.EFBIG:
                with suppress(OSError):
                    self._write([], os.O_TRUNC)
            return []
        lines = data.decode(errors="replace").splitlines()
        if len(lines) > 2 * _KEPT_ENTRIES or len(data) > _MOST_BYTES:
            lines = _last(lines)
            with suppress(OSError):
                self._write(lines, os.O_TRUNC)
        return [entry for line in reversed(lines) if (entry := _parse(line))]

    def store_string(self, string: str) -> None:
        """Add an entry, unless it is too long to have been typed."""
        line = json.dumps(string)
        if len(line) > _MOST_ENTRY_BYTES:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write([line], os.O_APPEND)

    def _write(self, lines: Sequence[str], how: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | how  # a FIFO must not block until it is read
        with os.fdopen(os.open(self._path, flags, 0o600), "w") as file:
            file.write("".join(f"{line}\n" for line in lines))


def _last(lines: Sequence[str]) -> list[str]:
    """Return the last entries, within the limits on their number and half of that on bytes."""
    kept: list[str] = []
    room = _MOST_BYTES // 2
    for line in reversed(lines[-_KEPT_ENTRIES:]):
        room -= len(line)
        if room < 0:
            break
        kept.append(line)
    return kept[::-1]


def _parse(line: str) -> str | None:
    """Return the entry in a line of the file; None if it is not one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, str) else None

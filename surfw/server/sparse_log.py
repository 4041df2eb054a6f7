"""Lines of log that a client can cause as often as it likes: one now and then, with how many it stands for."""

import logging
import time

_SECONDS = 10


class SparseLog:
    """Writes the first lines at once, and then at most so many every some seconds."""

    def __init__(self, log: logging.Logger, *, level: int = logging.INFO, most: int = 1) -> None:
        """Nothing was written yet; `most` lines are written at a time."""
        self._log = log
        self._level = level
        self._most = self._left = most
        self._next = float("-inf")
        self._unwritten = 0
        self._last = ""

    def write(self, text: str) -> None:
        """Write the line, or count it."""
        self._unwritten += 1
        self._last = text
        if time.monotonic() >= self._next:
            self._left, self._next = self._most, time.monotonic() + _SECONDS
        if self._left:
            self._left -= 1
            self.flush()

    def flush(self) -> None:
        """Write what was counted."""
        if not self._unwritten:
            return
        more = f" (and {self._unwritten - 1} times more before)" if self._unwritten > 1 else ""
        self._log.log(self._level, "%s%s", self._last, more)
        self._unwritten = 0


class ClientLog:
    """What a server says of its clients: a sparse log for each kind of line, the same for all of them."""

    def __init__(self, log: logging.Logger) -> None:
        """Nothing was written yet."""
        self.visits = SparseLog(log, most=20)
        self.closings = SparseLog(log, level=logging.WARNING)
        self.refusals = SparseLog(log)
        self.failures = SparseLog(log, level=logging.WARNING)
        self.changes = SparseLog(log, level=logging.ERROR)

    def flush(self) -> None:
        """Write what was counted."""
        for kind in (self.visits, self.closings, self.refusals, self.failures, self.changes):
            kind.flush()

"""Lines of log that a client can cause as often as it likes: one now and then, with how many it stands for."""

import logging
import time

_SECONDS = 10


class SparseLog:
    """Writes the first line at once, and then at most one every some seconds."""

    def __init__(self, log: logging.Logger, *, level: int = logging.INFO) -> None:
        """Nothing was written yet."""
        self._log = log
        self._level = level
        self._next = float("-inf")
        self._unwritten = 0
        self._last = ""

    def write(self, text: str) -> None:
        """Write the line, or count it."""
        self._unwritten += 1
        self._last = text
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Write what was counted."""
        if not self._unwritten:
            return
        more = f" (and {self._unwritten - 1} times more before)" if self._unwritten > 1 else ""
        self._log.log(self._level, "%s%s", self._last, more)
        self._unwritten, self._next = 0, time.monotonic() + _SECONDS

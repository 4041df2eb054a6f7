"""How long a client waits for a server: a decision without I/O.

While requests are open, the server has to make *progress*: `PROGRESS_BYTES` of answers arrive, an answer is completed,
or the server reports that it has read that much more of its storage for a request. Pings and single bytes do not count.
After `silence_seconds` without progress the connection is stalled. A request may wait longer while others progress,
because answers take turns and more urgent ones go first. But once it has been overtaken as often as requests may be
open, only its own progress counts for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from surfw.config import PROGRESS_BYTES
from surfw.wire import Get, Request


@dataclass(slots=True)
class _Wait:
    """The state of an open request.

    Attributes:
        priority: lower numbers are more urgent.
        most_read_bytes: the most that the server can read for it; 0 once it was cancelled.
        progressed: when it last made progress.
        read_bytes: how much of the server's reading has counted as progress.
        overtaken: how many later requests, none of them more urgent, were answered since its last progress.
    """

    priority: int
    most_read_bytes: int
    progressed: float
    read_bytes: int = 0
    overtaken: int = 0


class ServerPatience:
    """Decides how long to wait, for one connection. `clock` returns the time in seconds."""

    def __init__(self, silence_seconds: float, clock: Callable[[], float]) -> None:
        self.silence_seconds = silence_seconds
        self._clock = clock
        self._waits: dict[int, _Wait] = {}
        self._progressed = 0.0
        self._arrived_bytes = 0

    def asked(self, request: Request, most_read_bytes: int) -> None:
        """A request was sent, for which the server reads at most `most_read_bytes`."""
        now = self._clock()
        if not self._waits:
            self._progressed, self._arrived_bytes = now, 0
        priority = request.priority if isinstance(request, Get) else 0
        self._waits[request.id] = _Wait(priority, most_read_bytes, now)

    def arrived(self, request_id: int, size: int) -> None:
        """`size` more bytes of an answer arrived."""
        self._arrived_bytes += size
        if self._arrived_bytes >= PROGRESS_BYTES:
            self._progress(self._waits.get(request_id))

    def read(self, request_id: int, read_bytes: int) -> None:
        """The server reports `read_bytes` read for a request. More than `most_read_bytes` does not count."""
        wait = self._waits[request_id]
        read_bytes = min(read_bytes, wait.most_read_bytes)
        if read_bytes >= wait.read_bytes + PROGRESS_BYTES:
            wait.read_bytes = read_bytes
            self._progress(wait)

    def given_up(self, request_id: int) -> None:
        """The request was cancelled: reading for it no longer counts, but its answer may still arrive."""
        if request_id in self._waits:
            self._waits[request_id].most_read_bytes = 0

    def answered(self, request_id: int) -> None:
        """An answer is complete, or failed."""
        answered = self._waits.pop(request_id)
        self._progress(None)
        for other, wait in self._waits.items():
            wait.overtaken += request_id > other and answered.priority >= wait.priority

    def _progress(self, wait: _Wait | None) -> None:
        self._progressed, self._arrived_bytes = self._clock(), 0
        if wait:
            wait.progressed, wait.overtaken = self._progressed, 0

    def stalls(self, requests: int) -> tuple[float, list[int]]:
        """Return when to check again (in the past if the connection is stalled), and the stalled requests.

        Args:
            requests: how many requests may be open at a time.
        """
        due, stalled = self._progressed + self.silence_seconds, []
        for request_id, wait in self._waits.items():
            if wait.overtaken >= requests and wait.most_read_bytes:
                last = wait.progressed + self.silence_seconds
                if self._clock() >= last:
                    stalled.append(request_id)
                else:
                    due = min(due, last)
        return due, stalled

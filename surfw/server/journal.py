"""What happens in a server: each event is a line of its log, and one of the latest that its statistics list.

Clients can cause events as often as they like, so those are sparse: every ten seconds a few are told, the others
counted. What an event says goes to everybody who may see the statistics; its details, such as where things lie, go to
the log and to the server's own screen only. All are counted, by kind.
"""

import logging
import time
from collections import Counter, deque
from dataclasses import dataclass

from surfw.config import count, printable
from surfw.wire import ServerEvent

log = logging.getLogger("surfw.server")

KEPT_EVENTS = 50
_MOST_CHARACTERS, _END_CHARACTERS = 400, 100
_SPARSE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class _Entry:
    time: float
    kind: str
    text: str
    details: str


class Journal:
    """Logs events, and keeps the latest `KEPT_EVENTS`.

    A line of the log has the parts of its event as attributes of the record: `kind`, `event` (the text), `details`, and
    `more`, for how many others it stands.

    Attributes:
        counts: how many events there were of each kind and code, those included that were not told.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._entries: deque[_Entry] = deque(maxlen=KEPT_EVENTS)
        self.counts: Counter[tuple[str, str]] = Counter()

    def note(
        self,
        kind: str,
        text: str,
        details: str = "",
        *,
        level: int = logging.INFO,
        trace: BaseException | None = None,
    ) -> None:
        """Log an event, keep it, and count it.

        Args:
            kind: one of those that `ServerEvent` lists.
            text: for everybody who may see the statistics.
            details: for the log and the server's own screen.
            level: of the line in the log.
            trace: an exception whose traceback goes to the log.
        """
        self.counts[kind, ""] += 1
        self.tell(kind, text, details, level=level, trace=trace)

    def tell(
        self,
        kind: str,
        text: str,
        details: str = "",
        *,
        level: int = logging.INFO,
        trace: BaseException | None = None,
        more: int = 0,
    ) -> None:
        """Log and keep an event that was counted; it stands for so many more before."""
        parts = {"kind": kind, "event": text, "details": details, "more": more}
        if more:
            told = f" (and {count(more, 'time')} more before)"
            text, details = (text, details + told) if details else (text + told, "")
        log.log(level, "%s%s", text, f": {details}" if details else "", exc_info=trace, extra=parts)
        self._entries.append(_Entry(time.time(), kind, text, details))

    def recent(self, *, details: bool = False) -> list[ServerEvent]:
        """Return the latest events, the oldest first."""
        return [
            {
                "time": entry.time,
                "kind": entry.kind,
                "text": _cut(printable(f"{entry.text}: {entry.details}" if details and entry.details else entry.text)),
            }
            for entry in self._entries
        ]


def _cut(text: str) -> str:
    """The text, without its middle where it is long: in the end it says how often it came."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - _END_CHARACTERS - 1]}…{text[-_END_CHARACTERS:]}"


class Sparse:
    """Events of one kind that come as often as others like: a few are noted at a time, the others counted."""

    def __init__(self, journal: Journal, kind: str, level: int, *, most: int = 1) -> None:
        """Note at most this many events every ten seconds."""
        self._journal = journal
        self._kind = kind
        self._level = level
        self._most = self._left = most
        self._next = float("-inf")
        self._counted = 0
        self._last: tuple[str, str, BaseException | None] = ("", "", None)

    def note(self, text: str, details: str = "", *, code: str = "", trace: BaseException | None = None) -> None:
        """Note the event, or count it; `code` is one of a few, and says more than the kind."""
        self._counted += 1
        self._journal.counts[self._kind, code] += 1
        self._last = text, details, trace
        if time.monotonic() >= self._next:
            self._left, self._next = self._most, time.monotonic() + _SPARSE_SECONDS
        if self._left:
            self._left -= 1
            self.flush()

    def flush(self) -> None:
        """Note the last event that was counted, with the number of the others."""
        if not self._counted:
            return
        text, details, trace = self._last
        self._journal.tell(self._kind, text, details, level=self._level, trace=trace, more=self._counted - 1)
        self._counted = 0
        self._last = ("", "", None)


class ClientLog:
    """What a server notes about its clients: each kind of event is sparse by itself, for all clients together."""

    def __init__(self, journal: Journal) -> None:
        """Start with nothing counted."""
        self.arrivals = Sparse(journal, "joined", logging.INFO, most=10)
        self.departures = Sparse(journal, "left", logging.INFO, most=10)
        self.closings = Sparse(journal, "closed", logging.WARNING)
        self.refusals = Sparse(journal, "refused", logging.INFO)
        self.handshakes = Sparse(journal, "refused", logging.WARNING)
        self.failures = Sparse(journal, "failed", logging.WARNING)
        self.changes = Sparse(journal, "failed", logging.ERROR)
        self.bugs = Sparse(journal, "failed", logging.ERROR)

    def flush(self) -> None:
        """Note what was counted, of each kind."""
        for kind in vars(self).values():
            kind.flush()

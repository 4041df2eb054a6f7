"""The events of a server: each is a line of its log, and the latest are listed in its statistics.

Clients can cause events as often as they like, so those are rate-limited: a few are reported every ten seconds, the
others only counted. The text of an event is for everyone who may see the statistics; its details, such as storage
locations, are only for the log and the server's own screen. All events are counted by kind.
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

    Log records have the parts of the event as attributes: `kind`, `event` (the text), `details`, and `more`, the number
    of unreported events before it.

    Attributes:
        counts: the number of events of each kind and code, including unreported ones.
    """

    def __init__(self) -> None:
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
            kind: one of the kinds in `ServerEvent`.
            text: for everyone who may see the statistics.
            details: for the log and the server's own screen.
            level: the log level.
            trace: an exception whose traceback is logged.
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
        """Log and keep an event that was already counted; `more` is the number of unreported ones before it."""
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
    """Shorten a long text in the middle: its end says how often the event occurred."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[: _MOST_CHARACTERS - _END_CHARACTERS - 1]}…{text[-_END_CHARACTERS:]}"


class Sparse:
    """Events of one kind that others can cause at will: a few are reported, the others only counted."""

    def __init__(self, journal: Journal, kind: str, level: int, *, most: int = 1) -> None:
        """Report at most `most` events every ten seconds."""
        self._journal = journal
        self._kind = kind
        self._level = level
        self._most = self._left = most
        self._next = float("-inf")
        self._counted = 0
        self._last: tuple[str, str, BaseException | None] = ("", "", None)

    def note(self, text: str, details: str = "", *, code: str = "", trace: BaseException | None = None) -> None:
        """Report the event, or count it; `code` is one of a few values that refine the kind."""
        self._counted += 1
        self._journal.counts[self._kind, code] += 1
        self._last = text, details, trace
        if time.monotonic() >= self._next:
            self._left, self._next = self._most, time.monotonic() + _SPARSE_SECONDS
        if self._left:
            self._left -= 1
            self.flush()

    def flush(self) -> None:
        """Report the last counted event, with the number of the others."""
        if not self._counted:
            return
        text, details, trace = self._last
        self._journal.tell(self._kind, text, details, level=self._level, trace=trace, more=self._counted - 1)
        self._counted = 0
        self._last = ("", "", None)


class ClientLog:
    """The events that clients cause: each kind is rate-limited separately, for all clients together."""

    def __init__(self, journal: Journal) -> None:
        self.arrivals = Sparse(journal, "joined", logging.INFO, most=10)
        self.departures = Sparse(journal, "left", logging.INFO, most=10)
        self.closings = Sparse(journal, "closed", logging.WARNING)
        self.refusals = Sparse(journal, "refused", logging.INFO)
        self.handshakes = Sparse(journal, "refused", logging.WARNING)
        self.failures = Sparse(journal, "failed", logging.WARNING)
        self.changes = Sparse(journal, "failed", logging.ERROR)
        self.bugs = Sparse(journal, "failed", logging.ERROR)

    def flush(self) -> None:
        """Report pending events of each kind."""
        for kind in vars(self).values():
            kind.flush()

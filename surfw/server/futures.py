"""When clients will next read what, from the cycles that they announced and what they have requested since. Pure.

A model reads its chunks in a cycle, so its client knows what comes next. The optimal policy for a cache is to evict
what is needed last (L. A. Belady, «A study of replacement algorithms for a virtual-storage computer», IBM Systems
Journal 5(2), 1966). With one client, its own order is enough for that. With several, their orders need a common scale:
the bytes that all of them use, which serve as a clock. A client's progress on this clock predicts when it reads what.
So clients need not be in step, nor equally fast.

Announcements are estimates; a wrong one costs hits, nothing else. The longer a client has been silent, the later it is
expected back, so that its claims fade.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

_FIRST_PACE = 1.0

_LATE = 4
"""A request at most this many chunks behind the last one is late: it was overtaken, or is a retry."""

_ROUNDING = 1e-9


class Part(NamedTuple):
    """A part of a chunk: `start` to `stop` as fractions (0 to 1) of its stored bytes, in any form."""

    chunk: str
    start: float
    stop: float


@dataclass(slots=True, eq=False)
class Asked:
    """The rest of a request that is being answered: from `start` on."""

    start: float
    stop: float


class Future:
    """What one client will read, in which order, and how fast it proceeds."""

    def __init__(self, cycle: Sequence[str], kept: Sequence[str], now: float, pace: float) -> None:
        """Start at the beginning of the first pass.

        Args:
            cycle: the chunks in the order in which they are used, repeatedly; a chunk may recur.
            kept: those of them that the client keeps in memory: they are read in the first pass at most.
            now: the time.
            pace: an estimate of the time per chunk, until it is observed.
        """
        self._cycle = cycle
        self._kept = frozenset(cycle).intersection(kept)
        self._asked: defaultdict[str, list[Asked]] = defaultdict(list)
        self._is_first_pass = True
        self._at = 0.0
        self._heard, self._asked_last = now, 0.0
        self._took, self._moved = pace, 1.0
        self._lay_out(cycle)

    def _lay_out(self, coming: Sequence[str]) -> None:
        self._length = len(coming)
        self._places: defaultdict[str, list[int]] = defaultdict(list)
        for place, chunk in enumerate(coming):
            self._places[chunk].append(place)

    @property
    def pace(self) -> float:
        """The time per chunk, averaged over about the last pass."""
        return self._took / self._moved

    def knows(self, chunk: str) -> bool:
        """Whether the client announced reading this chunk, and may still read it."""
        return chunk in self._places

    @contextmanager
    def reading(self, part: Part, now: float) -> Iterator[Asked]:
        """Mark a part of a chunk as requested, and needed until the body ends; the body advances `start`."""
        self._move(part, now)
        asked = Asked(part.start, part.stop)
        self._asked[part.chunk].append(asked)
        try:
            yield asked
        finally:
            self._asked[part.chunk].remove(asked)
            if not self._asked[part.chunk]:
                del self._asked[part.chunk]

    def _move(self, part: Part, now: float) -> None:
        """Advance to the end of a part, unless the request for it is late."""
        place = self._next_place(part)
        if place is None:
            return
        ahead = self._ahead(place, part)
        behind = self._length - ahead
        if behind <= _LATE and behind < ahead:
            return
        step = ahead + part.stop - part.start
        left = 1 - min(1.0, step / self._length)
        self._took = self._took * left + now - self._heard
        self._moved = self._moved * left + step
        self._heard, self._asked_last = now, part.stop - part.start
        is_over = place + part.start < self._at - _ROUNDING
        self._at = place + part.stop
        if self._is_first_pass and (is_over or self._at >= self._length):
            self._begin_second_pass(self._at % self._length)

    def _begin_second_pass(self, at: float) -> None:
        """Remove kept chunks from the cycle: they were read, and are not read again."""
        self._is_first_pass = False
        place = int(at)
        self._at = at - place + sum(chunk not in self._kept for chunk in self._cycle[:place])
        self._lay_out([chunk for chunk in self._cycle if chunk not in self._kept])

    def _next_place(self, part: Part) -> int | None:
        """Return where in the cycle the part is used next; None if nowhere."""
        places = self._places.get(part.chunk)
        if not places:
            return None
        index = bisect_left(places, self._at - part.start - _ROUNDING)
        return places[index] if index < len(places) else places[0]

    def _ahead(self, place: int, part: Part) -> float:
        """Return the distance to the use of a part at a place, in chunks."""
        ahead = place + part.start - self._at
        return max(0.0, ahead) if ahead > -_ROUNDING else ahead + self._length

    def next_use(self, part: Part, now: float) -> float:
        """Return when the part is needed next: -∞ if it is being requested, ∞ if never."""
        asked = self._asked.get(part.chunk, ())
        if any(one.start < part.stop - _ROUNDING and part.start < one.stop - _ROUNDING for one in asked):
            return -math.inf
        place = self._next_place(part)
        if place is None:
            return math.inf
        wait = (self._asked_last + self._ahead(place, part)) * self.pace
        silence = now - self._heard
        return now + silence + wait if silence > self.pace * self._length / 2 else self._heard + wait


class Futures:
    """The futures of all clients that announced one.

    Attributes:
        now: the time: the bytes used so far, by anyone.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._all: dict[Future, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, cycle: Sequence[str], kept: Sequence[str]) -> Future:
        """Add a client's announcement; it counts until it is removed."""
        paces = [one.pace for one in self._all]
        future = Future(cycle, kept, self.now, sum(paces) / len(paces) if paces else _FIRST_PACE)
        self._all[future] = None
        return future

    def remove(self, future: Future) -> None:
        """Remove the future of a client that left or announced another."""
        self._all.pop(future, None)

    def next_use(self, part: Part | None) -> float:
        """Return when any client needs the part next; ∞ if none announced it."""
        if part is None:
            return math.inf
        return min((one.next_use(part, self.now) for one in self._all), default=math.inf)

"""When clients will read what again, from the cycles that they announced and what they asked for since. Pure.

A model reads its chunks in a cycle, so its client knows what comes. The best that a cache can do is to evict what is
needed last (L. A. Belady, «A study of replacement algorithms for a virtual-storage computer», IBM Systems Journal 5(2),
1966). With one client its own order is enough for that. With several, their orders have to be put on one scale: here
the bytes that all of them use, which serve as a clock. From how far each client came in that time follows when it will
be where. So clients need not be in step, nor equally fast.

What a client announces is an estimate, and a wrong one costs hits, nothing else. A client that falls silent is expected
back the later, the longer that lasts, so that its claims fade.
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
"""A request this many chunks behind the last one, or less, is late: it was overtaken, or is made again."""

_ROUNDING = 1e-9


class Part(NamedTuple):
    """A part of a chunk: shares `start` to `stop` of its stored bytes, from 0 to 1, in whatever form."""

    chunk: str
    start: float
    stop: float


@dataclass(slots=True, eq=False)
class Asked:
    """What is left of a request that is being answered: from `start` on."""

    start: float
    stop: float


class Future:
    """What one client will read, in which order, and how fast it gets on."""

    def __init__(self, cycle: Sequence[str], kept: Sequence[str], now: float, pace: float) -> None:
        """Start at the beginning of the first pass.

        Args:
            cycle: the chunks in the order in which they are used, again and again; a chunk may recur.
            kept: those of them that the client keeps: they are read in the first pass at most.
            now: the time.
            pace: how long a chunk may take; what is observed takes its place.
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
        """How long it takes for a chunk, over about the last pass."""
        return self._took / self._moved

    def knows(self, chunk: str) -> bool:
        """Whether it was announced that this chunk will be read, and may still be."""
        return chunk in self._places

    @contextmanager
    def reading(self, part: Part, now: float) -> Iterator[Asked]:
        """Note that a part of a chunk is asked for, and is needed until the body ends; the body moves `start` on."""
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
        """Come to the end of a part, unless the request for it is late."""
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
        """What is kept was read, and is not read again."""
        self._is_first_pass = False
        place = int(at)
        self._at = at - place + sum(chunk not in self._kept for chunk in self._cycle[:place])
        self._lay_out([chunk for chunk in self._cycle if chunk not in self._kept])

    def _next_place(self, part: Part) -> int | None:
        """Where in the cycle the part is used next; None if nowhere."""
        places = self._places.get(part.chunk)
        if not places:
            return None
        index = bisect_left(places, self._at - part.start - _ROUNDING)
        return places[index] if index < len(places) else places[0]

    def _ahead(self, place: int, part: Part) -> float:
        """How far ahead the use of a part at a place lies, in chunks."""
        ahead = place + part.start - self._at
        return max(0.0, ahead) if ahead > -_ROUNDING else ahead + self._length

    def next_use(self, part: Part, now: float) -> float:
        """When the part is needed next: -∞ if it is asked for, ∞ if never."""
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
        now: the time, as the bytes that were used so far, by anybody.
    """

    def __init__(self) -> None:
        """Know of no client."""
        self.now = 0.0
        self._all: dict[Future, None] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, cycle: Sequence[str], kept: Sequence[str]) -> Future:
        """Take what a client announces; it counts until it is removed."""
        paces = [one.pace for one in self._all]
        future = Future(cycle, kept, self.now, sum(paces) / len(paces) if paces else _FIRST_PACE)
        self._all[future] = None
        return future

    def remove(self, future: Future) -> None:
        """Forget a future, of a client that left or has announced another."""
        self._all.pop(future, None)

    def next_use(self, part: Part | None) -> float:
        """When any client needs the part next; ∞ if none does, as far as they said."""
        if part is None:
            return math.inf
        return min((one.next_use(part, self.now) for one in self._all), default=math.inf)

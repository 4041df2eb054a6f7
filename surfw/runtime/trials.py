"""Which of two ways of loading is faster: each is gone a few loads in a row, and the faster one is kept. Pure.

One way is kept, the other is tried now and then. What is compared are bytes per second, from the end of one load to the
end of a later one, while no load of the other way is going on: whatever overlaps in a run overlaps in these as well.

A trial cannot lose more time than it takes. So after each there is a pause of `1 ÷ _SHARE` times as long, which doubles
with each trial that is lost: trials never lose more than that share of a run. Where the speed of what is kept
has changed since, the pause is the first one again.
"""

from collections import Counter

_LOADS, _SECONDS = 4, 0.25
"""A way has shown how fast it is after so many loads, and so much time."""

_SHARE = 1 / 40
_BETTER = 1.03
"""What is tried is kept where it is so much faster: less is within what one trial differs from the next one."""

_CHANGED = 1.25
_KEEP_SECONDS = 2.0


class _Speed:
    """Loads in one way, those of the last seconds."""

    def __init__(self) -> None:
        self.loads = 0
        self.bytes = 0.0
        self.seconds = 0.0

    def add(self, size_bytes: int, seconds: float) -> None:
        if self.seconds > _KEEP_SECONDS:
            self.bytes, self.seconds = self.bytes / 2, self.seconds / 2
        self.loads += 1
        self.bytes += size_bytes
        self.seconds += seconds

    @property
    def per_second(self) -> float | None:
        """Bytes per second; None before it is known."""
        return self.bytes / self.seconds if self.loads >= _LOADS and self.seconds >= _SECONDS else None


class Trials:
    """Two ways of loading, False and True. Times are in seconds of any clock, which may stand still between runs.

    Attributes:
        kept: the way that is thought to be the faster one.
        is_trying: whether loads go the other one for the moment.
    """

    def __init__(self, *, kept: bool) -> None:
        """Begin with one way."""
        self.kept = kept
        self.is_trying = False
        self._speed = _Speed()  # of the way that loads go now
        self._usual: float | None = None  # of the kept one, while the other is tried
        self._verdict: float | None = None  # of the kept one, when the last trial ended
        self._loading: Counter[bool] = Counter()
        self._since: float | None = None  # when the last load ended, if nothing went the other way
        self._turned = 0.0  # when the last trial began or ended
        self._pause = 0.0
        self._losses = 0

    @property
    def way(self) -> bool:
        """The way that loads go now."""
        return self.kept ^ self.is_trying

    def choose(self, now: float) -> bool:
        """The way of the next load; a trial begins where one is due."""
        usual = self._speed.per_second
        if not self.is_trying and usual is not None and now - self._turned >= self._due(usual):
            self._usual = usual
            self._turn(now, is_trying=True)
        return self.way

    def keep(self, way: bool, now: float) -> None:
        """It is known by other means that this way is faster; a trial of the other one is lost."""
        if self.is_trying:
            self._end(now, won=way is self.way)
        if way is not self.kept:
            self.kept, self._losses, self._verdict = way, 0, None
            self._turn(now, is_trying=False)

    def loads(self, way: bool) -> int:
        """How many loads are going on that way."""
        return self._loading[way]

    def begun(self, way: bool) -> None:
        """A load has begun."""
        self._loading[way] += 1

    def ended(self, way: bool, size_bytes: int, now: float) -> None:
        """A load of so many bytes has ended; nothing is learned from one of no bytes."""
        self._loading[way] -= 1
        if way is not self.way or self._loading[not way] or not size_bytes:
            self._since = None
            return
        if self._since is not None:
            self._speed.add(size_bytes, now - self._since)
        self._since = now
        if self.is_trying and self._usual is not None and (speed := self._speed.per_second) is not None:
            self._end(now, won=speed > self._usual * _BETTER)

    def _due(self, usual: float) -> float:
        """How long after the last trial the next one may begin."""
        changed = self._verdict is not None and not 1 / _CHANGED < usual / self._verdict < _CHANGED
        return self._pause if changed else self._pause * 2**self._losses

    def _end(self, now: float, *, won: bool) -> None:
        """A trial has ended; what has won is kept."""
        self._pause = (now - self._turned) / _SHARE
        self._losses = 0 if won else self._losses + 1
        self._verdict = self._speed.per_second if won else self._usual
        self.kept ^= won
        self._turn(now, is_trying=False)

    def _turn(self, now: float, *, is_trying: bool) -> None:
        self.is_trying, self._turned, self._since, self._speed = is_trying, now, None, _Speed()

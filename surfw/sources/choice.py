"""Select one of several sources, and decide when to retry a failed one. Pure: the caller passes the time.

By default, sources are used in the given order of preference. By speed, each source gets a few ranges at first, then
the fastest is used; now and then another one gets a single range, in case it has become faster. A source that failed
rests, longer after each consecutive failure, and is then tried with the next request, so that a preferred source is
back in use soon after it has recovered. A source that delivered damage or another model is set aside permanently.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from surfw.retry import RetryPolicy

_LATE_FACTOR = 4.0
_LEAST_LATE_SECONDS, _UNKNOWN_LATE_SECONDS = 1.0, 3.0
_TRY_SECONDS = 5.0
"""How long a failed source is reserved for the one request that tries it again."""

_NEWEST_SHARE = 0.3
"""The weight of the newest range in the moving averages of a source's speed."""

_TRIED_AT_ONCE = 3
"""How many ranges may be in flight from a source of unknown speed."""

_TRY_AGAIN_SECONDS = 10.0
"""After this long without a request, the speed of a source is measured again."""

_LEAST_GAIN = 1.25
"""A source is preferred over an earlier one only if it is faster by this factor."""


@dataclass(slots=True)
class Standing:
    """The state of a source.

    Attributes:
        url: its address, for display.
        failures: its number of consecutive failures.
        rests_until: when it may be used again.
        failed_at: the time of the first failure since its last success, or None.
        why: its last failure, for display.
        is_tried: whether a request is testing if it has recovered; other requests go elsewhere meanwhile.
        aside: whether it is no longer used.
        seconds_per_byte: the average duration of a range per byte; None before the first range.
        bytes_per_second: its average throughput over concurrent ranges; None before the first range.
        in_flight: its number of requests in flight.
        asked_at: the time of its last request.
    """

    url: str
    failures: int = 0
    rests_until: float = 0.0
    failed_at: float | None = None
    why: str = ""
    is_tried: bool = False
    aside: bool = False
    seconds_per_byte: float | None = None
    bytes_per_second: float | None = None
    in_flight: int = 0
    asked_at: float = float("-inf")


@dataclass
class SourceTable:
    """The states of all sources, in order of preference.

    Attributes:
        standings: one per source.
        retry: how long a source rests after each failure.
        by_speed: whether to prefer the fastest source, and not the first.
        draw: returns random numbers from 0 to 1 for jitter, so that clients do not all retry at the same moment.
    """

    standings: Sequence[Standing]
    retry: RetryPolicy
    by_speed: bool = False
    draw: Callable[[], float] = field(default=random.random)

    def usable(self, now: float) -> list[int]:
        """Return the sources that may be used now, best first."""
        found = [index for index, one in enumerate(self.standings) if not one.aside and one.rests_until <= now]
        if self.by_speed:
            best = max((self.standings[index].bytes_per_second or 0.0 for index in found), default=0.0)
            found.sort(key=lambda index: self._rank(self.standings[index], best, now))
        return found

    def _rank(self, one: Standing, best: float, now: float) -> tuple[int, float]:
        """The sort key of a source; sources of equal rank keep their order."""
        speed = one.bytes_per_second
        if speed is None:
            return (0 if one.in_flight < _TRIED_AT_ONCE else 3), one.in_flight
        if not one.in_flight and now - one.asked_at >= _TRY_AGAIN_SECONDS:
            return 0, 0
        return (1, 0) if speed * _LEAST_GAIN >= best else (2, -speed)

    def begin(self, index: int, now: float) -> None:
        """Record the start of a request, until `end`. A source that has failed gets one request at a time."""
        one = self.standings[index]
        one.in_flight += 1
        one.asked_at = now
        if one.failed_at is not None:
            one.is_tried, one.rests_until = True, now + _TRY_SECONDS

    def end(self, index: int) -> None:
        """Record the end of a request."""
        self.standings[index].in_flight -= 1

    def next_try(self) -> tuple[float, int] | None:
        """Return when the next source may be used, and which one; None if all are set aside."""
        return min(
            ((one.rests_until, index) for index, one in enumerate(self.standings) if not one.aside), default=None
        )

    def late_seconds(self, index: int, size: int) -> float:
        """Return after how many seconds a range of `size` bytes is late, so that another source is asked too."""
        usual = self.standings[index].seconds_per_byte
        return _UNKNOWN_LATE_SECONDS if usual is None else max(_LEAST_LATE_SECONDS, _LATE_FACTOR * usual * size)

    def succeeded(self, index: int, size: int, seconds: float) -> None:
        """Record a success: `size` bytes in `seconds`. A size of 0 does not count as a speed measurement."""
        one = self.standings[index]
        one.failures, one.rests_until, one.failed_at, one.is_tried = 0, 0.0, None, False
        if size:
            each = seconds / size
            one.seconds_per_byte = _average(one.seconds_per_byte, each)
            one.bytes_per_second = _average(one.bytes_per_second, max(one.in_flight, 1) / max(each, 1e-12))

    def progressed(self, index: int) -> None:
        """Record that a source delivered something before it failed: its failure count restarts."""
        self.standings[index].failures = 0

    def is_exhausted(self) -> bool:
        """Return whether every source has used up its attempts or was set aside."""
        return all(one.aside or one.failures >= self.retry.attempts for one in self.standings)

    def failed(self, index: int, now: float, why: str) -> None:
        """Record that a source failed or was late. Concurrent requests count as one failure."""
        one = self.standings[index]
        one.why = why
        if one.rests_until > now and not one.is_tried:
            return
        one.is_tried = False
        if one.failed_at is None:
            one.failed_at = now
        policy = self.retry
        delay = min(policy.first_delay_seconds * policy.backoff**one.failures, policy.most_delay_seconds)
        one.failures = min(one.failures + 1, 1000)
        one.rests_until = now + delay * (1 - policy.jitter * self.draw())

    def set_aside(self, index: int, why: str) -> None:
        """Stop using a source permanently."""
        self.standings[index].aside, self.standings[index].why = True, why


def _average(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST_SHARE) * old + _NEWEST_SHARE * new

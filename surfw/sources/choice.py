"""Which of several sources is asked, and when one that failed is asked again. Pure: the caller says what time it is.

Sources are asked in the order they were given: the first is the one that is wanted. Or by speed: each is tried a little
at first, then the one that delivers most is asked, and now and then another one, for one range, in case it is faster
now. One that failed rests, longer after
each failure in a row, and is then tried with whatever is to be fetched next: so the better one is back soon after it is
up again. One that delivered damage, or that is another model's, is set aside for good.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from surfw.retry import RetryPolicy

_LATE_FACTOR = 4.0
_LEAST_LATE_SECONDS, _UNKNOWN_LATE_SECONDS = 1.0, 3.0
_TRY_SECONDS = 5.0
"""After this long, another request may try a source that failed."""

_NEWEST_SHARE = 0.3
"""How much the newest range counts in what a source usually takes."""

_TRIED_AT_ONCE = 3
"""So many ranges are asked of a source of unknown speed."""

_TRY_AGAIN_SECONDS = 10.0
"""After this long, the speed of a source that is not asked is looked at again."""

_LEAST_GAIN = 1.25
"""A source is taken before one that was given earlier if it delivers this much more."""


@dataclass(slots=True)
class Standing:
    """What is known of a source.

    Attributes:
        url: its address, for people.
        failures: how often it failed in a row.
        rests_until: when it may be asked again.
        failed_at: when the first of these failures was, or None.
        why: what its last failure was, for people.
        is_tried: whether one request finds out whether it is up again; others go elsewhere meanwhile.
        aside: whether it is not asked any more.
        seconds_per_byte: what a range usually takes; None before the first one.
        bytes_per_second: what it delivers in all its ranges together; None before the first one.
        in_flight: how much it is asked for now.
        asked_at: when it was asked last.
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
    """The standings of all sources, in their order.

    Attributes:
        standings: of each source.
        retry: how long one rests after each failure.
        by_speed: whether the fastest is asked first, and not the first.
        draw: gives random numbers from 0 to 1, so that many clients do not come back at the same moment.
    """

    standings: Sequence[Standing]
    retry: RetryPolicy
    by_speed: bool = False
    draw: Callable[[], float] = field(default=random.random)

    def usable(self, now: float) -> list[int]:
        """The sources that may be asked now, the one to ask first first."""
        found = [index for index, one in enumerate(self.standings) if not one.aside and one.rests_until <= now]
        if self.by_speed:
            best = max((self.standings[index].bytes_per_second or 0.0 for index in found), default=0.0)
            found.sort(key=lambda index: self._rank(self.standings[index], best, now))
        return found

    def _rank(self, one: Standing, best: float, now: float) -> tuple[int, float]:
        """What a source is sorted by; those with the same rank stay in their order."""
        speed = one.bytes_per_second
        if speed is None:
            return (0 if one.in_flight < _TRIED_AT_ONCE else 3), one.in_flight
        if not one.in_flight and now - one.asked_at >= _TRY_AGAIN_SECONDS:
            return 0, 0
        return (1, 0) if speed * _LEAST_GAIN >= best else (2, -speed)

    def begin(self, index: int, now: float) -> None:
        """Note that a source is asked, until `end`; one that has failed before is asked one thing at a time."""
        one = self.standings[index]
        one.in_flight += 1
        one.asked_at = now
        if one.failed_at is not None:
            one.is_tried, one.rests_until = True, now + _TRY_SECONDS

    def end(self, index: int) -> None:
        """Note that a source has answered, or failed."""
        self.standings[index].in_flight -= 1

    def next_try(self) -> tuple[float, int] | None:
        """When the first of the resting sources may be asked again, and which it is; None if all are set aside."""
        return min(
            ((one.rests_until, index) for index, one in enumerate(self.standings) if not one.aside), default=None
        )

    def late_seconds(self, index: int, size: int) -> float:
        """After how long a range of so many bytes is late, so that another source is asked for it too."""
        usual = self.standings[index].seconds_per_byte
        return _UNKNOWN_LATE_SECONDS if usual is None else max(_LEAST_LATE_SECONDS, _LATE_FACTOR * usual * size)

    def succeeded(self, index: int, size: int, seconds: float) -> None:
        """Note that a source delivered so many bytes in so many seconds; 0 bytes say nothing of its speed."""
        one = self.standings[index]
        one.failures, one.rests_until, one.failed_at, one.is_tried = 0, 0.0, None, False
        if size:
            each = seconds / size
            one.seconds_per_byte = _average(one.seconds_per_byte, each)
            one.bytes_per_second = _average(one.bytes_per_second, max(one.in_flight, 1) / max(each, 1e-12))

    def progressed(self, index: int) -> None:
        """Note that a source delivered something before it failed: its failures are counted anew."""
        self.standings[index].failures = 0

    def is_exhausted(self) -> bool:
        """Whether each source has failed as often in a row as there are attempts, or was set aside."""
        return all(one.aside or one.failures >= self.retry.attempts for one in self.standings)

    def failed(self, index: int, now: float, why: str) -> None:
        """Note that a source failed, or was late; requests that were open together count as one failure."""
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
        """Ask a source no more."""
        self.standings[index].aside, self.standings[index].why = True, why


def _average(old: float | None, new: float) -> float:
    return new if old is None else (1 - _NEWEST_SHARE) * old + _NEWEST_SHARE * new

"""Which of several sources is asked, and when one that failed is asked again. Pure: the caller says what time it is.

Sources are asked in the order they were given: the first is the one that is wanted. One that failed rests, longer after
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
    """

    url: str
    failures: int = 0
    rests_until: float = 0.0
    failed_at: float | None = None
    why: str = ""
    is_tried: bool = False
    aside: bool = False
    seconds_per_byte: float | None = None


@dataclass
class SourceTable:
    """The standings of all sources, in their order.

    Attributes:
        standings: of each source.
        retry: how long one rests after each failure.
        draw: gives random numbers from 0 to 1, so that many clients do not come back at the same moment.
    """

    standings: Sequence[Standing]
    retry: RetryPolicy
    draw: Callable[[], float] = field(default=random.random)

    def usable(self, now: float) -> list[int]:
        """The sources that may be asked now, the one to ask first first."""
        return [index for index, one in enumerate(self.standings) if not one.aside and one.rests_until <= now]

    def begin(self, index: int, now: float) -> None:
        """Note that a source is asked; one that has failed before is asked one thing at a time."""
        one = self.standings[index]
        if one.failed_at is not None:
            one.is_tried, one.rests_until = True, now + _TRY_SECONDS

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
            new, old = seconds / size, one.seconds_per_byte
            one.seconds_per_byte = new if old is None else (1 - _NEWEST_SHARE) * old + _NEWEST_SHARE * new

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

"""How often, and after how long, an operation on a network is tried again. Pure: whoever tries does the waiting."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from surfw.errors import ConfigurationError

_MOST_ATTEMPTS = 1000

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What an HTTP server answers for reasons that may pass."""

MOST_REDIRECTS = 5
"""How often in a row a server may send elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Tries after a transient error: a connection that was refused, or lost.

    The n-th delay is `first_delay_seconds * backoff ** (n - 1)`, but never more than `most_delay_seconds`; a share of
    it of up to `jitter` is left out at random, so that many clients of one server do not come back at the same moment.

    Attributes:
        attempts: how often it is tried in all; 1 never tries again.
        first_delay_seconds: before the second attempt.
        backoff: by how much every further delay is longer than the one before it; at least 1.
        most_delay_seconds: what no delay is longer than.
        jitter: the share of a delay that chance may take away, from 0 to 1.
    """

    attempts: int = 4
    first_delay_seconds: float = 0.1
    backoff: float = 4.0
    most_delay_seconds: float = 30.0
    jitter: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigurationError: a value is out of its bounds.
        """
        for name in ("attempts", "first_delay_seconds", "backoff", "most_delay_seconds", "jitter"):
            value, kind = getattr(self, name), int if name == "attempts" else int | float
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigurationError(f"{name} is {value!a:.80}, expected a number")
        if not 1 <= self.attempts <= _MOST_ATTEMPTS:
            raise ConfigurationError(f"{self.attempts} attempts make no sense; expected 1 to {_MOST_ATTEMPTS}")
        if not 0 <= self.first_delay_seconds < float("inf"):
            raise ConfigurationError(
                f"a first delay of {self.first_delay_seconds} seconds makes no sense; expected 0 or more"
            )
        if not 1 <= self.backoff < float("inf"):
            raise ConfigurationError(f"a backoff of {self.backoff} makes no sense; expected 1 or more")
        if not 0 <= self.most_delay_seconds < float("inf"):
            raise ConfigurationError(
                f"a longest delay of {self.most_delay_seconds} seconds makes no sense; expected 0 or more"
            )
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"a jitter of {self.jitter} makes no sense; expected a share from 0 to 1")

    def delays(self, draw: Callable[[], float] = random.random) -> Iterator[float]:
        """The seconds to wait before the second, third, … attempt; `draw` gives numbers from 0 to 1."""
        delay = min(self.first_delay_seconds, self.most_delay_seconds)
        for _ in range(self.attempts - 1):
            yield delay * (1 - self.jitter * draw())
            delay = min(delay * self.backoff, self.most_delay_seconds)

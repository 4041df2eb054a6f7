"""Rules for retries and redirects. Pure: callers do the waiting and the requests."""

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urldefrag, urljoin, urlsplit

from surfw.errors import ConfigurationError

_FINITE = sys.float_info.max
_BOUNDS = {
    "attempts": (1, 1000, "{} attempts make no sense; expected 1 to 1000"),
    "first_delay_seconds": (0, _FINITE, "a first delay of {} seconds makes no sense; expected 0 or more"),
    "backoff": (1, _FINITE, "a backoff of {} makes no sense; expected 1 or more"),
    "most_delay_seconds": (0, _FINITE, "a longest delay of {} seconds makes no sense; expected 0 or more"),
    "jitter": (0, 1, "a jitter of {} makes no sense; expected a share from 0 to 1"),
    "restart_seconds": (0, _FINITE, "{} seconds for a restart make no sense; expected 0 or more"),
}

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may succeed on a retry."""

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})

MOST_REDIRECTS = 5
"""The most redirects followed in a row."""

RESTART_DELAY_SECONDS = 0.5
"""The interval between attempts to reach a restarting server, after the policy's delays."""

HAS_TLS = {"http": False, "ws": False, "https": True, "wss": True}
"""The schemes of HTTP and WebSocket, and whether they use TLS."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """The target of a redirect.

    Attributes:
        url: the absolute URL, without its fragment.
        has_tls: whether it uses TLS.
        loses_tls: whether it drops TLS, which the previous URL used. Such a redirect must not be followed.
        leaves_origin: whether TLS, host or port change. If so, tokens and other secrets must not be sent there.
        names_user: whether the URL has a user name, which is not ours.
    """

    url: str
    has_tls: bool
    loses_tls: bool
    leaves_origin: bool
    names_user: bool


def parse_redirect(url: str, location: str) -> Redirect:
    """Parse a redirect from `url` to `location`, which may be relative.

    Raises:
        ValueError: it is not the address of an HTTP or WebSocket server.
    """
    target = urldefrag(urljoin(url, location)).url
    old, new = _origin(url), _origin(target)
    return Redirect(target, new[0], old[0] and not new[0], old != new, "@" in urlsplit(target).netloc)


def _origin(url: str) -> tuple[bool, str, int]:
    parts = urlsplit(url)
    if parts.scheme not in HAS_TLS or not parts.hostname or not url.isprintable():
        raise ValueError(f"{url!a} is not the address of an HTTP or WebSocket server")
    has_tls = HAS_TLS[parts.scheme]
    return has_tls, parts.hostname, parts.port or (443 if has_tls else 80)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How often, and after which delays, to retry after a connection was refused or lost.

    The n-th delay is `first_delay_seconds * backoff ** (n - 1)`, at most `most_delay_seconds`. It is shortened by a
    random share, up to `jitter`, so that a server's clients do not reconnect at the same moment.

    A server that announces that it is stopping is probably being restarted. It is also retried every
    `RESTART_DELAY_SECONDS`, until `restart_seconds` after the announcement.

    Attributes:
        attempts: the total number of attempts; 1 disables retries.
        first_delay_seconds: the delay before the second attempt.
        backoff: the factor from each delay to the next, 1 or more.
        most_delay_seconds: the longest delay.
        jitter: the largest share by which a delay is shortened, from 0 to 1.
        restart_seconds: how long to wait for a server that announced that it is stopping; no effect with one attempt.
    """

    attempts: int = 4
    first_delay_seconds: float = 0.1
    backoff: float = 4.0
    most_delay_seconds: float = 30.0
    jitter: float = 0.5
    restart_seconds: float = 15.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: a value is out of its bounds.
        """
        for name, (low, high, complaint) in _BOUNDS.items():
            value, kind = getattr(self, name), int if name == "attempts" else int | float
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigurationError(f"{name} is {value!a:.80}, expected a number")
            if not low <= value <= high:
                raise ConfigurationError(complaint.format(value))

    def delays(self, draw: Callable[[], float] = random.random) -> Iterator[float]:
        """Yield the seconds to wait before the second, third, … attempt; `draw` returns random numbers from 0 to 1."""
        delay = min(self.first_delay_seconds, self.most_delay_seconds)
        for _ in range(self.attempts - 1):
            yield delay * (1 - self.jitter * draw())
            delay = min(delay * self.backoff, self.most_delay_seconds)

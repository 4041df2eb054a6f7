"""What is tried again on a network, how often and after how long, and where a redirect may lead.

Pure: callers do the waiting and the asking.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urldefrag, urljoin, urlsplit

from surfw.errors import ConfigurationError

_MOST_ATTEMPTS = 1000

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What an HTTP server answers for reasons that may pass."""

REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})

MOST_REDIRECTS = 5
"""How many redirects are followed in a row."""

_HAS_TLS = {"http": False, "ws": False, "https": True, "wss": True}


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where a server sends a request instead.

    Attributes:
        url: the absolute address, without its fragment.
        has_tls: whether the connection to it would be encrypted.
        loses_tls: whether it would not be, while the one to the server is. Such a redirect must not be followed.
        leaves_origin: whether scheme, host or port change. Secrets for the server must not be sent there.
        names_user: whether the address comes with a user, who is not ours.
    """

    url: str
    has_tls: bool
    loses_tls: bool
    leaves_origin: bool
    names_user: bool


def parse_redirect(url: str, location: str) -> Redirect:
    """The redirect to `location`, absolute or relative, that the server at `url` answered with.

    Raises:
        ValueError: it does not lead to a host over HTTP or WebSocket.
    """
    target = urldefrag(urljoin(url, location)).url
    old, new = _origin(url), _origin(target)
    return Redirect(target, new[0], old[0] and not new[0], old != new, "@" in urlsplit(target).netloc)


def _origin(url: str) -> tuple[bool, str, int]:
    parts = urlsplit(url)
    if parts.scheme not in _HAS_TLS or not parts.hostname:
        raise ValueError(f"{url!a} has no host that HTTP or WebSocket leads to")
    has_tls = _HAS_TLS[parts.scheme]
    return has_tls, parts.hostname, parts.port or (443 if has_tls else 80)


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

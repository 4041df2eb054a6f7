"""Rate limits of a server, for all clients together and for each. Nothing here knows of sockets.

A `Bucket` fills at a rate, and sending takes from it. It may go into debt by one send, and allows nothing more until
the debt is paid. Clients that share a bucket take turns by what each was sent (see `fairness`), and what a client
needs now goes before the prefetches of others.
"""

import asyncio
import time
from collections.abc import Callable

from surfw.config import KIB, MB, expect
from surfw.errors import ConfigurationError
from surfw.server.fairness import Account, FairQueue

LEAST_RATE = MB
"""The lowest rate: below it, clients that share it would time out."""

_SLICE_SECONDS = 0.05
"""How many seconds' worth of a limited rate are sent at a time, so that data flows evenly and turns come soon."""
_LEAST_SLICE, _LEAD_BYTES = 64 * KIB, 16 * MB


class Bucket:
    """A token bucket of bytes, with a capacity of one slice."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow `rate` bytes per second."""
        self.rate = rate
        self._clock = clock
        self._has, self._since = 0.0, clock()

    @property
    def slice_bytes(self) -> int:
        """How many bytes to send at a time."""
        return max(_LEAST_SLICE, int(self.rate * _SLICE_SECONDS))

    def wait(self) -> float:
        """Return the seconds until something may be sent; 0 for now."""
        now = self._clock()
        self._has = min(float(self.slice_bytes), self._has + (now - self._since) * self.rate)
        self._since = now
        return max(0.0, -self._has / self.rate)

    def take(self, size: int) -> None:
        """Count bytes that are sent."""
        self._has -= size


class Pacing:
    """The rate limits of a server; None for no limit. `client` returns the pace of a connection."""

    def __init__(self, rate: float | None = None, client_rate: float | None = None) -> None:
        """Set the limits for all clients together and for each, in bytes per second."""
        self._client_rate = client_rate
        self._bucket = None if rate is None else Bucket(rate)
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(asyncio.Future.done, _LEAD_BYTES)
        self._next: asyncio.TimerHandle | None = None

    def client(self) -> "ClientPace":
        """Return the pace of a new connection."""
        return ClientPace(self, None if self._client_rate is None else Bucket(self._client_rate))

    @property
    def most_bytes(self) -> int | None:
        """How many bytes to send at a time; None for any number."""
        return None if self._bucket is None else self._bucket.slice_bytes

    async def turn(self, account: Account, size: int, priority: int) -> None:
        """Wait until an account may send `size` bytes, and count them."""
        if self._bucket is None:
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(account, size, turn, priority)
        self._give()
        try:
            await turn
        finally:
            self._waiting.drop(account, turn)
        self._bucket.take(size)

    def _give(self) -> None:
        """Schedule the next turn, unless one is scheduled or nothing waits."""
        if self._bucket is None or self._next is not None or not len(self._waiting):
            return
        self._next = asyncio.get_running_loop().call_later(self._bucket.wait(), self._give_now)

    def _give_now(self) -> None:
        self._next = None
        if self._bucket is not None and not self._bucket.wait() and (turn := self._waiting.take()) is not None:
            turn.set_result(None)
        asyncio.get_running_loop().call_soon(self._give)  # after the waiter has taken its bytes


class ClientPace:
    """Decides when one connection may send."""

    def __init__(self, shared: Pacing, own: Bucket | None) -> None:
        self._shared = shared
        self._own = own
        self._account = Account()

    @property
    def most_bytes(self) -> int | None:
        """How many bytes to send at a time; None for any number."""
        own = None if self._own is None else self._own.slice_bytes
        return min((most for most in (self._shared.most_bytes, own) if most is not None), default=None)

    async def wait(self, size: int, priority: int) -> None:
        """Wait until `size` bytes may be sent, and count them."""
        if self._own is not None:
            await asyncio.sleep(self._own.wait())  # no one else takes from it: a connection sends one run at a time
        await self._shared.turn(self._account, size, priority)
        if self._own is not None:
            self._own.take(size)


def check_rate(name: str, rate: float | None) -> None:
    """Check a rate limit.

    Raises:
        ConfigurationError: it is not a number, or too small.
    """
    expect(name, rate, int | float | None, "a number of bytes, or None for no limit")
    if rate is not None and not LEAST_RATE <= rate < float("inf"):
        raise ConfigurationError(f"{name} is {rate}; expected at least {LEAST_RATE} bytes (1MB), or no limit")

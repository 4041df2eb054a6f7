"""How fast a server sends: to all clients together, and to each of them. Nothing here knows of sockets.

A `Bucket` fills at a rate, and whoever sends takes from it; it may owe as much as was sent at once, and gives nothing
until that is paid back. Where all clients share one, they take turns by what each was sent (see `fairness`), and what a
client needs now goes before what others want ahead.
"""

import asyncio
import time
from collections.abc import Callable

from surfw.config import KIB, MB, expect
from surfw.errors import ConfigurationError
from surfw.server.fairness import Account, FairQueue

LEAST_RATE = MB
"""The slowest rate: below, clients that share it would wait for longer than their patience lasts."""

_SLICE_SECONDS = 0.05
"""What is sent at a time at a limited rate, so that it flows evenly, and everybody gets a turn soon."""
_LEAST_SLICE, _LEAD_BYTES = 64 * KIB, 16 * MB


class Bucket:
    """Bytes that may be sent, which become more with the time, up to those of a slice."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Let through `rate` bytes per second."""
        self.rate = rate
        self._clock = clock
        self._has, self._since = 0.0, clock()

    @property
    def slice_bytes(self) -> int:
        """How much is to be sent at a time."""
        return max(_LEAST_SLICE, int(self.rate * _SLICE_SECONDS))

    def wait(self) -> float:
        """The seconds until something may be sent; 0 for now."""
        now = self._clock()
        self._has = min(float(self.slice_bytes), self._has + (now - self._since) * self.rate)
        self._since = now
        return max(0.0, -self._has / self.rate)

    def take(self, size: int) -> None:
        """Count what is sent."""
        self._has -= size


class Pacing:
    """The rates of a server, of which None has no limit. `client` gives each connection its share."""

    def __init__(self, rate: float | None = None, client_rate: float | None = None) -> None:
        """Set the rates of all clients together, and of each of them, in bytes per second."""
        self._client_rate = client_rate
        self._bucket = None if rate is None else Bucket(rate)
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(asyncio.Future.done, _LEAD_BYTES)
        self._next: asyncio.TimerHandle | None = None

    def client(self) -> "ClientPace":
        """The pace of a new connection."""
        return ClientPace(self, None if self._client_rate is None else Bucket(self._client_rate))

    @property
    def most_bytes(self) -> int | None:
        """How much is to be sent at a time; None for any."""
        return None if self._bucket is None else self._bucket.slice_bytes

    async def turn(self, account: Account, size: int, priority: int) -> None:
        """Wait until an account may send so many bytes, which are counted."""
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
        """Give the next turn, unless one was given that has not been used, or there is nothing to send."""
        if self._bucket is None or self._next is not None or not len(self._waiting):
            return
        self._next = asyncio.get_running_loop().call_later(self._bucket.wait(), self._give_now)

    def _give_now(self) -> None:
        self._next = None
        if self._bucket is not None and not self._bucket.wait() and (turn := self._waiting.take()) is not None:
            turn.set_result(None)
        asyncio.get_running_loop().call_soon(self._give)  # once that has taken what it sends


class ClientPace:
    """When one connection may send."""

    def __init__(self, shared: Pacing, own: Bucket | None) -> None:
        self._shared = shared
        self._own = own
        self._account = Account()

    @property
    def most_bytes(self) -> int | None:
        """How much is to be sent at a time; None for any."""
        own = None if self._own is None else self._own.slice_bytes
        return min((most for most in (self._shared.most_bytes, own) if most is not None), default=None)

    async def wait(self, size: int, priority: int) -> None:
        """Wait until so many bytes may be sent, which are counted."""
        if self._own is not None:
            await asyncio.sleep(self._own.wait())  # nobody else takes from it: a connection sends one run at a time
        await self._shared.turn(self._account, size, priority)
        if self._own is not None:
            self._own.take(size)


def check_rate(name: str, rate: float | None) -> None:
    """Make sure that a rate can be used.

    Raises:
        ConfigurationError: it is no number, or too small.
    """
    expect(name, rate, int | float | None, "a number of bytes, or None for no limit")
    if rate is not None and not LEAST_RATE <= rate < float("inf"):
        raise ConfigurationError(f"{name} is {rate}; expected at least {LEAST_RATE} bytes (1MB), or no limit")

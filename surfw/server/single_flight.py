"""Work that several may want at once, done once for all of them (*single-flight*), and some at a time.

Invariants:

- Whoever asks for a key that is being worked on joins that work. Giving up a wait does not stop it for the others.
- Work for which nobody waits any more is dropped while it is queued; once it has begun, it goes on to its end.
- A failure goes to all who wait, and is nobody's if none does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class _Flight(Generic[Value]):
    """Work for one key: how many wait for it, and whether it has begun."""

    task: asyncio.Task[Value] = field(init=False)
    waiters: int = 0
    begun: bool = False


class SingleFlight(Generic[Key, Value]):
    """Does `work(key)` once for all who ask for a key meanwhile, at most `slots` keys at a time."""

    def __init__(self, work: Callable[[Key], Awaitable[Value]], slots: int) -> None:
        """Nothing is done yet."""
        self._work = work
        self._slots = asyncio.Semaphore(slots)
        self._flights: dict[Key, _Flight[Value]] = {}
        self._tasks: set[asyncio.Task[Value]] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    async def join(self, key: Key) -> Value:
        """What the work for the key gives; what it raises goes to all who wait."""
        flight = self._flights.get(key) or self._start(key)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.begun:
                self._forget(key, flight)
                flight.task.cancel()

    def _start(self, key: Key) -> _Flight[Value]:
        flight: _Flight[Value] = _Flight()
        flight.task = asyncio.create_task(self._fly(key, flight), name=f"surfw {key}")
        self._flights[key] = flight
        self._tasks.add(flight.task)
        flight.task.add_done_callback(lambda _: self._finished(key, flight))
        return flight

    async def _fly(self, key: Key, flight: _Flight[Value]) -> Value:
        async with self._slots:
            flight.begun = True
            return await self._work(key)

    def _finished(self, key: Key, flight: _Flight[Value]) -> None:
        self._forget(key, flight)
        self._tasks.discard(flight.task)
        if not flight.task.cancelled():
            flight.task.exception()  # looked at here, for a failure that nobody waits for any more

    def _forget(self, key: Key, flight: _Flight[Value]) -> None:
        """Let nobody join it any more; a later flight of the same key stays."""
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def close(self) -> None:
        """Stop all work."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

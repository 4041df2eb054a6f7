"""Work that several may want at once, done once for all of them (*single-flight*), and some at a time.

Invariants:

- Whoever asks for a key that is being worked on joins that work. Giving up a wait does not stop it for the others.
- Work waits for its turn on the account of each who asks for it, so that nobody waits longer because another asked too;
  whoever's turn comes first pays.
- Work for which nobody waits any more is dropped while it is queued; once it has begun, it goes on to its end.
- A failure goes to all who wait, and is nobody's if none does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from surfw.server.fairness import Account, FairQueue

Key = TypeVar("Key")
Value = TypeVar("Value")


class _Flight(Generic[Key, Value]):
    """Work for one key: how many wait for it, what comes of it, and who does it, once it has begun."""

    __slots__ = ("key", "outcome", "task", "waiters")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.outcome: asyncio.Future[Value] = asyncio.get_running_loop().create_future()
        self.waiters = 0
        self.task: asyncio.Task[Value] | None = None

    @property
    def begun(self) -> bool:
        return self.task is not None


class SingleFlight(Generic[Key, Value]):
    """Does `work(key)` once for all who ask for a key meanwhile, at most `slots` keys at a time."""

    def __init__(self, work: Callable[[Key], Awaitable[Value]], slots: int) -> None:
        """Nothing is done yet."""
        self._work = work
        self._free = slots
        self._flights: dict[Key, _Flight[Key, Value]] = {}
        self._queue: FairQueue[_Flight[Key, Value]] = FairQueue(lambda flight: flight.begun)
        self._tasks: set[asyncio.Task[Value]] = set()
        self._own = Account()

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    def is_queued(self, key: Key) -> bool:
        """Whether somebody waits for the key's work, which has not begun."""
        flight = self._flights.get(key)
        return flight is not None and not flight.begun

    async def join(self, key: Key, account: Account | None = None, price: float = 1) -> Value:
        """What the work for the key gives; what it raises goes to all who wait.

        Args:
            key: what to do.
            account: who pays; None for those who are all one.
            price: what it costs, if it is begun for this.
        """
        account = account or self._own
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(key)
        flight.waiters += 1
        if not flight.begun:
            self._queue.put(account, price, flight)
            self._begin()
        try:
            return await asyncio.shield(flight.outcome)
        finally:
            flight.waiters -= 1
            self._queue.drop(account, flight)  # it may have begun on another's account; what came of it must not stay
            if not flight.waiters and not flight.begun:
                self._forget(flight)
                flight.outcome.cancel()

    def detach(self, key: Key) -> None:
        """Let nobody join what has begun for a key: whoever asks next has it done again."""
        flight = self._flights.get(key)
        if flight is not None and flight.begun:
            self._forget(flight)

    def _begin(self) -> None:
        """Begin what waits, as far as there are slots."""
        while self._free and (flight := self._queue.take()) is not None:
            self._free -= 1
            flight.task = asyncio.create_task(self._fly(flight), name=f"surfw {flight.key}")
            self._tasks.add(flight.task)
            flight.task.add_done_callback(partial(self._finished, flight))

    async def _fly(self, flight: _Flight[Key, Value]) -> Value:
        return await self._work(flight.key)

    def _finished(self, flight: _Flight[Key, Value], task: asyncio.Task[Value]) -> None:
        self._forget(flight)
        self._tasks.discard(task)
        self._free += 1
        if task.cancelled():
            flight.outcome.cancel()
        elif (exc := task.exception()) is not None:
            flight.outcome.set_exception(exc)
            flight.outcome.exception()  # looked at here, for a failure that nobody waits for any more
        else:
            flight.outcome.set_result(task.result())
        self._begin()

    def _forget(self, flight: _Flight[Key, Value]) -> None:
        """Let nobody join it any more; a later flight of the same key stays."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    async def close(self) -> None:
        """Stop all work."""
        for flight in list(self._flights.values()):
            if not flight.begun:
                self._forget(flight)
                flight.outcome.cancel()
        self._queue = FairQueue(lambda flight: flight.begun)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Whose turn it is when many connections want the same thing: the event loop's time, or reads of the storage.

Every connection has an `Account` for each of the two. A turn has a price, and the next one goes to the account that has
paid least so far (*start-time fair queueing*, Goyal, Vin and Cheng, 1996). A client that wants little gets it at once,
and one that wants much waits behind what it already had. Turns cannot be saved up.

`Turns` shares the loop's time. `SingleFlight` shares reads, and reads once what several want. Its invariants:

- A request for a key that is being worked on joins that work. Giving up a wait does not stop the work for the others.
- Work is queued on the account of each request for it, so that nobody waits longer because others want the same. It
  begins at the first of these turns, and that account pays.
- Work that nobody waits for any more is dropped while it is queued; once it has begun, it runs to its end.
- A failure goes to all who wait. If nobody does, it is dropped.
- Each who waits can see progress; see `Reader.progress_bytes`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from surfw.server.futures import Asked
from surfw.threads import cancel_all

Item = TypeVar("Item")
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class Account:
    """What one client has paid in a queue, on that queue's scale."""

    paid: float = 0.0


class FairQueue(Generic[Item]):
    """Items that wait for their turn, in order within an account. It only decides, and does nothing itself."""

    def __init__(self, is_over: Callable[[Item], bool]) -> None:
        """Start empty. An item that `is_over` when its turn comes is skipped, and costs nothing."""
        self._is_over = is_over
        self._waiting: dict[Account, deque[tuple[float, Item]]] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, account: Account, price: float, item: Item) -> None:
        """Queue an item; the account will pay for its turn."""
        self._waiting.setdefault(account, deque()).append((price, item))

    def drop(self, account: Account, item: Item) -> None:
        """Remove an item that the account queued, once, if it is still there."""
        queue = self._waiting.get(account, deque())
        place = next((index for index, (_, waiting) in enumerate(queue) if waiting is item), None)
        if place is not None:
            del queue[place]
        if not queue:
            self._waiting.pop(account, None)

    def take(self) -> Item | None:
        """Remove and return the item whose turn it is; None if the queue is empty."""
        while self._waiting:
            account = min(self._waiting, key=self._start)  # of equals, the one that has waited longest
            queue = self._waiting.pop(account)
            price, item = queue.popleft()
            if queue:
                self._waiting[account] = queue
            if not self._is_over(item):
                self._now = self._start(account)
                account.paid = self._now + price
                return item
        return None

    def _start(self, account: Account) -> float:
        """Where the account's next turn starts: at what it has paid, but never before now: no turns are saved up."""
        return max(account.paid, self._now)


class Turns:
    """Turns in the event loop: each pass of it has one step of one connection, besides everybody's input and output.

    So passes stay short, and work that comes in faster than it can be done waits with the client that sent it.
    """

    def __init__(self) -> None:
        """Start with nobody waiting. Belongs to the event loop that it is first used in."""
        self._steps: FairQueue[asyncio.Future[None]] = FairQueue(asyncio.Future.done)
        self._taken = False

    async def turn(self, account: Account) -> None:
        """Wait for a turn; what the caller does before its next `await` is the step."""
        await self.ask(account)

    def ask(self, account: Account) -> asyncio.Future[None]:
        """Return a future that is done when the turn comes, which may be at once."""
        step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steps.put(account, 1, step)
        if not self._taken:
            self._next()
        return step

    def _next(self) -> None:
        step = self._steps.take()
        self._taken = step is not None
        if step is not None:
            step.set_result(None)
            asyncio.get_running_loop().call_soon(self._next)


@dataclass(slots=True, eq=False)
class Reader:
    """A request, or other work, that has things read.

    Attributes:
        account: what pays for the reads.
        fresh: whether they have to come from the storage again, even if they are cached.
        chunk: the identity of the chunk that they are, if they are one.
        asked: what is left of them, if the client announced that it reads them again and again.
        read_bytes: what was read so far, without what is being read now.
        waits_for: the reads that it waits for, all of one `SingleFlight` at a time.
        seen_bytes: what that one had read, for anybody, when progress was last counted.
    """

    account: Account = field(default_factory=Account)
    fresh: bool = False
    chunk: str = ""
    asked: Asked | None = None
    read_bytes: int = 0
    waits_for: "list[_Flight[Any, Any]]" = field(default_factory=list)
    seen_bytes: int = 0

    @property
    def progress_bytes(self) -> int:
        """How far the storage has got with what this reader waits for: a count of bytes that only rises.

        It counts the bytes of its own reads. While all of those are queued, it also counts what is read for others,
        since that comes first. So a queue that moves is progress, but a read of its own that hangs is not, whatever
        others get.
        """
        if self.waits_for:
            total = self.waits_for[0].flights.read_bytes
            if not any(flight.has_begun for flight in self.waits_for):
                self.read_bytes += total - self.seen_bytes
            self.seen_bytes = total
        return self.read_bytes + sum(flight.reader.progress_bytes for flight in self.waits_for)


@dataclass(slots=True, eq=False)
class _Flight(Generic[Key, Value]):
    """Work for one key: for whom it reads, its outcome, how many wait for that, and its task, once it has begun."""

    flights: "SingleFlight[Key, Value]"
    key: Key
    reader: Reader
    outcome: asyncio.Future[Value]
    waiters: int = 0
    task: asyncio.Task[Value] | None = None

    @property
    def has_begun(self) -> bool:
        return self.task is not None


class SingleFlight(Generic[Key, Value]):
    """Does `work(key, reader)` once for all who ask for a key meanwhile, at most `slots` keys at a time.

    The work adds what it reads to `reader.read_bytes`, for those who wait for it, and to `read_bytes`, for those who
    are queued behind it.

    Attributes:
        read_bytes: what was read so far, for anybody.
    """

    def __init__(self, work: Callable[[Key, Reader], Coroutine[Any, Any, Value]], slots: int) -> None:
        """Start with nothing to do."""
        self.read_bytes = 0
        self._own = Account()
        self._work = work
        self._slots = slots
        self._flights: dict[Key, _Flight[Key, Value]] = {}
        self._queue: FairQueue[_Flight[Key, Value]] = FairQueue(
            lambda flight: flight.has_begun or flight.outcome.done()
        )
        self._begun: dict[asyncio.Task[Value], _Flight[Key, Value]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    def running(self) -> Iterator[tuple[Key, Reader]]:
        """The keys that are being worked on, each with the reader of its work."""
        return ((flight.key, flight.reader) for task, flight in self._begun.items() if not task.done())

    async def join(self, key: Key, reader: Reader | None = None, price: float = 1) -> Value:
        """Wait for the work for a key, and return what it returns, or raise what it raises.

        The reader sees its progress, and pays the price if the work begins at its turn; None is for the server's own.
        """
        reader = reader or Reader(self._own)
        flight = self._flights.get(key)
        if flight is None:
            outcome = asyncio.get_running_loop().create_future()
            flight = self._flights[key] = _Flight(self, key, Reader(reader.account), outcome)
        flight.waiters += 1
        reader.waits_for.append(flight)
        reader.seen_bytes = self.read_bytes
        if not flight.has_begun:
            self._queue.put(reader.account, price, flight)
            self._begin()
        try:
            value = await asyncio.shield(flight.outcome)
            reader.read_bytes += flight.reader.progress_bytes
            return value
        finally:
            reader.waits_for.remove(flight)
            flight.waiters -= 1
            # It may have begun on another account; the queue must not keep it, and its outcome, until our turn comes.
            self._queue.drop(reader.account, flight)
            if not flight.waiters:
                self._drop(flight)

    def detach(self, key: Key) -> None:
        """Let nobody join the work for a key that has begun: the next request has it done again."""
        flight = self._flights.get(key)
        if flight is not None and flight.has_begun:
            self._forget(flight)

    def _begin(self) -> None:
        """Begin what is queued, as far as there are slots."""
        while len(self._begun) < self._slots and (flight := self._queue.take()) is not None:
            flight.task = asyncio.create_task(self._work(flight.key, flight.reader), name=f"surfw {flight.key}")
            self._begun[flight.task] = flight
            flight.task.add_done_callback(partial(self._finished, flight))

    def _finished(self, flight: _Flight[Key, Value], task: asyncio.Task[Value]) -> None:
        self._forget(flight)
        del self._begun[task]
        if task.cancelled():
            flight.outcome.cancel()
        elif (exc := task.exception()) is not None:
            flight.outcome.set_exception(exc)
            flight.outcome.exception()  # marks it as retrieved, for a failure that nobody waits for any more
        else:
            flight.outcome.set_result(task.result())
        self._begin()

    def _forget(self, flight: _Flight[Key, Value]) -> None:
        """Let nobody join it any more. A later flight of the same key is not affected."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _drop(self, flight: _Flight[Key, Value]) -> None:
        """Give up work that has not begun."""
        if not flight.has_begun:
            self._forget(flight)
            flight.outcome.cancel()

    async def close(self) -> None:
        """Stop all work."""
        for flight in list(self._flights.values()):
            self._drop(flight)
        await cancel_all(self._begun)

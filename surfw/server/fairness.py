"""Whose turn it is when many connections want the same thing: the event loop's time, or reads of the storage.

Every connection has an `Account` for each of the two. A turn has a price, and the next one goes to the account that has
paid least so far (*start-time fair queueing*, Goyal, Vin and Cheng, 1996). A client that wants little gets it at once,
and one that wants much waits behind what it already had. Turns cannot be saved up.

`Turns` shares the loop's time. `Flights` shares reads, and reads once what several want. Its invariants:

- A request for a key that is being worked on joins that work. Giving up a wait does not stop the work for the others.
- Work is queued on the account of each request for it, so that nobody waits longer because others want the same. It
  begins at the first of these turns, and that account pays.
- Work that nobody waits for any more is dropped while it is queued; once it has begun, it runs to its end.
- A failure goes to all who wait. If nobody does, it is dropped.
- Each who waits can see progress; see `Reader.progress_bytes`.
"""

import asyncio
from abc import ABC, abstractmethod
from bisect import insort
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
    """Items that wait for their turn: of an account, the most urgent first. It only decides, and does nothing itself.

    An item is needed now, if its priority is at most 0, or else wanted ahead. One that is needed now goes before what
    other accounts want ahead, unless its own account has paid more than theirs by `lead` or more.
    """

    def __init__(self, is_over: Callable[[Item], bool], lead: float = 0.0) -> None:
        """Start empty. An item that `is_over` when its turn comes is skipped, and costs nothing."""
        self._is_over = is_over
        self._lead = lead
        self._waiting: dict[Account, list[tuple[int, int, float, Item]]] = {}
        self._now = 0.0
        self._asked = 0
        self._last = Account()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, account: Account, price: float, item: Item, priority: int = 0) -> None:
        """Queue an item; the account will pay for its turn. Lower numbers are more urgent."""
        if account not in self._waiting:  # it comes now: no turns are saved up
            self._waiting[account] = []
            account.paid = max(account.paid, self._now)
        self._asked += 1
        entry = priority, self._asked, price, item
        insort(self._waiting[account], entry, key=lambda one: one[:2])

    def drop(self, account: Account, item: Item) -> None:
        """Remove an item that the account queued, once, if it is still there."""
        self._pick(account, lambda waiting: waiting is item)

    def take(self) -> Item | None:
        """Remove and return the item whose turn it is; None if the queue is empty."""
        while self._waiting:
            account = min(self._waiting, key=self._turn)  # of equals, the one that has waited longest
            queue = self._waiting.pop(account)
            *_, price, item = queue.pop(0)
            if queue:
                self._waiting[account] = queue
            if not self._is_over(item):
                self._now = max(self._now, account.paid)
                self._last = account
                account.paid += price
                return item
        return None

    def take_too(self, belongs: Callable[[Item], bool]) -> Item | None:
        """Remove and return an item that belongs to the turn that was just taken, and has its account pay for it."""
        account = self._last
        entry = self._pick(account, lambda item: belongs(item) and not self._is_over(item))
        if entry is None:
            return None
        account.paid += entry[2]
        return entry[3]

    def _pick(self, account: Account, fits: Callable[[Item], bool]) -> tuple[int, int, float, Item] | None:
        queue = self._waiting.get(account, [])
        place = next((index for index, (*_, item) in enumerate(queue) if fits(item)), None)
        if place is None:
            return None
        picked = queue.pop(place)
        if not queue:
            del self._waiting[account]
        return picked

    def _turn(self, account: Account) -> float:
        """Where the account's next turn starts: at what it has paid, or later, if its most urgent item can wait."""
        return account.paid + (self._lead if self._waiting[account][0][0] > 0 else 0.0)


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
        priority: how urgent they are: at most 0 if they are needed now, lower first.
        chunk: the identity of the chunk that they are, if they are one.
        asked: what is left of them, if the client announced that it reads them again and again.
        read_bytes: what was read so far, without what is being read now.
        waits_for: the reads that it waits for, all of one `Flights` at a time.
        seen_bytes: what that one had read, for anybody, when progress was last counted.
    """

    account: Account = field(default_factory=Account)
    fresh: bool = False
    priority: int = 0
    chunk: str = ""
    asked: Asked | None = None
    read_bytes: int = 0
    waits_for: "list[Flight[Any, Any]]" = field(default_factory=list)
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
class Flight(Generic[Key, Value]):
    """Work for one key.

    Attributes:
        flights: what it is one of.
        key: what is worked on.
        reader: for whom it reads: a request of its own, which those who wait for it see the progress of.
        outcome: what comes of it.
        waiters: how many wait for that.
        task: what does the work, once it has begun.
    """

    flights: "Flights[Key, Value]"
    key: Key
    reader: Reader
    outcome: asyncio.Future[Value]
    waiters: int = 0
    task: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it is being worked on, or was."""
        return self.task is not None

    def land(self, value: Value) -> None:
        """Give the outcome to all who wait; nobody joins any more."""
        self.flights.forget(self)
        self.outcome.set_result(value)


Run = list[Flight[Key, Value]]
"""Flights that are worked on as one, in order; those that have landed are no longer in it, so that nothing is kept."""


class Flights(ABC, Generic[Key, Value]):
    """Does the work for a key once for all who ask for it meanwhile, at most `slots` runs of keys at a time.

    Attributes:
        read_bytes: what was read so far, for anybody.
    """

    def __init__(self, slots: int, *, lead: float = 0.0) -> None:
        """Start with nothing to do; for `lead`, see `FairQueue`."""
        self.read_bytes = 0
        self._own = Account()
        self._slots = slots
        self._flights: dict[Key, Flight[Key, Value]] = {}
        self._queue: FairQueue[Flight[Key, Value]] = FairQueue(
            lambda flight: flight.has_begun or flight.outcome.done(), lead
        )
        self._begun: dict[asyncio.Task[None], Run[Key, Value]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    def running(self) -> Iterator[tuple[Key, Reader]]:
        """The keys that are being worked on, each with the reader of its work."""
        for task, run in self._begun.items():
            if not task.done():
                yield from ((flight.key, flight.reader) for flight in run)

    async def join(self, key: Key, reader: Reader | None = None, price: float = 1) -> Value:
        """Wait for the work for a key, and return what it returns, or raise what it raises.

        The reader sees its progress, and pays the price if the work begins at its turn; None is for the server's own.
        """
        reader = reader or Reader(self._own)
        flight = self._flights.get(key)
        if flight is None:
            outcome = asyncio.get_running_loop().create_future()
            flight = self._flights[key] = Flight(self, key, Reader(reader.account), outcome)
        flight.waiters += 1
        reader.waits_for.append(flight)
        reader.seen_bytes = self.read_bytes
        if not flight.has_begun:
            self._queue.put(reader.account, price, flight, reader.priority)
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
            self.forget(flight)

    def belongs(self, run: Run[Key, Value], key: Key) -> bool:
        """Whether the work for a key, which is queued on the same account, is to be done with that of a run."""
        return False

    @abstractmethod
    async def do(self, run: Run[Key, Value]) -> None:
        """Do the work of a run, and land its flights, each taken out of it; those that are left end as this does.

        It adds what it reads to `reader.read_bytes` of each, for those who wait for it, and to `read_bytes`, for those
        who are queued behind it.
        """

    def _begin(self) -> None:
        """Begin what is queued, as far as there are slots."""
        while len(self._begun) < self._slots and (flight := self._queue.take()) is not None:
            run = [flight]
            while (more := self._queue.take_too(lambda other: self.belongs(run, other.key))) is not None:  # noqa: B023
                run.append(more)
            task = asyncio.create_task(self.do(run), name=f"surfw {flight.key}")
            for one in run:
                one.task = task
            self._begun[task] = run
            task.add_done_callback(partial(self._finished, run))

    def _finished(self, run: Run[Key, Value], task: asyncio.Task[None]) -> None:
        del self._begun[task]
        for flight in run:
            self.forget(flight)
            if task.cancelled():
                flight.outcome.cancel()
            elif (exc := task.exception()) is not None:
                flight.outcome.set_exception(exc)
                flight.outcome.exception()  # marks it as retrieved, for a failure that nobody waits for any more
        self._begin()

    def forget(self, flight: Flight[Key, Value]) -> None:
        """Let nobody join it any more. A later flight of the same key is not affected."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _drop(self, flight: Flight[Key, Value]) -> None:
        """Give up work that has not begun."""
        if not flight.has_begun:
            self.forget(flight)
            flight.outcome.cancel()

    async def close(self) -> None:
        """Stop all work."""
        for flight in list(self._flights.values()):
            self._drop(flight)
        await cancel_all(self._begun)


class SingleFlight(Flights[Key, Value]):
    """Does `work(key, reader)`, one key at a time in each slot."""

    def __init__(self, work: Callable[[Key, Reader], Coroutine[Any, Any, Value]], slots: int) -> None:
        """Start with nothing to do."""
        super().__init__(slots)
        self._work = work

    async def do(self, run: Run[Key, Value]) -> None:
        """Do the work of the one flight."""
        value = await self._work(run[0].key, run[0].reader)
        run.pop(0).land(value)
